"""Define the options that several commands share, and the parameter types that click lacks."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

FAILED = 3
"""Exit code if a check ran and says no, or a conversion would lose something."""

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A value that a function reads from the text.

    Args:
        name: the word for the value in the help.
        read: returns the value, or raises a ValueError that says what is wrong.
    """

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text; a default that is no text stays as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


BOUNDS = {
    "above": (operator.gt, "is not above"),
    "least": (operator.ge, "is below"),
    "most": (operator.le, "is above"),
    "below": (operator.lt, "is not below"),
}
"""Bounds of a number: the comparison that must hold, and the words if it does not."""


class Number(Parsed):
    """A finite number; whole ones stay integers, so that files keep what was written.

    Args:
        bounds: by a name in `BOUNDS`.
    """

    def __init__(self, **bounds: float) -> None:
        super().__init__("number", self._read)
        self.bounds = bounds

    def _read(self, text: str) -> int | float:
        number = finite_number(text)
        for name, bound in self.bounds.items():
            holds, words = BOUNDS[name]
            if not holds(number, bound):
                raise ValueError(f"{text} {words} {bound:g}")
        return number


def finite_number(text: str) -> int | float:
    """Read a finite number: an int if the text is one, else a float."""
    number: int | float
    try:
        number = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{text!r} is not a finite number")
    return number


class Count(click.IntRange):
    """A whole number, called N in the help."""

    name = "n"


def flags(text: str) -> tuple[bool, ...]:
    """Read ones and zeros, separated by commas, at least one of them a one."""
    if not re.fullmatch("[01](,[01])*", text) or "1" not in text:
        raise ValueError(f"{text!r} is no list of flags such as 1,0,1")
    return tuple(flag == "1" for flag in text.split(","))


def digit(text: str) -> int | str:
    """Read a class number, or the word all."""
    if text != "all" and not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is neither a class number nor 'all'")
    return text if text == "all" else int(text)


def words(text: str) -> tuple[str, ...]:
    """Read a list with commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise ValueError(f"{text!r} names nothing")
    return found


def shape(text: str) -> tuple[int, ...]:
    """Read sizes with commas, each at least 1."""
    if not re.fullmatch("[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise ValueError(f"{text!r} is not sizes with commas, such as 3,224,224")
    return tuple(map(int, text.split(",")))


def keyword_arguments(text: str) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, NaN and infinities are refused."""
    from loraio.errors import FormatError
    from loraio.files.strictjson import parse_json

    try:
        parsed = parse_json(text, where="the option")
    except FormatError as error:
        raise ValueError(f"{text!r} is not a JSON object: {error.message}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{text!r} is not a JSON object such as {json.dumps({'num_classes': 10})}")
    return parsed


def say_no() -> NoReturn:
    """Exit with `FAILED`."""
    click.get_current_context().exit(FAILED)


def example(line: str) -> str:
    """Return the end of a command's help: one line that works."""
    return f"\b\nExample:\n  {line}"


def together(*options: Decorator[Any]) -> Decorator[Any]:
    """Return one decorator for several options, which the help lists in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
strength_option = click.option("--strength", type=Number(), default=1.0, help="Multiply the adapter's scale by this.")
mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Continue if the base's values or dtypes differ from those that the adapter was trained on.",
)
alpha_option = click.option(
    "--alpha", type=Number(), default=None, help="Alpha of every layer, if another tool's adapter does not state it."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="INTEGER", default=1, help="Random seed."
)
batch_size_option = click.option("--batch-size", type=Count(min=1), default=64, help="Images in a batch.")
lr_option = click.option("--lr", type=Number(above=0), default=1e-3, help="Learning rate of Adam, above 0.")
workers_option = click.option(
    "--workers",
    type=Count(min=1),
    default=None,
    help="Number of threads.  [default: one for each processor, at most 4]",
)
data_root_option = click.option(
    "--data-root",
    type=click.Path(file_okay=False),
    default=None,
    help="Folder of torchvision's data sets.  [default: $LORAIO_DATA, else the user's cache folder]",
)


def _own_code(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Let ``--model package.module:callable`` find modules of the current folder, while the command runs."""
    here = str(Path.cwd())
    if value is not None and ":" in value and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        ctx.call_on_close(lambda: sys.path.remove(here))
    return value


def network_options(*, default: str | None = None, text: str) -> Decorator[Any]:
    """Return ``--model`` and ``--model-args``."""
    args = click.option(
        "--model-args",
        type=Parsed("json", keyword_arguments),
        default=None,
        metavar="JSON",
        help="Keyword arguments of the network, as a JSON object: '{\"num_classes\": 10}'.",
    )
    return together(click.option("--model", default=default, metavar="NAME", callback=_own_code, help=text), args)


model_option = network_options(
    text="Network of the base, if its file does not name it: digit-cnn, torchvision:NAME, timm:NAME or "
    "package.module:callable."
)
adapter_options = together(strength_option, mismatch_option, alpha_option, model_option)
"""The options of a command that puts an adapter onto a base."""


def dataset_option(*, default: str | None = "mnist", text: str = "Name of the data set.") -> Decorator[Any]:
    """Return ``--dataset``; the registry answers an unknown name with the nearest one."""
    return click.option("--dataset", default=default, metavar="NAME", help=text)
