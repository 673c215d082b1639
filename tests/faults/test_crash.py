"""Commands that are killed at random moments, or told to end: `scripts/crash`, in few runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraio.cli import main

SCRIPT = Path(__file__).parents[2] / "scripts/crash"


def crash(*words: str) -> dict[str, Any]:
    """What the script counted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["jobs"]
    assert {name: job["problems"] for name, job in found.items() if job["problems"]} == {}
    assert done.returncode == 0, done.stderr
    return found


def test_a_command_that_is_killed_at_any_moment_leaves_the_old_output_or_the_new() -> None:
    found = crash("--count", "8")
    assert {name.split()[0].rstrip(",") for name in found} == {"train", "convert", "merge"}
    for name, job in found.items():
        assert job["old"] + job["new"] + job["unfinished"] == 8, name
    assert sum(job["during"] for job in found.values()) > 5  # else it would have shown little


def test_every_command_that_is_told_to_end_at_any_moment_does_so_in_good_order() -> None:
    found = crash("--count", "2", "--signal", "TERM", "--twice")
    assert {name.split()[0].rstrip(",") for name in found} == set(main.commands)


def test_a_command_that_is_interrupted_at_any_moment_ends_in_good_order() -> None:
    found = crash("--count", "8", "--signal", "INT", "--only", "merge", "--only", "convert --to peft")
    assert set(found) == {"merge", "convert --to peft"}
