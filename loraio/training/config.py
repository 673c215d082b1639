"""What a training run is told: one frozen dataclass for adapters, one for base models."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraio.adapter import SCALE_RULES
from loraio.errors import ConfigError
from loraio.kinds import KINDS
from loraio.kinds.lora import INITS
from loraio.registry import lookup

MAX_SEED = 2**32 - 1
"""Largest seed; torch would take more, NumPy and others would not."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Share of the learning rate that is used when ``done`` of the run, 0 to 1, lies behind (cosine: Loshchilov and
Hutter 2017, SGDR, arXiv:1608.03983, without restarts)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How an adapter is trained.

    Attributes:
        digit: the class to adapt to; None draws all classes as they come.
        rank: r of every target, at least 1.
        alpha: scale is alpha / r; None takes the rank, so that the scale is 1.
        targets: words (conv, linear, all) and globs that select weights.
        focus: share of each batch drawn from the digit, above 0 to 1; the rest is drawn evenly from the others. At 1
            the adapter learns to answer the digit always.
        steps: optimizer steps; None for one pass over as many images as the data set has.
        lr: Adam's learning rate, at its highest.
        schedule: how it goes down over the run, a name in `SCHEDULES`.
        batch_size: images in a batch.
        init: start distribution of lora_A, a name in `loraio.kinds.lora.INITS`.
        seed: of the factors and of the batches.
        kind: adapter kind, a name in `loraio.kinds.KINDS`.
        scale_rule: "alpha/r", or "alpha/sqrt(r)" for rank-stabilised LoRA.

    Raises:
        ConfigError: a value is out of range.
        UnknownNameError: no such init, kind or scale rule.
    """

    digit: int | None = None
    rank: int = 4
    alpha: int | float | None = None
    targets: tuple[str, ...] = ("conv",)
    focus: float = 0.5
    steps: int | None = None
    lr: float = 1e-3
    schedule: str = "constant"
    batch_size: int = 64
    init: str = "kaiming"
    seed: int = 1
    kind: str = "lora"
    scale_rule: str = "alpha/r"

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets:  # a string would fall apart into its letters
            raise ConfigError(f"targets is {self.targets!r}, it must be a tuple of words and globs")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.digit is not None:
            check_at_least(0, digit=self.digit)
        check_at_least(1, rank=self.rank, batch_size=self.batch_size)
        check_seed(self.seed)
        if self.steps is not None:
            check_at_least(1, steps=self.steps)
        if self.alpha is not None:
            check_positive(alpha=self.alpha)
        check_positive(focus=self.focus, lr=self.lr)
        if self.focus > 1:
            raise ConfigError(f"focus is {self.focus!r}, it must be above 0 and at most 1")
        lookup(SCHEDULES, self.schedule, what="schedule")
        lookup(INITS, self.init, what="initialisation")
        lookup(KINDS, self.kind, what="adapter kind")
        lookup(SCALE_RULES, self.scale_rule, what="scale rule")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """How a base model is trained.

    Attributes:
        epochs: passes over the data set.
        batch_size: images in a batch; the last of an epoch may be smaller.
        lr: Adam's learning rate.
        seed: of the start weights and of the order of the images.

    Raises:
        ConfigError: a value is out of range.
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        check_seed(self.seed)
        check_positive(lr=self.lr)


def check_at_least(least: int, **settings: Any) -> None:
    """Refuse settings that are not whole numbers of at least ``least``.

    Raises:
        ConfigError: naming the first such setting.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is {value!r}, it must be a whole number of at least {least}")


def check_positive(**settings: Any) -> None:
    """Refuse settings that are not finite numbers above 0.

    Raises:
        ConfigError: naming the first such setting.
    """
    for name, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:  # not math.isfinite: it fails on huge integers
            raise ConfigError(f"{name} is {value!r}, it must be a finite number above 0")


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a whole number from 0 to `MAX_SEED`.

    Raises:
        ConfigError: it is not.
    """
    check_at_least(0, seed=seed)
    if seed > MAX_SEED:
        raise ConfigError(f"seed is {seed}, it must be at most {MAX_SEED}")
