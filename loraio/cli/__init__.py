"""The command line. Every command parses, calls the library and prints; none imports torch before it has to."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

import loraio
from loraio.cli import (
    _output,
    _signals,
    check,
    convert,
    evaluate,
    export,
    inspect,
    merge,
    pack,
    predict,
    pretrain,
    targets,
    train,
    unmerge,
    unpack,
    verify,
)
from loraio.errors import LoraioError


class Program(click.Group):
    """The group: turns errors into text or JSON on stderr and into exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit: 0 done, 1 failed, 2 wrong command line, 3 a check says no.

        A signal that ends programs leads to an orderly end, with the exit code of shells, 128 + its number: nothing is
        left half written, and no temporary file.
        """
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        as_json, debug = "--json" in options, "--debug" in options
        if isinstance(sys.stdout, io.TextIOWrapper):  # names that its encoding lacks: as stderr has them
            sys.stdout.reconfigure(errors="backslashreplace")
        signals = _signals.Signals()
        try:
            try:
                with signals.obeyed(to_the_end=args is None):
                    code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            finally:
                if signals.number is not None:  # whatever became of the exception on its way
                    raise click.Abort
        except click.UsageError as error:
            if as_json:
                _print_error(type(error).__name__, error.format_message(), "loraio COMMAND --help")
            else:
                said = io.StringIO()
                error.show(said)
                for text in said.getvalue().splitlines():
                    _output.note(text)
            code = error.exit_code
        except click.Abort:
            if as_json:
                _print_error("Interrupted", signals.word, None)
            else:
                _output.note(signals.word)
            code = signals.code
        except LoraioError as error:
            if debug:
                raise
            if as_json:
                message = "\n".join([error.message, *error.problems])
                _print_error(type(error).__name__, message, error.hint, where=error.where)
            else:
                _output.failure(error)
            code = 1
        except Exception as error:  # a bug, or a stream that cannot be written to
            if not as_json or debug:
                raise
            _print_error(type(error).__name__, str(error), "--debug shows the traceback")
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *words: Any, **extra: Any) -> click.Context:
        """As click's, which would print an empty line at an interrupt."""
        with _as_abort():
            return super().make_context(*words, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, which would print an empty line at an interrupt."""
        with _as_abort():
            return super().invoke(ctx)


@contextlib.contextmanager
def _as_abort() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise click.Abort from error


def _print_error(name: str, message: str, hint: str | None, where: str | None = None) -> None:
    _output.note(json.dumps({"error": name, "message": message, "where": where, "hint": hint}))


EXAMPLE = """\b
Example, with no download:
  loraio pretrain -o base.safetensors --dataset digits --epochs 20
  loraio train base.safetensors --digit 3 -o three.safetensors --dataset digits
  loraio evaluate base.safetensors --adapter three.safetensors --dataset digits
"""


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLE)
@click.version_option(loraio.__version__, prog_name="loraio")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """LoRA adapters for PyTorch CNNs: train, check, swap and merge them, and prove every step."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


for _command in (
    pretrain.pretrain,
    targets.targets,
    train.train,
    evaluate.evaluate,
    predict.predict,
    inspect.inspect,
    check.check,
    convert.convert,
    pack.pack,
    unpack.unpack,
    merge.merge,
    unmerge.unmerge,
    verify.verify,
    export.export,
):
    main.add_command(_command)
