"""The options of a training run, in the order in which help shows them, and the parameter types that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loraio.cli import _options
from loraio.cli._options import Command, Number


class PerTarget(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A number for all targets, or PATTERN=NUMBER for those that the pattern matches.

    Args:
        whole: only whole numbers.
    """

    name = "number"

    def __init__(self, *, whole: bool) -> None:
        self.number: click.ParamType = click.IntRange(min=1) if whole else Number(above=0)  # type: ignore[type-arg]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(pattern or None, number)."""
        if isinstance(value, tuple):
            return value
        pattern, equals, number = str(value).rpartition("=")
        if equals and not pattern:
            self.fail(f"{value!r} has nothing before the '='", param, ctx)
        return pattern or None, self.number.convert(number, param, ctx)


class Head(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """NAME=CLASSES."""

    name = "head"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """(layer name, number of outputs)."""
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).rpartition("=")
        if not name or not number.isdecimal() or not int(number):
            self.fail(f"{value!r} is not NAME=CLASSES, such as fc=10", param, ctx)
        return name, int(number)


def per_target(values: tuple[tuple[str | None, Any], ...]) -> tuple[Any, dict[str, Any]]:
    """The last plain number, or None, and the patterns in the order in which they count.

    >>> per_target(((None, 4), ("conv1", 2), (None, 8)))
    (8, {'conv1': 2})
    """
    plain: Any = None
    patterns: dict[str, Any] = {}
    for pattern, value in values:
        if pattern is None:
            plain = value
        else:
            patterns.pop(pattern, None)  # said again it counts from its new place on
            patterns[pattern] = value
    return plain, patterns


_TARGETS = (
    click.option(
        "--rank",
        "ranks",
        type=PerTarget(whole=True),
        metavar="N|PATTERN=N",
        multiple=True,
        help="Inner size of the factors, r; may be repeated, the last pattern that matches counts.  [default: 4]",
    ),
    click.option(
        "--alpha",
        "alphas",
        type=PerTarget(whole=False),
        metavar="X|PATTERN=X",
        multiple=True,
        help="Above 0; scale is alpha / r; with patterns as for --rank.  [default: the rank]",
    ),
    click.option("--clamp-rank", is_flag=True, help="Where a weight allows no such rank take the largest it allows."),
    click.option(
        "--targets",
        type=_options.Words(),
        default="conv",
        show_default=True,
        help="Weights to adapt, with commas: conv, linear, embedding, all, class names, globs such as 'conv[12]', or "
        "re:EXPRESSION.",
    ),
    click.option(
        "--exclude", type=_options.Words(), default=(), help="Weights to leave as they are; patterns as for --targets."
    ),
    click.option(
        "--head",
        "heads",
        type=Head(),
        metavar="NAME=CLASSES",
        multiple=True,
        help="Replace this layer by a fresh one with that many outputs and train it whole; may be repeated.",
    ),
    click.option(
        "--norm",
        default="frozen",
        show_default=True,
        metavar="WHAT",
        help="What of normalisation layers adapts: nothing (frozen), their running statistics (stats), or these and "
        "their weights and biases (affine).",
    ),
    click.option("--kind", default="lora", show_default=True, metavar="NAME", help="Adapter kind: lora or dora."),
    click.option(
        "--scale-rule",
        default="alpha/r",
        show_default=True,
        metavar="RULE",
        help="alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA.",
    ),
)

