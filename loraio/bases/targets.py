"""Choose the weights of a model that an adapter changes, its heads and its normalisation layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraio.adapter.layers import AFFINE, HEAD_LAYERS, LAYER_TYPES, STATISTICS, LayerType, tensor_name
from loraio.errors import StateError, UnknownNameError
from loraio.registry import known, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


GROUP_WORDS = ("conv", "linear", "embedding", "all")
"""Words that select targets by layer type, as class names do; every other pattern goes by name."""


_ORIGINAL = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")  # a parametrized weight's name, to its own


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """A module of a live model and a weight of it that an adapter can change.

    Attributes:
        name: the weight's name in the state dict: "conv1.weight".
        path: the module's name: "conv1"; empty for the model itself.
        module: the module that owns it.
        parameter: the weight's name inside the module: "weight".
        layer: its layer type.
    """

    name: str
    path: str
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
        """The module's groups; 1 where the layer type has none."""
        return int(getattr(self.module, "groups", 1)) if self.layer.grouped else 1


def target_modules(model: nn.Module) -> dict[str, TargetModule]:
    """Every weight of the model that an adapter can change, by its state-dict name, in the model's order."""
    from torch import nn

    types = [(getattr(nn, name), layer) for name, layer in LAYER_TYPES.items()]
    found: dict[str, TargetModule] = {}
    by_class: dict[type[nn.Module], LayerType | None] = {}
    for path, module in model.named_modules():
        cls = type(module)
        if cls not in by_class:
            by_class[cls] = next((layer for known, layer in types if issubclass(cls, known)), None)
        layer = by_class[cls]
        for parameter in layer.parameters if layer else ():
            if layer and _holds(module, parameter):
                name = tensor_name(path, parameter)
                found[name] = TargetModule(name=name, path=path, module=module, parameter=parameter, layer=layer)
    return found


def find_head(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Find a layer that can be a head by its name, and the attribute that holds the number of outputs.

    Raises:
        UnknownNameError: there is no such layer, or it cannot be a head: not of `HEAD_LAYERS`, or with groups.
    """
    from torch import nn

    heads = {
        name: (module, attribute)
        for name, module in model.named_modules()
        for layer, attribute in HEAD_LAYERS.items()
        if isinstance(module, getattr(nn, layer)) and getattr(module, "groups", 1) == 1
    }
    if path in heads:
        return heads[path]
    there = path in dict(model.named_modules())
    what = f"{path!r} cannot be a head" if there else f"the network has no layer {path!r}{nearest(path, heads)}"
    raise UnknownNameError(what, hint=f"a layer of {', '.join(HEAD_LAYERS)} without groups: {known(heads)}")


def normalisation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's normalisation layers by their names."""
    from torch import nn

    types = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {path: module for path, module in model.named_modules() if isinstance(module, types)}


def normalisation_tensors(model: nn.Module, *, affine: bool) -> list[str]:
    """Name the running statistics of all normalisation layers, and if ``affine`` their weights and biases."""
    kinds = (*AFFINE, *STATISTICS) if affine else STATISTICS
    return [
        tensor_name(path, name)
        for path, module in normalisation_modules(model).items()
        for name in kinds
        if getattr(module, name, None) is not None
    ]


def _holds(module: nn.Module, parameter: str) -> bool:
    """Return True if a module has such a weight, plain or parametrized, without computing it."""
    if module._parameters.get(parameter) is not None:
        return True
    return parameter in module._modules.get("parametrizations", ()) or (  # type: ignore[operator]
        not isinstance(getattr(type(module), parameter, None), property)
        and getattr(module, parameter, None) is not None
    )


def select_targets(
    model: nn.Module, patterns: Sequence[str] = ("conv",), *, exclude: Sequence[str] = ()
) -> dict[str, TargetModule]:
    """The weights that the patterns select, in the model's order.

    Args:
        model: the base model.
        patterns: words ("conv", "linear", "embedding", "all"), class names ("ConvTranspose2d"), globs, or regular
            expressions after ``re:``. Globs and expressions must match the whole of the weight's name
            ("layer1.0.conv1.weight") or of its module's ("layer1.0.conv1"), with case.
        exclude: patterns of the same kind; their matches are left out.

    Raises:
        UnknownNameError: a pattern matches nothing, everything is excluded, or an expression is none.
        StateError: a selected weight is used by two modules, or is not a plain Parameter.
    """
    candidates = target_modules(model)
    if not patterns:
        words = ", ".join(GROUP_WORDS)
        raise UnknownNameError("no target patterns were given", hint=f"{words}, a class name, or globs over names")
    selected = set().union(*(_matching(candidates, pattern, "target") for pattern in patterns))
    excluded = set().union(*(_matching(candidates, pattern, "exclude") for pattern in exclude))
    chosen = {name: target for name, target in candidates.items() if name in selected - excluded}
    if not chosen:
        raise UnknownNameError(f"every target is excluded: {known(selected)}")
    for target in chosen.values():
        refuse_unusable(target)
    refuse_shared(model, chosen)
    return chosen


def matches(target: TargetModule, pattern: str) -> bool:
    """Return True if a pattern of `select_targets` selects a weight.

    Raises:
        UnknownNameError: the pattern is no regular expression after all.
    """
    if pattern in GROUP_WORDS:
        return pattern in ("all", target.layer.group)
    if pattern == target.layer.name:
        return True
    if pattern.startswith("re:"):
        try:
            return any(re.fullmatch(pattern[3:], text) for text in (target.name, target.path))
        except re.error as error:
            raise UnknownNameError(f"{pattern!r} is no regular expression: {error}") from error
    return any(fnmatch.fnmatchcase(text, pattern) for text in (target.name, target.path))


def _matching(candidates: dict[str, TargetModule], pattern: str, what: str) -> set[str]:
    found = {name for name, target in candidates.items() if matches(target, pattern)}
    if not found:
        paths = list(dict.fromkeys(target.path for target in candidates.values()))
        raise UnknownNameError(
            f"{what} pattern {pattern!r} matches no weight of the model{nearest(pattern, paths)}",
            hint=f"one of the words {', '.join(GROUP_WORDS)}, a class name, or a glob over: {known(paths)}",
        )
    return found


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
