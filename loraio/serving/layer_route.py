"""One batch, an adapter for each sample: the two routes that it can take through a live model.

*Groups*: the samples of each adapter run through the network together, with that adapter's folded weights in the place
of the base's. Right for every layer type and every network whose samples do not depend on each other.

*Layers*: the whole batch runs through the network, sorted by adapter, and only the layers with targets part it. Cheaper
where activations are small and calls are what costs; possible where every target is used by ``F.linear`` or
``F.conv1d``, ``2d`` or ``3d`` and nothing else, and the samples stay along the first dimension. `find_route` finds that
out by watching. A convolution on a CPU takes its time however little it has to do: where there is little to unfold, all
adapters' samples are multiplied in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from loraio.adapter.layers import TargetModule
from loraio.errors import StateError

CACHE_BYTES = 1 << 22
"""Inputs and outputs of layers that are no larger, 4 MiB, are cheap to move: a few times a core's own cache."""

SPARED_BYTES = 1 << 17
"""What a convolution multiplies, unfolded, and its weights for each sample: where they are no larger than 128 KiB for
each adapter, one call that multiplies all of them is cheaper than a call for each adapter."""

PROBES = (2, 3)
"""Batch sizes that `find_route` watches the network with."""


class Folded:
    """The targets of one adapter with the adapter in them, for use in the place of a live model's Parameters.

    Attributes:
        weights: by state-dict name; empty for the base.
        packed: the same for the layers route, where it has packed them, by name and settings of the convolution.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.packed: dict[tuple[str, tuple[Any, ...]], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        kept = [*self.weights.values(), *self.packed.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class Route(NamedTuple):
    """What the layers route needs to know of a network.

    Attributes:
        row_bytes: for each sample, of the largest input or output of a target.
        packed: whether convolutions may use packed weights, which makes their outputs channels_last.
    """

    row_bytes: int
    packed: bool


class UnfitError(Exception):
    """The network uses a target in a way that the layers route cannot follow; not for users."""


def run_groups(
    model: nn.Module, modules: Mapping[str, TargetModule], x: Tensor, sizes: Sequence[int], folded: Iterable[Folded]
) -> Any:
    """The outputs of a batch sorted by adapter, one group of samples after the other.

    Args:
        model: in eval mode, gradients off.
        modules: where the targets are.
        x: (n, ...), the samples of the first adapter first.
        sizes: how many samples each adapter has; together n.
        folded: of each adapter, asked for when its samples' turn comes; empty for the base.

    Raises:
        StateError: the outputs are no tensors, or tuples, lists or dicts of them, with a row for each sample.
    """
    outputs = []
    for part, one in zip(x.split(list(sizes)), folded, strict=True):
        with _in_place(modules, one.weights):
            outputs.append(model(part))
    return _joined(outputs, sizes)


def run_layers(
    model: nn.Module,
    modules: Mapping[str, TargetModule],
    x: Tensor,
    sizes: Sequence[int],
    folded: Sequence[Folded],
    *,
    base: Folded,
    packed: bool,
) -> Any:
    """As `run_groups`, in one pass, where `find_route` has found that possible.

    Args:
        base: keeps what is packed of the base's own weights.
        packed: as `Route.packed`.

    Raises:
        UnfitError: it is not possible after all; nothing was changed.
    """
    uses: dict[int, list[_Use]] = {}
    for name in dict.fromkeys(name for one in folded for name in one.weights):
        weight = modules[name].weight
        uses[id(weight)] = [
            _Use(name, one.weights[name], one) if name in one.weights else _Use(name, weight, base) for one in folded
        ]
    mode = _Mixed(uses, sizes, packed)
    with mode:
        outputs = model(x)
    if mode.seen != uses.keys():
        raise UnfitError("a target was not used")
    return outputs


def find_route(model: nn.Module, modules: Sequence[TargetModule], x: Tensor) -> Route | None:
    """Whether a network can take the layers route, and how.

    It runs the base on two and on three samples. Each target must be used, by no function but those that the route
    computes, on inputs whose first dimension has the number of samples and whose others do not change with it, and with
    the same values for the samples that both runs share. Packed weights are used where the second run gives the same
    with them.

    Args:
        model: in eval mode, gradients off.
        modules: of the targets.
        x: (n, ...), a batch; only its first three samples are used.

    Returns:
        None where only groups are right.
    """
    if len(x) < max(PROBES):
        return None
    few = _watched(model, modules, x[: PROBES[0]], packed=False)
    for packed in (True, False):
        more = _watched(model, modules, x[: PROBES[1]], packed=packed) if few else None
        if few and more and few.agrees(more):
            return Route(max(few.row_bytes, more.row_bytes), packed)
    return None


def takes_layers(route: Route, samples: int, weight_bytes: int) -> bool:
    """Whether the layers route is the cheaper one: where moving activations costs less than repeating the weights.

    Groups read every weight once for each adapter, and bring it into the order that convolutions want, but move the
    activations in parts small enough for a cache; layers the other way round. So it is layers where the largest input
    or output of a target, for the whole batch, is no larger than the targets' weights together, or than `CACHE_BYTES`.
    """
    return route.row_bytes * samples <= max(CACHE_BYTES, weight_bytes)


def gathered(outputs: Any, order: Tensor) -> Any:
    """Outputs of a sorted batch in the order that it came in: row ``order[i]`` of the result is row i."""
    return _mapped(lambda rows: torch.empty_like(rows).index_copy_(0, order, rows), outputs)


# The groups route


@contextmanager
def _in_place(modules: Mapping[str, TargetModule], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with folded weights where its Parameters are, which are put back, in their order, at the end."""
    places = [(modules[name].module._parameters, modules[name].parameter, weight) for name, weight in weights.items()]
    kept = [parameters[name] for parameters, name, _ in places]
    try:
        for parameters, name, weight in places:
            parameters[name] = weight  # type: ignore[assignment]  # a plain tensor, as functional_call does it
        yield
    finally:
        for (parameters, name, _), parameter in zip(places, kept, strict=True):
            parameters[name] = parameter


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        for rows, size in zip(outputs, sizes, strict=True):
            if rows.ndim == 0 or len(rows) != size:
                raise StateError(f"an output of shape {tuple(rows.shape)} has no row for each of {size} samples")
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in outputs], sizes) for key in first}
    if type(first) in (tuple, list):
        return type(first)(_joined(list(parts), sizes) for parts in zip(*outputs, strict=True))
    raise _no_rows(first)


