"""Parse command lines, call the library, and print. No command imports torch before it has to."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click

import loraio
from loraio.cli import _output, _signals
from loraio.errors import LoraioError


class Failure(NamedTuple):
    """How a command failed: its answer as JSON, its text for people, and its exit code."""

    error: str
    message: str
    text: str
    hint: str | None = None
    where: str | None = None
    code: int = 1

    def print(self, *, as_json: bool) -> None:
        """Write the failure to stderr."""
        answer = {"error": self.error, "message": self.message, "where": self.where, "hint": self.hint}
        for line in [json.dumps(answer)] if as_json else self.text.rstrip("\n").split("\n"):
            _output.note(line)


def _wrong_command_line(error: click.UsageError, signals: _signals.Signals) -> Failure:
    said = io.StringIO()
    error.show(said)
    message, hint = error.format_message(), "loraio COMMAND --help"
    return Failure(type(error).__name__, message, said.getvalue(), hint=hint, code=error.exit_code)


def _stopped(error: click.Abort, signals: _signals.Signals) -> Failure:
    return Failure("Interrupted", signals.word, signals.word, code=signals.code)


def _failed(error: LoraioError, signals: _signals.Signals) -> Failure:
    name, message = type(error).__name__, "\n".join([error.message, *error.problems])
    return Failure(name, message, f"{name}: {error}", hint=error.hint, where=error.where)


def _bug(error: Exception, signals: _signals.Signals) -> Failure:
    return Failure(type(error).__name__, str(error), str(error), hint="--debug shows the traceback")


FAILURES: dict[type[Exception], Callable[[Any, _signals.Signals], Failure]] = {
    click.UsageError: _wrong_command_line,
    click.Abort: _stopped,
    LoraioError: _failed,
    Exception: _bug,
}
"""By the class of an exception; the first that fits counts."""


class Program(click.Group):
    """The group of all commands: turns errors into text or JSON on stderr, and into exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit: 0 done, 1 failed, 2 wrong command line, 3 a check says no.

        A signal that ends programs is obeyed in good order, with the exit code of shells, 128 + its number: nothing is
        left half written, and no temporary file.
        """
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        as_json, debug = "--json" in options, "--debug" in options
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names that its encoding lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        signals = _signals.Signals()
        try:
            try:
                with signals.obeyed(to_the_end=args is None):
                    code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            finally:
                if signals.number is not None:  # in place of any exception that the signal caused
                    raise click.Abort
        except Exception as error:
            kind = next(kind for kind in FAILURES if isinstance(error, kind))
            if (debug and kind in (LoraioError, Exception)) or (kind is Exception and not as_json):
                raise
            failure = FAILURES[kind](error, signals)
            failure.print(as_json=as_json)
            code = failure.code
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *words: Any, **extra: Any) -> click.Context:
        """Parse as click does, without the empty line that click prints at an interrupt."""
        with _as_abort():
            return super().make_context(*words, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run as click does, without the empty line that click prints at an interrupt."""
        with _as_abort():
            return super().invoke(ctx)


@contextlib.contextmanager
def _as_abort() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise click.Abort from error


EXAMPLE = """\b
Example, with no download:
  loraio pretrain -o base.safetensors --dataset digits --epochs 12
  loraio train base.safetensors --digit 1 -o one.safetensors --dataset digits
  loraio evaluate base.safetensors --adapter one.safetensors --dataset digits
"""


@click.group(
    cls=Program, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}, epilog=EXAMPLE
)
@click.version_option(loraio.__version__, prog_name="loraio")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """LoRA adapters for PyTorch CNNs: train, check, swap and merge them, and prove every step."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


COMMANDS = (
    "pretrain", "targets", "train", "evaluate", "predict", "inspect", "check",
    "convert", "pack", "unpack", "merge", "unmerge", "verify", "export",
)  # fmt: skip
"""Names of the commands; each is a function in the module of its name."""

for _name in COMMANDS:
    main.add_command(getattr(importlib.import_module(f"loraio.cli.{_name}"), _name))