_COURSE = (
    click.option(
        "--focus",
        type=Number(above=0, most=1),
        default=0.5,
        show_default=True,
        help="Share of each batch drawn from the class, above 0 to 1; 1 teaches to answer it always.",
    ),
    click.option(
        "--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps.  [default: one pass over the data]"
    ),
    _options.lr_option,
    click.option(
        "--schedule",
        default="constant",
        show_default=True,
        metavar="NAME",
        help="How the learning rate goes down: constant or cosine.",
    ),
    click.option(
        "--warmup",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Steps at the start in which the learning rate rises.",
    ),
    click.option(
        "--weight-decay",
        type=Number(least=0),
        default=0,
        show_default=True,
        help="AdamW's decoupled weight decay of the factors; 0 is plain Adam.",
    ),
    click.option(
        "--lora-plus",
        type=Number(above=0),
        metavar="RATIO",
        default=1,
        show_default=True,
        help="Learning rate of lora_B as a multiple of --lr (LoRA+).",
    ),
    click.option(
        "--clip-norm",
        type=Number(above=0),
        default=None,
        help="Scale all gradients together down to this norm.  [default: as they are]",
    ),
    _options.batch_size_option,
    click.option(
        "--accumulate",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Batches whose gradients are averaged for one step.",
    ),
    click.option(
        "--val-share",
        type=Number(least=0, below=1),
        default=0,
        show_default=True,
        help="Share of each class of the training images held out for validation, 0 to below 1.",
    ),
    click.option(
        "--val-every",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="Steps between two validations.",
    ),
    click.option(
        "--patience",
        type=click.IntRange(min=1),
        default=None,
        help="Validations in a row without a smaller loss after which to stop; the best factors are kept.  "
        "[default: to the end]",
    ),
)

_MACHINE = (
    click.option(
        "--amp",
        type=click.Choice(["bf16", "fp16"]),
        default=None,
        help="Mixed precision; fp16 needs CUDA.  [default: the base's own dtype]",
    ),
    click.option(
        "--device",
        default=None,
        metavar="NAME",
        help="Where to train: cpu, cuda, cuda:N, or auto for a GPU where there is one.  [default: cpu]",
    ),
    click.option("--compile", is_flag=True, help="Train through torch.compile; needs a C++ compiler."),
    click.option(
        "--init", default="kaiming", show_default=True, metavar="NAME", help="Start of A: kaiming or gaussian."
    ),
    _options.seed_option,
)

_FILES = (
    click.option(
        "--log",
        type=click.Path(dir_okay=False),
        default=None,
        help="Write loss (nats), learning rate and validation of every step, as .csv or .jsonl.",
    ),
    click.option(
        "--tensorboard", type=click.Path(file_okay=False), default=None, help="Folder for TensorBoard's event files."
    ),
    click.option(
        "--checkpoint",
        type=click.Path(dir_okay=False),
        default=None,
        help="Side file that the run can be resumed from; the adapter does not need it.",
    ),
    click.option(
        "--checkpoint-every",
        type=click.IntRange(min=1),
        default=200,
        show_default=True,
        help="Steps between two writes of the side file.",
    ),
    click.option("--resume", is_flag=True, help="Go on from the side file; the other options must be the same."),
)

_IMAGES = (
    _options.dataset_option(text="Data set by name, or imagefolder:PATH for images in folders of classes."),
    _options.data_root_option,
    click.option(
        "--image-size",
        type=click.IntRange(min=1),
        default=None,
        help="Height and width of an image folder's images, in pixels.  [default: the network's, else their own]",
    ),
    click.option(
        "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images."
    ),
    click.option(
        "--data-limit",
        type=Number(above=0),
        metavar="GIB",
        default=4,
        show_default=True,
        help="Most memory for an image folder's images, in GiB.",
    ),
)


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


target_options = _together(*_TARGETS)
course_options = _together(*_COURSE, *_MACHINE)
file_options = _together(*_FILES)
image_options = _together(*_IMAGES)


def config_of(settings: dict[str, Any]) -> Any:
    """The `loraio.TrainConfig` of what the options gave; ``ranks``, ``alphas`` and ``heads`` are taken apart."""
    import loraio

    rest = dict(settings)
    rank, rank_pattern = per_target(rest.pop("ranks"))
    alpha, alpha_pattern = per_target(rest.pop("alphas"))
    if rank is not None:
        rest["rank"] = rank
    rest["heads"] = dict(rest["heads"])
    return loraio.TrainConfig(alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, **rest)


def read_images(network: Any, dataset: str, split: str, images: dict[str, Any]) -> Any:
    """The `loraio.Dataset` that the image options name, in the form that the network takes."""
    import loraio

    size = images["image_size"]
    return loraio.load_dataset(
        dataset,
        split,
        root=images["data_root"],
        form=loraio.image_form(network, size=size),
        workers=images["workers"],
        max_bytes=int(images["data_limit"] * 2**30),
    )