def _mapped(change: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {key: _mapped(change, part) for key, part in outputs.items()}
    if type(outputs) in (tuple, list):
        return type(outputs)(_mapped(change, part) for part in outputs)
    raise _no_rows(outputs)


def _no_rows(output: Any) -> StateError:
    return StateError(f"the network gives a {type(output).__name__}, not tensors, or tuples, lists or dicts of them")


# The layers route

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_USES = frozenset((F.linear, *_CONVOLUTIONS))
_HARMLESS = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
_METADATA = {getattr(Tensor, name).__get__ for name in _HARMLESS} | {Tensor.size, Tensor.dim, Tensor.numel}
"""What may be asked of a base weight without using its values."""


class _Seeing(TorchFunctionMode):
    """Sees every torch function of a forward pass, and takes over those that use a target's base weight.

    It finds the weights among the arguments of each function, so that a network which uses one in a way of its own is
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
        for value in values:  # an id of a target is no other object's: the model holds it
            if id(value) in self.targets or (isinstance(value, tuple | list) and self._among(value)):
                return True
        return False

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a layer with a target gives."""
        raise NotImplementedError


class _Watch(_Seeing):
    """Lets the base run, and notes how its targets are used."""

    def __init__(self, names: Mapping[int, str], size: int, packed: bool) -> None:
        super().__init__(names)
        self.names = names
        self.size = size
        self.packed = packed
        self.shapes: list[tuple[int, ...]] = []
        self.norms: list[Tensor] = []
        self.row_bytes = 0

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, weight = args[:2]
        samples = x.ndim == weight.ndim if func in _CONVOLUTIONS else x.ndim > 1
        if not samples or len(x) != self.size or not (_is_plain(x) and _is_plain(weight)):
            raise UnfitError(f"an input of shape {tuple(x.shape)} for {self.size} samples")
        own = [_Use(self.names[id(weight)], weight, Folded({}))]
        out = _parted(func, args, kwargs, own, [self.size], self.packed)
        self.shapes.append(tuple(x.shape[1:]))
        self.norms += [part.flatten(1).double().norm(dim=1) for part in (x, out)]
        self.row_bytes = max(self.row_bytes, x[0].nbytes, out[0].nbytes)
        return out

    def agrees(self, more: _Watch) -> bool:
        """Whether a run of more samples used the targets in the same way, with the same values for these samples."""
        same = self.seen == more.seen == self.targets and self.shapes == more.shapes
        pairs = zip(self.norms, more.norms, strict=False)
        return same and all(torch.allclose(a, b[: len(a)], rtol=1e-3, equal_nan=True) for a, b in pairs)


def _watched(model: nn.Module, modules: Sequence[TargetModule], x: Tensor, *, packed: bool) -> _Watch | None:
    watch = _Watch({id(module.weight): module.name for module in modules}, len(x), packed)
    try:
        with watch:
            model(x)
    except UnfitError:
        return None
    except RuntimeError:  # a view of what is channels_last now
        if not packed:
            raise
        return None
    return watch


class _Use(NamedTuple):
    """One adapter's weight in the place of a target."""

    name: str
    weight: Tensor
    folded: Folded


class _Mixed(_Seeing):
    """Gives each sample what its own adapter's weight makes of it; samples of one adapter stand together."""

    def __init__(self, uses: Mapping[int, Sequence[_Use]], sizes: Sequence[int], packed: bool) -> None:
        super().__init__(uses)
        self.uses = uses
        self.sizes = list(sizes)
        self.samples = sum(sizes)
        self.packed = packed

    def use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args[0]) != self.samples:
            raise UnfitError(f"an input of shape {tuple(args[0].shape)} for {self.samples} samples")
        return _parted(func, args, kwargs, self.uses[id(args[1])], self.sizes, self.packed)


