"""Check that an adapter fits the model that it is to be attached to, and the weights reserved there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import AFFINE, STATISTICS
from loraio.adapter.metadata import Target
from loraio.bases.attached import is_adapter_part
from loraio.bases.identity import check_base, identity_of
from loraio.bases.targets import (
    find_head,
    normalisation_modules,
    refuse_shared,
    refuse_unusable,
    select_targets,
    target_modules,
)
from loraio.bases.writes import ModelMark
from loraio.errors import BaseMismatchError, ConfigError, StateError, UnknownNameError
from loraio.files.tensors import dtype_code
from loraio.live.base_state import base_state_dict
from loraio.registry import lookup

Reserve = str | Adapter | Iterable[str | Adapter] | None
"""The weights that adapters may change while the model stays compiled: patterns, adapters, or both."""


def check_fit(
    model: nn.Module, adapter: Adapter, *, placed: Collection[str], allow_base_mismatch: bool
) -> dict[str, Tensor]:
    """Check everything that can be wrong with an adapter on a model, and return the state dict of its base.

    ``placed`` are the names of the tensors that an adapter is on already.

    Raises:
        BaseMismatchError: the adapter does not belong to this base; all differences are listed.
        StateError: a target is shared, parametrized otherwise, or has no values.
    """
    modules = target_modules(model)
    problems = _whole_misfits(model, adapter, placed)
    for name, target in adapter.targets.items():
        found = modules.get(name)
        if found is None:
            continue  # no such weight, which check_base says better, or a layer that adapters do not know
        if (found.layer.name, found.groups) != (target.layer, target.groups):
            problems.append(
                f"{name!r}: the layer is a {found.layer.name} with groups={found.groups}, "
                f"the adapter was made for a {target.layer} with groups={target.groups}"
            )
        if name not in placed:
            refuse_unusable(found)
    if problems:
        raise BaseMismatchError("the adapter does not belong to this base", problems=problems)
    state = base_state_dict(model)
    check_base(adapter, state, allow_mismatch=allow_base_mismatch, known=identity_of(model).digests(state))
    unknown = [name for name in adapter.targets if name not in modules]
    if unknown:
        raise BaseMismatchError(
            "the adapter does not belong to this base",
            problems=[f"{name!r}: its module is not of a layer type that adapters know" for name in unknown],
        )
    refuse_shared(model, [*adapter.targets, *adapter.whole])
    return state


def _whole_misfits(model: nn.Module, adapter: Adapter, placed: Collection[str]) -> list[str]:
    """Return a line for each whole tensor whose layer does not suit its role."""
    problems: list[str] = []
    if not adapter.whole:
        return problems
    state, norms = base_state_dict(model), normalisation_modules(model)
    for name, whole in adapter.whole.items():
        path, _, last = name.rpartition(".")
        if name not in state:
            continue  # which check_base says better
        if whole.role == "head":
            try:
                find_head(model, path)
            except UnknownNameError as error:
                problems.append(error.message)
        elif whole.role == "norm" and (path not in norms or last not in (*AFFINE, *STATISTICS)):
            problems.append(f"{name!r} is no tensor of a normalisation layer")
        module = model.get_submodule(path)
        if name not in placed and last not in module._parameters and last not in module._buffers:
            problems.append(f"{name!r} is computed from another parametrization")
    return problems


class KnownFit:
    """The knowledge that an adapter fits the model that it is on; None stands for no knowledge.

    Others of the same metadata fit too until the model is written to. Factors, strength and rank do not matter.
    """

    def __init__(self, adapter: Adapter | None, model: nn.Module) -> None:
        self._mark: ModelMark | None = None
        self._targets: dict[str, Any] = {}
        if adapter is not None and not adapter.whole:
            self._mark = ModelMark(model, is_adapter_part)
            self._base = _base_facts(adapter)
            self._targets = {name: _target_facts(target) for name, target in adapter.targets.items()}

    def covers(self, adapter: Adapter) -> bool:
        """Return True if this adapter must fit too."""
        known = self._targets
        return (
            self._mark is not None
            and not adapter.whole
            and self._base == _base_facts(adapter)
            and all(known.get(name) == _target_facts(target) for name, target in adapter.targets.items())
            and self._mark.unchanged()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KnownFit:
        return KnownFit(None, nn.Module())


def _base_facts(adapter: Adapter) -> tuple[Any, ...]:
    return adapter.base.sha256, adapter.base.sha256_without_statistics


def _target_facts(target: Target) -> tuple[Any, ...]:
    return target.base_sha256, target.shape, target.dtype, target.layer, target.groups


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
