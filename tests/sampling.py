"""Draw samples from grids that are too large for every run, by a seed that changes with each commit.

``scripts/test`` runs the sample, ``scripts/test --all`` the whole grid. ``LORAIO_TEST_SEED=WORD`` draws the sample of
another seed; the header of each run and the report of a failed test name the seed.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest

Item = TypeVar("Item")


def _seed() -> str:
    """Return the seed of the environment, else the commit's hash, else the same word each time."""
    if word := os.environ.get("LORAIO_TEST_SEED"):
        return word
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no-commit"


SEED = _seed()

AGAIN = f"LORAIO_TEST_SEED={SEED} scripts/test draws the same samples again"

LEFT_OUT = "left out"
"""The property of a test that names a case which torch itself computes wrongly on this machine."""


def sample(items: Iterable[Item], most: int, *, key: object) -> list[Item]:
    """Return at most so many of the items, in their order, by the seed and a key of the caller."""
    whole = list(items)
    chosen = random.Random(f"{SEED} {key}").sample(range(len(whole)), min(most, len(whole)))
    return [whole[place] for place in sorted(chosen)]


def sampled_or_all(most: int) -> list[Any]:
    """Return two values of a parameter, for the usual run and the slow one: so many cases, and None for all."""
    return [
        pytest.param(most, marks=pytest.mark.sampled, id="sample"),
        pytest.param(None, marks=pytest.mark.slow, id="all"),
    ]
