"""Options that several commands share, and the parameter types that click lacks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A finite number; whole ones stay integers, so that files keep what was written.

    Args:
        above: it must be larger than this.
        least: it must not be smaller than this.
        most: it must not be larger than this.
        below: it must be smaller than this.
    """

    name = "number"

    def __init__(
        self,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
        below: float | None = None,
    ) -> None:
        self.above = above
        self.least = least
        self.most = most
        self.below = below

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """An int where the text is one, else a float."""
        number = self._parse(value)
        if number is None or not abs(number) <= sys.float_info.max:
            self.fail(f"{value!r} is not a finite number", param, ctx)
        if self.above is not None and number <= self.above:
            self.fail(f"{value} is not above {self.above:g}", param, ctx)
        if self.least is not None and number < self.least:
            self.fail(f"{value} is below {self.least:g}", param, ctx)
        if self.most is not None and number > self.most:
            self.fail(f"{value} is above {self.most:g}", param, ctx)
        if self.below is not None and number >= self.below:
            self.fail(f"{value} is not below {self.below:g}", param, ctx)
        return number

    @staticmethod
    def _parse(value: Any) -> int | float | None:
        if isinstance(value, int | float):
            return value
        for cast in (int, float):
            try:
                return cast(value)
            except ValueError:
                continue
        return None


class Flags(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """Ones and zeros with commas between them."""

    name = "flags"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, ...]:
        """A tuple of bool, at least one of them true."""
        if isinstance(value, tuple):
            return value
        if re.fullmatch("[01](,[01])*", str(value)) and "1" in str(value):
            return tuple(flag == "1" for flag in str(value).split(","))
        self.fail(f"{value!r} is no list of flags such as 1,0,1", param, ctx)


class Digit(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A class number, or the word all."""

    name = "digit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """An int, or "all"."""
        if isinstance(value, int) or value == "all":
            return value  # type: ignore[no-any-return]  # click's values have no type
        if re.fullmatch("[0-9]{1,9}", str(value)):
            return int(value)
        self.fail(f"{value!r} is neither a class number nor 'all'", param, ctx)


class Words(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A list with commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The parts, without the spaces around them."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(",") if word.strip())
        if not words:
            self.fail(f"{value!r} names nothing", param, ctx)
        return words


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """Sizes with commas: 3,224,224."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes, each at least 1."""
        if isinstance(value, tuple):
            return value
        if not re.fullmatch("[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", str(value)):
            self.fail(f"{value!r} is not sizes with commas, such as 3,224,224", param, ctx)
        return tuple(map(int, str(value).split(",")))


class KeywordOptions(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object; duplicate keys, NaN and infinities are refused."""
        from loraio.errors import FormatError
        from loraio.files.strictjson import parse_json

        if isinstance(value, dict):
            return value
        try:
            parsed = parse_json(str(value), where="the option")
        except FormatError as error:
            self.fail(f"{value!r} is not a JSON object: {error.message}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not a JSON object such as {json.dumps({'num_classes': 10})}", param, ctx)
        return parsed


def example(line: str) -> str:
    """The end of a command's help: one line that works."""
    return f"\b\nExample:\n  {line}"


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
strength_option = click.option(
    "--strength", type=Number(), default=1.0, show_default=True, help="Multiplies the adapter's scale."
)
mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Go on where the base's values or dtypes are not those the adapter was trained on.",
)
alpha_option = click.option(
    "--alpha",
    type=Number(),
    default=None,
    help="Alpha of every layer, where an adapter of another tool does not say it.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="INTEGER", default=1, show_default=True, help="Random seed."
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images in a batch."
)
lr_option = click.option(
    "--lr", type=Number(above=0), default=1e-3, show_default=True, help="Adam's learning rate, above 0."
)


def _own_code(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Let ``--model package.module:callable`` find modules of the current folder, while the command runs."""
    here = str(Path.cwd())
    if value is not None and ":" in value and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        ctx.call_on_close(lambda: sys.path.remove(here))
    return value


def network_options(*, default: str | None = None, text: str) -> Callable[[Command], Command]:
    """``--model`` and ``--model-args``."""
    model = click.option(
        "--model", default=default, show_default=default is not None, metavar="NAME", callback=_own_code, help=text
    )
    args = click.option(
        "--model-args",
        type=KeywordOptions(),
        default=None,
        metavar="JSON",
        help="Keyword options of the network, as a JSON object: '{\"num_classes\": 10}'.",
    )
    return lambda command: model(args(command))


model_option = network_options(
    text="The base's network, where its file does not state it: digit-cnn, torchvision:NAME, timm:NAME or "
    "package.module:callable."
)
data_root_option = click.option(
    "--data-root",
    type=click.Path(file_okay=False),
    default=None,
    help="Folder of the torchvision data sets.  [default: $LORAIO_DATA, else the user's cache folder]",
)


def dataset_option(*, default: str | None = "mnist", text: str = "Data set by name.") -> Callable[[Command], Command]:
    """``--dataset``; the name is looked up in the registry, which answers an unknown one."""
    return click.option("--dataset", default=default, show_default=default is not None, metavar="NAME", help=text)
