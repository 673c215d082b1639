"""Options that several commands share, and the parameter types that click lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A finite number; whole ones stay integers, so that files keep what was written."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """An int where the text is one, else a float."""
        if isinstance(value, int | float):
            return value
        for cast in (int, float):
            try:
                return cast(value)
            except ValueError:
                continue
        self.fail(f"{value!r} is not a number", param, ctx)


class Digit(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A class number, or the word all."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """An int, or "all"."""
        if isinstance(value, int):
            return value
        if value == "all":
            return "all"
        if str(value).isdecimal():
            return int(value)
        self.fail(f"{value!r} is neither a class number nor 'all'", param, ctx)


class Words(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A list with commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The parts, without the spaces around them."""
        if isinstance(value, tuple):
            return value
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


def _remember_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        ctx.find_root().meta["loraio.json"] = True  # errors are printed as JSON too
    return value


json_option = click.option(
    "--json", "as_json", is_flag=True, is_eager=True, callback=_remember_json, help="Print one JSON object on stdout."
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
strength_option = click.option(
    "--strength", type=float, default=1.0, show_default=True, help="Multiplies the adapter's scale."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Random seed.")
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images in a batch."
)
lr_option = click.option("--lr", type=float, default=1e-3, show_default=True, help="Adam's learning rate.")
model_option = click.option(
    "--model", default=None, metavar="NAME", help="The base's network, where its file does not state it."
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