def _parted(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    uses: Sequence[_Use],
    sizes: Sequence[int],
    packed: bool,
) -> Tensor:
    """A layer, on each adapter's samples with that adapter's weight."""
    x, weight, *rest = args
    settings = _settings(*rest, **kwargs) if packed and func == torch.conv2d else None
    if settings is None or not (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"):
        parts = [func(part, use.weight, *rest, **kwargs) for part, use in zip(x.split(sizes), uses, strict=True)]
    else:
        bias, *numbers = settings
        if len(uses) > 1:
            windows = _windows(x, weight, *settings[1:], most=SPARED_BYTES * len(uses))
            if windows is not None:
                return _multiplied(windows, uses, sizes, bias)
        x = x.contiguous(memory_format=torch.channels_last)
        shape = (8, *x.shape[1:])  # a hint; any number of samples will do
        key = (shape, str(numbers))
        convolution = torch.ops.mkldnn._convolution_pointwise.default
        parts = [
            convolution(part, _packed(use, key, numbers), bias, *numbers, "none", [], "")
            for part, use in zip(x.split(sizes), uses, strict=True)
        ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _windows(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    most: int,
) -> Tensor | None:
    """What a convolution multiplies for each output, as a view (n, in, kh, kw, height, width).

    None with groups, and where a copy of it and a weight for each sample would have more bytes than ``most``.
    """
    kernel = weight.shape[2:]
    outs = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, p, s, d in zip(x.shape[2:], kernel, padding, stride, dilation, strict=True)
    ]
    window = weight[0].nbytes
    if groups != 1 or min(outs) < 1 or len(x) * (outs[0] * outs[1] * window + weight.nbytes) > most:
        return None
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    within = [step * d for step, d in zip(x.stride()[2:], dilation, strict=True)]
    between = [step * s for step, s in zip(x.stride()[2:], stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *outs), (*x.stride()[:2], *within, *between))


def _multiplied(windows: Tensor, uses: Sequence[_Use], sizes: Sequence[int], bias: Tensor | None) -> Tensor:
    """A convolution as one matrix product for each sample, all in one call; channels_last."""
    samples, height, width = len(windows), *windows.shape[4:]
    columns = windows.reshape(samples, -1, height * width).transpose(1, 2)
    flat = [use.weight.flatten(1) for use in uses]
    weights = torch.stack([own for own, size in zip(flat, sizes, strict=True) for _ in range(size)]).transpose(1, 2)
    rows = torch.bmm(columns, weights) if bias is None else torch.baddbmm(bias, columns, weights)
    return rows.view(samples, height, width, -1).permute(0, 3, 1, 2)


def _packed(use: _Use, key: tuple[Any, ...], numbers: Sequence[Any]) -> Tensor:
    """The weight as oneDNN wants it, which it otherwise brings into that order at each call."""
    packed = use.folded.packed
    found = packed.get((use.name, key))
    if found is None:
        plain = use.weight.detach().contiguous(memory_format=torch.channels_last)
        found = packed[use.name, key] = torch.ops.mkldnn._reorder_convolution_weight.default(plain, *numbers, key[0])
    return found


def _settings(
    bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Tensor | None, list[int], list[int], list[int], int] | None:
    """Bias, padding, stride, dilation and groups as torch's packed convolution takes them, where it is there."""
    if isinstance(padding, str) or not (_HAS_PACKED and torch.backends.mkldnn.enabled):
        return None
    return bias, _pair(padding), _pair(stride), _pair(dilation), groups


_HAS_PACKED = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)
"""Whether this torch has the operators that torch.compile uses for convolutions on a CPU."""


def _pair(value: Any) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return [numbers[0], numbers[-1]]


def _is_plain(tensor: Tensor) -> bool:
    """Whether another order of summation only changes the last bits."""
    return tensor.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(tensor.device.type)
