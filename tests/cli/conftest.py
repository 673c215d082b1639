"""How the tests of the commands run them: in process, with stdout and stderr apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loraio.cli import main

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


@pytest.fixture
def run() -> Run:
    """Runs a command line and returns the result; a traceback is never a result."""

    def invoke(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == code, result.output
        if code in (1, 2):
            assert result.stdout == ""
            assert result.stderr != ""
            assert "Traceback" not in result.stderr
        return result

    return invoke


@pytest.fixture
def run_json(run: Run) -> RunJson:
    """Runs a command line with ``--json``: the one object on stdout, on stderr when the command fails."""

    def invoke(*words: object, code: int = 0) -> dict[str, Any]:
        result = run(*words, "--json", code=code)
        failed = code in (1, 2)
        found = json.loads(result.stderr if failed else result.stdout)
        assert (result.stdout if failed else result.stderr) == ""
        if failed:
            assert found.keys() == {"error", "message", "where", "hint"}
        else:
            assert found["schema"] == f"loraio/{words[0]}/1"
        return found

    return invoke
