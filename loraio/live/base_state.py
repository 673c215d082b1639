"""Read the base of a model through the adapters that it carries, and tell which of its tensors training changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from loraio.adapter.layers import tensor_name
from loraio.bases.attached import AttachedPart, carries_adapter
from loraio.bases.identity import digests, identity_of
from loraio.bases.writes import version_of
from loraio.errors import StateError
from loraio.live.places import Place


def refuse_attached(model: nn.Module) -> None:
    """Raise StateError if a model carries an adapter."""
    if carries_adapter(model):
        raise StateError("the model carries an adapter already", hint="live.swap(adapter), or live.detach() first")


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base under its own names and in its own order, with an adapter attached or not.

    Args:
        model: the model itself, or a wrapper of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or
            ``AveragedModel`` around it; their prefixes and own buffers are left out.

    Returns:
        the base's own tensors, not copies; without gradients, as in every state dict.
    """
    model = unwrapped(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    places: dict[int, list[Place]] = {}
    for live in attachments(model):
        for place in live._places.values():
            places.setdefault(id(place.module), []).append(place)
    if not places:
        return state
    own_names: dict[str, str] = {}
    orders: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for place in places.get(id(module), ()):
            own_names[f"{prefix}parametrizations.{place.parameter}"] = prefix + place.parameter
            orders[path] = place.order
    return _as_before(state, own_names, orders)


def attachments(model: nn.Module) -> list[Any]:
    """Return the handle, a `loraio.Attachment`, of each adapter that a model and its parts carry."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, AttachedPart):
            found[id(module.handle)] = module.handle
    return list(found.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``torch.compile`` and other wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # torch.compile's; its class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _as_before(
    state: Mapping[str, Tensor], own_names: Mapping[str, str], orders: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Return a state dict with the names and the order of the base.

    ``own_names`` maps a parametrization, without ".original", to its tensor. ``orders`` has the names of a module's own
    tensors in order, by the module's path.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack, _, rest = name.rpartition("parametrizations.")
        own = own_names.get(f"{stack}parametrizations.{rest.partition('.')[0]}") if rest else None
        if own is None:
            renamed[name] = tensor
        elif name.endswith(".original"):
            renamed[own] = tensor
    ordered: dict[str, Tensor] = {}
    left = dict(orders)
    for name, tensor in renamed.items():
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1) if left else ():  # a module's own tensors come before those inside of it
            path = ".".join(parts[:depth])
            for key in left.pop(path, ()):
                key = tensor_name(path, key)
                if key in renamed:
                    ordered[key] = renamed[key]
        ordered.setdefault(name, tensor)
    return ordered


class _Mark(NamedTuple):
    version: int
    dtype: torch.dtype
    sha256: str


class BaseRecord:
    """The tensors of a base as they are now.

    Args:
        model: the model; None records nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        state = {} if model is None else base_state_dict(model)
        known = {} if model is None else identity_of(model).digests(state)
        self._marks = {name: _Mark(version_of(tensor), tensor.dtype, known[name]) for name, tensor in state.items()}

    def changed(self) -> list[str]:
        """Return names of tensors that have other bytes now because of writes; a cast or a move alone is no write.

        The version counter does not tell everything: fused optimizers do not raise it.
        """
        state = {} if self._model is None else base_state_dict(self._model)
        suspects = {
            name: tensor
            for name, tensor in state.items()
            if not tensor.is_meta
            and (tensor.dtype == self._marks[name].dtype or version_of(tensor) != self._marks[name].version)
        }
        return [name for name, digest in digests(suspects).items() if digest != self._marks[name].sha256]
