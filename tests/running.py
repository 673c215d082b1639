"""Types of the fixtures that run command lines, and the words of a command line with files in it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def words(line: str, **files: Path) -> list[str]:
    """Split a command line, and put files in the place of upper-case words: ``BASE`` for ``base=``."""
    return [str(files.get(word.lower(), word)) if word.isupper() else word for word in shlex.split(line)]


def python(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with real streams."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
