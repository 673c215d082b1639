"""Settings of a training run: one frozen dataclass for adapters, one for base models."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from loraio.adapter.kinds import KINDS
from loraio.adapter.kinds.lora import INITS
from loraio.adapter.metadata import SCALE_RULES
from loraio.errors import ConfigError
from loraio.registry import lookup

MAX_SEED = 2**32 - 1
"""Largest seed. Torch would take more, NumPy and others would not."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Map the done share of a run, 0 to 1, to the share of the learning rate that the next step uses.

The cosine is that of Loshchilov and Hutter 2017, SGDR, arXiv:1608.03983, without restarts.
"""

NORMS = ("frozen", "stats", "affine")
"""Normalisation layers adapt nothing, their running statistics, or these and their weights and biases."""

AMP = ("bf16", "fp16")
"""Number formats of mixed precision."""

_COUNTS = ("rank", "batch_size", "accumulate", "val_every", "steps", "patience")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings for training an adapter.

    Attributes:
        digit: number of the class to adapt to; None draws all classes as they come.
        rank: r of every target, at least 1.
        alpha: the scale is alpha / r; None takes the rank, for a scale of 1.
        rank_pattern: rank by pattern, for some targets; patterns as in ``targets``. The last match wins.
        alpha_pattern: alpha by pattern, in the same way.
        clamp_rank: where a weight allows less than ``rank``, use the largest rank that it allows; alpha is not changed.
        targets: weights to adapt: words (conv, linear, all), class names, globs and ``re:`` expressions.
        exclude: patterns of weights to leave alone.
        heads: layers to replace by fresh ones, as name to number of outputs: ``{"fc": 10}``. Their whole tensors are
            trained and stored in the adapter.
        norm: how normalisation layers adapt, a name in `NORMS`; their tensors are then stored in the adapter too.
        focus: share of each batch drawn from the digit, above 0 to 1; the rest is drawn evenly from other classes. At
            1 the adapter learns to answer the digit always.
        steps: optimizer steps; None for one pass over as many images as the data set has.
        lr: highest learning rate of Adam.
        schedule: decay of the learning rate over the run, a name in `SCHEDULES`.
        warmup: first steps, in which the learning rate rises from nearly 0; the schedule covers the rest.
        weight_decay: decoupled decay of AdamW, on all factors of two dimensions or more; 0 is plain Adam.
        lora_plus: learning rate of lora_B as a multiple of the others' (Hayou et al. 2024, LoRA+, arXiv:2402.12354).
        clip_norm: largest joint norm of all gradients; larger ones are scaled down to it. None does not clip.
        batch_size: images in a batch.
        accumulate: batches for one optimizer step; their gradients are averaged.
        val_share: share of each class that is held out for validation, 0 to below 1.
        val_every: steps between two validations; one more follows the last step.
        patience: stop after this many validations in a row without a smaller loss. The adapter then has the factors of
            the smallest loss, also where the run was not stopped. None trains to the end and takes the last factors.
        amp: mixed precision, a name in `AMP`; fp16 is for CUDA only. None computes in the model's own dtype.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one; None trains where the model is.
        compile: train through torch.compile.
        init: initial distribution of lora_A, a name in `loraio.adapter.kinds.lora.INITS`.
        seed: seed of the factors, the batches and the validation images.
        kind: adapter kind, a name in `loraio.adapter.kinds.KINDS`.
        scale_rule: "alpha/r", or "alpha/sqrt(r)" for rank-stabilised LoRA.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
        UnknownNameError: no such init, kind, schedule or scale rule.
    """

    digit: int | None = None
    rank: int = 4
    alpha: int | float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    clamp_rank: bool = False
    targets: tuple[str, ...] = ("conv",)
    exclude: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict, hash=False)
    norm: str = "frozen"
    focus: float = 0.5
    steps: int | None = None
    lr: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: int | float = 0
    lora_plus: int | float = 1
    clip_norm: int | float | None = None
    batch_size: int = 64
    accumulate: int = 1
    val_share: int | float = 0
    val_every: int = 100
    patience: int | None = None
    amp: str | None = None
    device: str | None = None
    compile: bool = False
    init: str = "kaiming"
    seed: int = 1
    kind: str = "lora"
    scale_rule: str = "alpha/r"

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str) or (name == "targets" and not value):  # a string would fall apart into letters
                raise ConfigError(f"{name} is {value!r}, it must be a tuple of words and globs")
            object.__setattr__(self, name, tuple(value))
        check_size = partial(check_at_least, 1)
        for name, check in (("rank_pattern", check_size), ("alpha_pattern", check_positive), ("heads", check_size)):
            object.__setattr__(self, name, dict(getattr(self, name)))
            check(**{f"{name}[{pattern!r}]": value for pattern, value in getattr(self, name).items()})
        optional = {entry.name for entry in fields(self) if entry.default is None}
        given = {name: value for name, value in self._values().items() if value is not None or name not in optional}
        for least, names in ((0, ("digit", "warmup")), (1, _COUNTS)):
            check_at_least(least, **{name: given[name] for name in names if name in given})
        check_positive(
            **{name: given[name] for name in ("alpha", "clip_norm", "focus", "lr", "lora_plus") if name in given}
        )
        check_seed(self.seed)
        if self.focus > 1:
            raise ConfigError(f"focus is {self.focus!r}, it must be above 0 and at most 1")
        for name in ("weight_decay", "val_share"):
            if given[name] != 0 or isinstance(given[name], bool):
                check_positive(**{name: given[name]})
        if self.val_share >= 1:
            raise ConfigError(f"val_share is {self.val_share!r}, it must be at least 0 and below 1")
        if self.patience is not None and not self.val_share:
            raise ConfigError("patience needs validation images", hint="--val-share 0.1, for example")
        for name in ("clamp_rank", "compile"):
            if not isinstance(given[name], bool):
                raise ConfigError(f"{name} is {given[name]!r}, it must be True or False")
        if self.device is not None and not (isinstance(self.device, str) and _DEVICE.fullmatch(self.device)):
            raise ConfigError(f"device is {self.device!r}, it must be cpu, cuda, cuda:N or auto")
        if self.amp is not None:
            lookup(dict.fromkeys(AMP), self.amp, what="mixed precision")
        lookup(dict.fromkeys(NORMS), self.norm, what="way with normalisation")
        lookup(SCHEDULES, self.schedule, what="schedule")
        lookup(INITS, self.init, what="initialisation")
        lookup(KINDS, self.kind, what="adapter kind")
        lookup(SCALE_RULES, self.scale_rule, what="scale rule")

    def _values(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings that a file records once, as plain JSON values.

        Digit, steps, seed and the settings of single targets are recorded elsewhere. Most settings at their defaults
        are left out, so that files stay small and new settings do not change old files.
        """
        always = ("init", "focus", "lr", "schedule", "batch_size", "targets")
        elsewhere = ("digit", "steps", "seed", "rank", "alpha", "kind", "scale_rule")
        default = TrainConfig()
        found: dict[str, Any] = {"optimizer": "adamw" if self.weight_decay else "adam"}
        for name, value in self._values().items():
            if name not in elsewhere and (name in always or value != getattr(default, name)):
                found[name] = list(value) if isinstance(value, tuple) else value
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Settings for training a base model.

    Attributes:
        epochs: passes over the data set.
        batch_size: images in a batch; the last batch of an epoch may be smaller.
        lr: learning rate of Adam.
        seed: seed of the initial weights and of the order of the images.

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
