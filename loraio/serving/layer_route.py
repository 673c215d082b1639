"""The layer route of mixed batches: one pass of the whole batch, in which only layers with targets split it.

It is possible where every target is used by ``F.linear`` or ``F.conv1d``, ``2d`` or ``3d`` and nothing else, and the
samples stay along the first dimension. `find_route` finds that out by watching the network run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from loraio.bases.targets import TargetModule
from loraio.serving.convolutions import Use, run_split
from loraio.serving.residents import FoldedWeights

PROBES = (2, 3)
"""Batch sizes that `find_route` runs the network with."""

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_USES = frozenset((F.linear, *_CONVOLUTIONS))
_HARMLESS = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
_METADATA = {getattr(Tensor, name).__get__ for name in _HARMLESS} | {Tensor.size, Tensor.dim, Tensor.numel}
"""Functions that read something of a base weight, but not its values."""


class LayerRoute(NamedTuple):
    """Facts of a network that the layer route needs.

    Attributes:
        row_bytes: size of the largest input or output of a target, for each sample.
        reorder: convolutions may use weights in oneDNN's order, which makes their outputs channels_last.
    """

    row_bytes: int
    reorder: bool


class UnfitError(Exception):
    """The network uses a target in a way that the layer route cannot follow; never raised to users."""


def run_layers(
    model: nn.Module,
    modules: Mapping[str, TargetModule],
    x: Tensor,
    sizes: Sequence[int],
    folded: Sequence[FoldedWeights],
    *,
    base: FoldedWeights,
    reorder: bool,
) -> Any:
    """Run a batch sorted by adapter in one pass, where `find_route` has found that possible.

    ``folded`` holds the weights of each adapter, none for the base, and ``base`` caches the base's own weights in
    oneDNN's order. The model is in eval mode, gradients are off.

    Raises:
        UnfitError: it is not possible after all; nothing was changed.
    """
    uses: dict[int, list[Use]] = {}
    for name in dict.fromkeys(name for one in folded for name in one.weights):
        weight = modules[name].weight
        uses[id(weight)] = [
            Use(name, one.weights[name], one) if name in one.weights else Use(name, weight, base) for one in folded
        ]
    mode = _Splitting(uses, sizes, reorder)
    with mode:
        outputs = model(x)
    if mode.seen != uses.keys():
        raise UnfitError("a target was not used")
    return outputs


def find_route(model: nn.Module, modules: Sequence[TargetModule], x: Tensor) -> LayerRoute | None:
    """Find out how a network can take the layer route, by runs of the base on two and three samples; None if it cannot.

    Each target must be used by no other function than those that the route computes. The first dimension of its inputs
    must be the samples, the others must not change with their number. Samples that both runs share must give the same
    values. Weights in oneDNN's order are used if the second run gives the same with them.
    """
    if len(x) < max(PROBES):
        return None
    few = _probe(model, modules, x[: PROBES[0]], reorder=False)
    for reorder in (True, False):
        more = _probe(model, modules, x[: PROBES[1]], reorder=reorder) if few else None
        if few and more and few.agrees(more):
            return LayerRoute(max(few.row_bytes, more.row_bytes), reorder)
    return None


class _Mode(TorchFunctionMode):
    """Takes over each torch function of a forward pass that uses a target's base weight.

    The weights are looked for among the arguments of every function. So a network that uses one in a way of its own is
    noticed, and the model itself is left alone.
    """

    def __init__(self, targets: Iterable[int]) -> None:
        super().__init__()
        self.targets = frozenset(targets)
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _USES and len(args) > 1 and id(args[1]) in self.targets and not self._among((args[0], *args[2:])):
            self.seen.add(id(args[1]))
            return self.use(func, args, kwargs)
        if (self._among(args) or (kwargs and self._among(kwargs.values()))) and func not in _METADATA:
            raise UnfitError(f"a target is an argument of {func}")
        return func(*args, **kwargs)

    def _among(self, values: Iterable[Any]) -> bool:
        for value in values:  # the model holds the targets, so that no other object has the id of one
            if id(value) in self.targets or (isinstance(value, tuple | list) and self._among(value)):
                return True
        return False

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute a layer with a target."""
        raise NotImplementedError


class _Splitting(_Mode):
    """Computes each sample with its own adapter's weight; samples of one adapter are next to each other."""

    def __init__(self, uses: Mapping[int, Sequence[Use]], sizes: Sequence[int], reorder: bool) -> None:
        super().__init__(uses)
        self.uses = uses
        self.sizes = list(sizes)
        self.samples = sum(sizes)
        self.reorder = reorder

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args[0]) != self.samples:
            raise UnfitError(f"an input of shape {tuple(args[0].shape)} for {self.samples} samples")
        return run_split(func, args, kwargs, self.uses[id(args[1])], self.sizes, self.reorder)


class _Probe(_Mode):
    """Lets the base run, and notes how it uses its targets."""

    def __init__(self, names: Mapping[int, str], size: int, reorder: bool) -> None:
        super().__init__(names)
        self.names = names
        self.size = size
        self.reorder = reorder
        self.shapes: list[tuple[int, ...]] = []
        self.norms: list[Tensor] = []
        self.row_bytes = 0

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, weight = args[:2]
        samples = x.ndim == weight.ndim if func in _CONVOLUTIONS else x.ndim > 1
        if not samples or len(x) != self.size or not (_is_plain(x) and _is_plain(weight)):
            raise UnfitError(f"an input of shape {tuple(x.shape)} for {self.size} samples")
        own = [Use(self.names[id(weight)], weight, FoldedWeights({}))]
        out = run_split(func, args, kwargs, own, [self.size], self.reorder)
        self.shapes.append(tuple(x.shape[1:]))
        self.norms += [values.flatten(1).double().norm(dim=1) for values in (x, out)]
        self.row_bytes = max(self.row_bytes, x[0].nbytes, out[0].nbytes)
        return out

    def agrees(self, more: _Probe) -> bool:
        """Return True if a run of more samples used the targets in the same way, with the same values for these."""
        same = self.seen == more.seen == self.targets and self.shapes == more.shapes
        pairs = zip(self.norms, more.norms, strict=False)
        return same and all(torch.allclose(a, b[: len(a)], rtol=1e-3, equal_nan=True) for a, b in pairs)


def _probe(model: nn.Module, modules: Sequence[TargetModule], x: Tensor, *, reorder: bool) -> _Probe | None:
    probe = _Probe({id(module.weight): module.name for module in modules}, len(x), reorder)
    try:
        with probe:
            model(x)
    except UnfitError:
        return None
    except RuntimeError:  # a view of an output that is channels_last now
        if not reorder:
            raise
        return None
    return probe


def _is_plain(tensor: Tensor) -> bool:
    """Return True if another order of summation changes only the last bits."""
    return tensor.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(tensor.device.type)
