"""Check that an adapter fits the model that it is to be attached to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import AFFINE, STATISTICS
from loraio.adapter.metadata import Target
from loraio.bases.attached import is_adapter_part
from loraio.bases.identity import check_base, identity_of
from loraio.bases.targets import find_head, normalisation_modules, refuse_shared, refuse_unusable, target_modules
from loraio.bases.writes import ModelMark
from loraio.errors import BaseMismatchError, UnknownNameError
from loraio.live.base_state import base_state_dict


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
    """The knowledge that an adapter fits a model; others of the same metadata fit too until the model is written to.

    Factors, strength and rank do not matter.

    Args:
        adapter: fits the model as it is now; None where nothing is known.
        model: with the adapter on it.
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
