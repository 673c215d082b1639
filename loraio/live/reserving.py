"""Reserve the weights that later adapters may change while the model stays compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import Target
from loraio.bases.targets import refuse_shared, refuse_unusable, select_targets, target_modules
from loraio.errors import ConfigError, StateError
from loraio.files.tensors import dtype_code
from loraio.registry import lookup

Reserve = str | Adapter | Iterable[str | Adapter] | None
"""The weights that adapters may change while the model stays compiled: patterns, adapters, or both."""


def check_max_rank(max_rank: int | None, trainable: bool) -> int | None:
    """Return the largest rank, or raise ConfigError if it is no rank or nothing is trained."""
    if max_rank is None:
        return None
    if not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1:
        raise ConfigError(f"max_rank is {max_rank!r}, it must be a whole number of at least 1")
    if not trainable:
        raise ConfigError("max_rank is for adapters that are trained", hint="trainable=True, or reserve alone")
    return max_rank


def padded_forms(model: nn.Module, names: Iterable[str], max_rank: int) -> dict[str, Target]:
    """Return targets of the largest rank and a scale of 1, which stand for all that these weights can get."""
    modules = target_modules(model)
    return {
        name: Target(
            rank=max_rank,
            alpha=max_rank,
            shape=tuple(modules[name].weight.shape),
            dtype=dtype_code(modules[name].weight.dtype),
            layer=modules[name].layer.name,
            groups=modules[name].groups,
            base_sha256="0" * 64,  # of no weight in particular
        )
        for name in names
    }


def reserved_weights(
    model: nn.Module, adapter: Adapter, reserve: str | Adapter | Iterable[str | Adapter]
) -> tuple[str, ...]:
    """Return the reserved weights in the model's order; refuse those that it lacks and those that cannot be adapted."""
    modules = target_modules(model)
    wanted = [reserve] if isinstance(reserve, str | Adapter) else list(reserve)
    patterns = [each for each in wanted if isinstance(each, str)]
    names = {*adapter.targets, *(name for each in wanted if not isinstance(each, str) for name in each.targets)}
    if patterns:
        names.update(select_targets(model, patterns))
    for name in names - adapter.targets.keys():  # whose own are checked with it
        refuse_unusable(lookup(modules, name, what="target"))
    refuse_shared(model, names)
    return tuple(name for name in modules if name in names)


def check_reserved(adapter: Adapter, reserved: Sequence[str], max_rank: int | None) -> None:
    """Raise StateError if an adapter changes a tensor that is not reserved, or has a larger rank."""
    outside = [name for name in adapter.targets if name not in reserved]
    problems = [f"{name!r} is adapted and not reserved" for name in outside]
    problems += [f"{name!r} is replaced whole, which cannot be reserved" for name in adapter.whole]
    largest = max(target.rank for target in adapter.targets.values())
    if not problems and max_rank is not None and largest > max_rank:
        raise StateError(
            f"the adapter has rank {largest}, the attached model has a place for {max_rank}",
            hint=f"attach(.., max_rank={largest})",
        )
    if problems:
        raise StateError(
            "the adapter changes tensors for which the attached model has reserved no place",
            problems=problems,
            hint="detach, and attach without reserve"
            if adapter.whole
            else f"reserve these too: attach(.., reserve={outside})",
        )
