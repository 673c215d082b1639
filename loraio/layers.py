"""Layer types: which weights can be targets, and how a weight tensor becomes an (out, fan_in) matrix and back.

Stride, padding, dilation, padding mode and groups never enter: an adapter changes the weight, the layer uses it as it
always did. A new layer type is one entry in `LAYER_TYPES`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraio.errors import StateError, UnknownNameError
from loraio.registry import known, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """One kind of layer whose weight has its output dimension first.

    Attributes:
        name: the class name in ``torch.nn``, as written in files.
        group: the word that selects it and its relatives: "conv" or "linear".
        dims: number of dimensions of the weight.
    """

    name: str
    group: str
    dims: int

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(out, fan_in) of a weight of this shape; fan_in is the product of all dimensions but the first."""
        return shape[0], math.prod(shape[1:])

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, fan_in), in C order; a view where the memory allows it."""
        return weight.reshape(self.matrix_shape(weight.shape))

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `to_matrix`."""
        return matrix.reshape(tuple(shape))


LAYER_TYPES: dict[str, LayerType] = {
    "Conv1d": LayerType(name="Conv1d", group="conv", dims=3),
    "Conv2d": LayerType(name="Conv2d", group="conv", dims=4),
    "Conv3d": LayerType(name="Conv3d", group="conv", dims=5),
    "Linear": LayerType(name="Linear", group="linear", dims=2),
}

GROUP_WORDS = ("conv", "linear", "all")
"""Words that select targets by layer type; every other pattern is a glob on names."""


_ORIGINAL = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")  # a parametrized weight's name, to its own


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """A module of a live model and the weight of it that an adapter can change.

    Attributes:
        name: the weight's name in the state dict: "conv1.weight".
        module: the module that owns it.
        parameter: the weight's name inside the module: "weight".
        layer: its layer type.
    """

    name: str
    module: nn.Module
    parameter: str
    layer: LayerType

    @property
    def weight(self) -> Tensor:
        """The weight as the module sees it now."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight

    @property
    def groups(self) -> int:
        """The module's groups; 1 where it has none."""
        return int(getattr(self.module, "groups", 1))


def target_modules(model: nn.Module) -> dict[str, TargetModule]:
    """Every weight of the model that an adapter can change, by its state-dict name, in the model's order."""
    from torch import nn

    types = [(getattr(nn, name), layer) for name, layer in LAYER_TYPES.items()]
    found: dict[str, TargetModule] = {}
    for path, module in model.named_modules():
        for cls, layer in types:
            if isinstance(module, cls):
                name = f"{path}.weight" if path else "weight"
                found[name] = TargetModule(name=name, module=module, parameter="weight", layer=layer)
                break
    return found


def select_targets(model: nn.Module, patterns: Sequence[str] = ("conv",)) -> dict[str, TargetModule]:
    """The weights that the patterns select, in the model's order.

    Args:
        model: the base model.
        patterns: words ("conv", "linear", "all") or globs, matched with case against the weight's name
            ("conv1.weight") and against its module's ("conv1", "layer?.*").

    Raises:
        UnknownNameError: a pattern selects nothing.
        StateError: a selected weight is used by two modules, or is not a plain Parameter.
    """
    candidates = target_modules(model)
    selected: set[str] = set()
    for pattern in patterns:
        matches = {name for name, target in candidates.items() if _matches(pattern, name, target.layer)}
        if not matches:
            modules = [name.removesuffix(".weight") for name in candidates]
            raise UnknownNameError(
                f"target pattern {pattern!r} matches no weight of the model{nearest(pattern, modules)}",
                hint=f"one of the words {', '.join(GROUP_WORDS)}, or a glob over: {known(modules)}",
            )
        selected |= matches
    if not selected:
        raise UnknownNameError("no target patterns were given", hint="conv, linear, all, or globs over module names")
    chosen = {name: target for name, target in candidates.items() if name in selected}
    for target in chosen.values():
        refuse_unusable(target)
    refuse_shared(model, chosen)
    return chosen


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse targets whose weight another module uses too: it would be adapted in one place and not in the other.

    Raises:
        StateError: naming the first such weight and where else it is used.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(_ORIGINAL.sub(r"\1\2", name))
    shared = {name: group for group in users.values() if len(group) > 1 for name in group}
    for name in names:
        if name in shared:
            raise StateError(f"the weight {name!r} is shared: {', '.join(shared[name])} are one tensor")


def refuse_unusable(target: TargetModule) -> None:
    """Refuse a weight that no adapter can be put on.

    Raises:
        StateError: it is computed from something else (weight_norm, another parametrization), or has no values yet
            (a lazy module, the meta device), or is an inference tensor, which torch does not let change hands.
    """
    from torch.nn.parameter import is_lazy

    parameter = target.module._parameters.get(target.parameter)
    if parameter is None:
        raise StateError(
            f"the weight {target.name!r} is computed from another parametrization",
            hint="take that one off first, for example by torch.nn.utils.parametrize.remove_parametrizations",
        )
    if is_lazy(parameter) or parameter.is_meta:
        raise StateError(f"the weight {target.name!r} has no values yet", hint="load the base model first")
    if parameter.is_inference():
        raise StateError(
            f"the weight {target.name!r} was made under torch.inference_mode",
            hint="load the base model outside of it; the forward pass may be inside",
        )


def _matches(pattern: str, name: str, layer: LayerType) -> bool:
    if pattern in GROUP_WORDS:
        return pattern in ("all", layer.group)
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, name.removesuffix(".weight")))
