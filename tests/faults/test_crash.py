"""Commands that are killed at random moments, or told to end, leave the old output or the new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sampling import SEED, sample

from loraio.cli import main

SCRIPT = Path(__file__).with_name("crash.py")

WRITERS = ("train", "train --checkpoint", "convert --to native", "convert --to kohya", "convert --to peft", "merge")


def crash(*words: object) -> dict[str, Any]:
    """Return what the script counted, after a look at its problems."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {name: job["problems"] for name, job in found.items() if job["problems"]} == {}
    return found


@pytest.mark.sampled
def test_a_command_that_is_killed_at_any_moment_leaves_the_old_output_or_the_new() -> None:
    found = crash("KILL", 6, SEED, "merge, sharded", *sample(WRITERS, 2, key="killed"))
    for name, job in found.items():
        assert job.get("old", 0) + job.get("new", 0) + job.get("unfinished", 0) == 6, name


@pytest.mark.slow
def test_every_writer_is_killed_at_many_moments() -> None:
    found = crash("KILL", 30, SEED)
    assert set(found) == {*WRITERS, "merge, sharded"}
    assert sum(job["during"] for job in found.values()) > 20  # else it would have shown little


@pytest.mark.slow
def test_every_command_that_is_told_to_end_at_any_moment_does_so_in_good_order() -> None:
    found = crash("TERM,TERM,INT", 4, SEED)
    assert {name.split()[0].rstrip(",") for name in found} == set(main.commands)


@pytest.mark.sampled
def test_a_command_that_is_interrupted_at_any_moment_ends_in_good_order() -> None:
    crash("INT", 4, SEED, *sample(("merge", "convert --to peft", "pack", "unmerge"), 1, key="interrupted"))
