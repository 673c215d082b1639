"""Run the commands in process, with stdout and stderr apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result
from running import Run, RunJson

from loraio.cli import main


@pytest.fixture
def run() -> Run:
    """Run a command line and return the result; a traceback is never a result."""

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
    """Run a command line with ``--json`` and return the one object on stdout, or on stderr if the command fails."""

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
