"""Define the options of a training run, in the order of the help, and their parameter types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from loraio.adapter.kinds import KINDS
from loraio.cli import _options
from loraio.cli._options import Count, Number, Parsed, together


def per_target(read: Callable[[str], Any]) -> Parsed:
    """Return the type of NUMBER or PATTERN=NUMBER; its values are (pattern or None, number)."""

    def parse(text: str) -> tuple[str | None, Any]:
        pattern, equals, number = text.rpartition("=")
        if equals and not pattern:
            raise ValueError(f"{text!r} has nothing before the '='")
        return pattern or None, read(number)

    return Parsed("number", parse)


def rank(text: str) -> int:
    """Read a whole number of at least 1."""
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise ValueError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def head(text: str) -> tuple[str, int]:
    """Read NAME=CLASSES: a layer's name and its number of outputs."""
    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal() or not int(number):
        raise ValueError(f"{text!r} is not NAME=CLASSES, such as fc=10")
    return name, int(number)


def plain_and_patterns(values: tuple[tuple[str | None, Any], ...]) -> tuple[Any, dict[str, Any]]:
    """Return the last plain number, or None, and the patterns in the order in which they count.

    >>> plain_and_patterns(((None, 4), ("conv1", 2), (None, 8)))
    (8, {'conv1': 2})
    """
    plain: Any = None
    patterns: dict[str, Any] = {}
    for pattern, value in values:
        if pattern is None:
            plain = value
        else:
            patterns.pop(pattern, None)  # a repeated pattern counts from its last place
            patterns[pattern] = value
    return plain, patterns


_POSITIVE = Count(min=1)

target_options = together(
    click.option(
        "--rank",
        "ranks",
        type=per_target(rank),
        metavar="N|PATTERN=N",
        multiple=True,
        help="Inner size of the factors, r; repeatable, the last pattern that matches counts.  [default: 4]",
    ),
    click.option(
        "--alpha",
        "alphas",
        type=per_target(Number(above=0).read),
        metavar="X|PATTERN=X",
        multiple=True,
        help="The scale is alpha / r; above 0; patterns as for --rank.  [default: the rank]",
    ),
    click.option("--clamp-rank", is_flag=True, help="Reduce the rank to the largest that a weight allows."),
    click.option(
        "--targets",
        type=Parsed("list", _options.words),
        default="conv",
        help="Weights to adapt, with commas: conv, linear, embedding, all, class names, globs such as 'conv[12]', or "
        "re:EXPRESSION.",
    ),
    click.option(
        "--exclude", type=Parsed("list", _options.words), default=(), help="Weights to skip; patterns as for --targets."
    ),
    click.option(
        "--head",
        "heads",
        type=Parsed("head", head),
        metavar="NAME=CLASSES",
        multiple=True,
        help="Replace this layer by a fresh one with so many outputs and train it whole; repeatable.",
    ),
    click.option(
        "--norm",
        default="frozen",
        metavar="PART",
        help="Part of the normalisation layers that adapts: none (frozen), the running statistics (stats), or also "
        "weights and biases (affine).",
    ),
    click.option("--kind", default="lora", metavar="NAME", help=f"Adapter kind: {', '.join(KINDS)}."),
    click.option(
        "--scale-rule", default="alpha/r", metavar="RULE", help="alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA."
    ),
)

course_options = together(
    click.option(
        "--focus",
        type=Number(above=0, most=1),
        default=0.5,
        help="Share of each batch drawn from the class, above 0 to 1; 1 teaches to always answer it.",
    ),
    click.option("--steps", type=_POSITIVE, default=None, help="Optimizer steps.  [default: one pass over the data]"),
    _options.lr_option,
    click.option("--schedule", default="constant", metavar="NAME", help="Learning rate: constant or cosine."),
    click.option("--warmup", type=Count(min=0), default=0, help="Steps in which the learning rate rises to --lr."),
    click.option("--weight-decay", type=Number(least=0), default=0, help="AdamW's decay of the factors; 0 is Adam."),
    click.option(
        "--lora-plus",
        type=Number(above=0),
        metavar="RATIO",
        default=1,
        help="Learning rate of lora_B as a multiple of --lr (LoRA+).",
    ),
    click.option(
        "--clip-norm", type=Number(above=0), default=None, help="Scale gradients down to this norm.  [default: never]"
    ),
    _options.batch_size_option,
    click.option("--accumulate", type=_POSITIVE, default=1, help="Batches whose gradients are averaged for one step."),
    click.option(
        "--val-share",
        type=Number(least=0, below=1),
        default=0,
        help="Share of each class held out of training for validation, from 0 to below 1.",
    ),
    click.option("--val-every", type=_POSITIVE, default=100, help="Steps between two validations."),
    click.option(
        "--patience",
        type=_POSITIVE,
        default=None,
        help="Stop after so many validations without a smaller loss, with the best factors.  [default: never]",
    ),
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
        help="Device to train on: cpu, cuda, cuda:N, or auto for a GPU if there is one.  [default: cpu]",
    ),
    click.option("--compile", is_flag=True, help="Train through torch.compile; needs a C++ compiler."),
    click.option("--init", default="kaiming", metavar="NAME", help="Start values of A: kaiming or gaussian."),
    _options.seed_option,
)

file_options = together(
    click.option(
        "--log",
        type=click.Path(dir_okay=False),
        default=None,
        help="File for loss (nats), learning rate and validation of each step: .csv or .jsonl.",
    ),
    click.option(
        "--tensorboard", type=click.Path(file_okay=False), default=None, help="Folder for TensorBoard's event files."
    ),
    click.option(
        "--checkpoint",
        type=click.Path(dir_okay=False),
        default=None,
        help="Side file from which --resume continues; the adapter does not need it.",
    ),
    click.option("--checkpoint-every", type=_POSITIVE, default=200, help="Steps between two writes of the side file."),
    click.option("--resume", is_flag=True, help="Continue from the side file; the other options must be the same."),
)

image_options = together(
    _options.dataset_option(text="Name of the data set, or imagefolder:PATH for images in folders of classes."),
    _options.data_root_option,
    click.option(
        "--image-size",
        type=_POSITIVE,
        default=None,
        help="Height and width of an image folder's images, in pixels.  [default: the network's, else their own]",
    ),
    click.option("--workers", type=Count(min=0), default=0, help="Processes that decode images."),
    click.option(
        "--data-limit", type=Number(above=0), metavar="GIB", default=4, help="Memory limit of an image folder, in GiB."
    ),
)


def config_of(settings: dict[str, Any]) -> Any:
    """Return the `loraio.TrainConfig` of the options; ``ranks``, ``alphas`` and ``heads`` are split."""
    import loraio

    rest = dict(settings)
    rank, rank_pattern = plain_and_patterns(rest.pop("ranks"))
    alpha, alpha_pattern = plain_and_patterns(rest.pop("alphas"))
    if rank is not None:
        rest["rank"] = rank
    rest["heads"] = dict(rest["heads"])
    return loraio.TrainConfig(alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, **rest)
