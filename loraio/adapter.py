"""The adapter itself: frozen data, checked on construction. No files and no modules here.

`Target` is the metadata of one adapted weight and needs no torch to be imported, so that a file's header can be
checked in a tenth of a second. `Adapter` adds the factor tensors.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loraio.container import TORCH_DTYPES, tensor_bytes
from loraio.errors import AdapterError, ConfigError, ShapeError
from loraio.kinds import KINDS, Kind
from loraio.layers import LAYER_TYPES, LayerType
from loraio.registry import lookup

if TYPE_CHECKING:
    from torch import Tensor

SCALE_RULES: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}
"""What alpha and rank give; the second is rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes that base weights and factors may have."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One adapted weight: everything about it but its name and its factors.

    Attributes:
        rank: r, at least 1.
        alpha: any finite number, int or float kept as given; `scale` is what it gives.
        shape: of the base weight, (out, ...).
        dtype: of the base weight, as a safetensors code: "F32".
        layer: the class of the module in ``torch.nn``: "Conv2d".
        base_sha256: of the base weight's bytes, little-endian, C order, 64 hexadecimal digits.
        groups: of the convolution; 1 for other layers.
        kind: a name in `loraio.kinds.KINDS`.
        scale_rule: a name in `SCALE_RULES`.
        sketch: a few numbers from which the distance of another weight can be told, `loraio.identity.sketch`; empty
            where there is none.
        extra: keys of the file that this version does not know; written back as they were.

    Raises:
        AdapterError: a value is out of range.
        UnknownNameError: no such kind, layer type or scale rule.
    """

    rank: int
    alpha: int | float
    shape: tuple[int, ...]
    dtype: str
    layer: str
    base_sha256: str
    groups: int = 1
    kind: str = "lora"
    scale_rule: str = "alpha/r"
    sketch: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_size(self.rank):
            raise AdapterError(f"rank is {self.rank!r}, it must be a whole number from 1 to 2**63 - 1")
        if not _is_number(self.alpha):
            raise AdapterError(f"alpha is {self.alpha!r}, it must be a finite number")
        if not _is_size(self.groups):
            raise AdapterError(f"groups is {self.groups!r}, it must be a whole number from 1 to 2**63 - 1")
        if not isinstance(self.shape, tuple) or not all(_is_size(size) for size in self.shape):
            raise AdapterError(f"shape is {self.shape!r}, it must be a tuple of whole numbers from 1 to 2**63 - 1")
        if self.dtype not in FLOAT_DTYPES:
            raise AdapterError(f"dtype is {self.dtype!r}, it must be one of {', '.join(FLOAT_DTYPES)}")
        if not isinstance(self.base_sha256, str) or not _SHA256.fullmatch(self.base_sha256):
            raise AdapterError(f"base_sha256 is {self.base_sha256!r}, it must be 64 hexadecimal digits")
        if not isinstance(self.sketch, tuple) or not all(_is_number(value) for value in self.sketch):
            raise AdapterError(f"sketch is {self.sketch!r}, it must be a tuple of finite numbers")
        lookup(KINDS, self.kind, what="adapter kind")
        lookup(SCALE_RULES, self.scale_rule, what="scale rule")
        layer = lookup(LAYER_TYPES, self.layer, what="layer type")
        if len(self.shape) != layer.dims:
            raise AdapterError(f"shape is {self.shape}, the weight of a {self.layer} has {layer.dims} dimensions")
        if self.groups > 1 and not layer.grouped:
            raise AdapterError(f"groups is {self.groups}, a {self.layer} has none")
        if self.shape[0] % self.groups:
            raise AdapterError(f"{self.shape[0]} channels do not divide into {self.groups} groups")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by, strength apart."""
        return SCALE_RULES[self.scale_rule](self.alpha, self.rank)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, fan_in)."""
        return self._layer.matrix_shape(self.shape, self.groups)

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor by its short name: ``{"lora_A": (r, fan_in), "lora_B": (out, r)}``."""
        return self._kind.shapes(*self.matrix_shape, self.rank)

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(math.prod(shape) for shape in self.factor_shapes.values())

    @property
    def saves_nothing(self) -> bool:
        """Whether the factors hold at least as many numbers as the base weight itself."""
        return self.parameters >= math.prod(self.shape)

    @property
    def largest_saving_rank(self) -> int:
        """The largest rank at which the factors hold fewer numbers than the base weight; 0 where no rank does."""
        ranks = range(1, min(self.matrix_shape) + 1)  # beyond the rank that a matrix can have nothing is saved
        return bisect.bisect_left(ranks, True, key=lambda rank: replace(self, rank=rank).saves_nothing)

    @property
    def _layer(self) -> LayerType:
        return LAYER_TYPES[self.layer]

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, strength: float = 1.0) -> Tensor:
        """The new weight, for use: accumulated in float64, rounded once. Merge, attach and verify all use this.

        Args:
            weight: the base weight, ``shape``, any float dtype and device.
            factors: by short name, same device, any float dtype.
            strength: multiplies the scale; 0 gives the base weight's bits.

        Returns:
            a new tensor, shape, dtype, device and memory format of ``weight``, without gradient.
        """
        import torch

        from loraio.lowrank import round_once

        if strength == 0:
            return weight.detach().clone()
        with torch.no_grad():
            if weight.device.type == "mps":  # has no float64
                moved = {name: factor.cpu() for name, factor in factors.items()}
                return self.fold(weight.cpu(), moved, strength=strength).to(weight.device)
            folded = round_once(self._fold_in(torch.float64, weight, factors, strength), weight.dtype)
            if folded.stride() == weight.stride():
                return folded
            return torch.empty_like(weight).copy_(folded)  # channels_last runs other kernels than contiguous weights

    def fold_for_training(self, weight: Tensor, factors: Mapping[str, Tensor], *, strength: float = 1.0) -> Tensor:
        """The new weight, differentiable, computed in float32 (float64 for float64 weights).

        Equal to `fold` up to the rounding of that dtype; arguments and result as there, with gradients.
        """
        import torch

        dtype = torch.promote_types(weight.dtype, torch.float32)
        return self._fold_in(dtype, weight, factors, strength).to(weight.dtype)

    def _fold_in(self, dtype: Any, weight: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
        import torch

        matrix = self._layer.to_matrix(weight.to(dtype), self.groups)
        cast = {name: factor.to(dtype) for name, factor in factors.items()}
        kind = weight.device.type if torch.amp.is_autocast_available(weight.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):  # would round the base weight itself to bfloat16
            folded = self._kind.fold(matrix, cast, scale=self.scale, strength=strength)
        return self._layer.from_matrix(folded, weight.shape, self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReference:
    """Which base model an adapter was trained on.

    Attributes:
        sha256: digest of the whole state dict, as `loraio.identity.state_sha256`.
        network: the network's name, None when it has none.
        network_args: keyword options that the network is built with, plain JSON values.
        sha256_without_statistics: the same digest without running statistics of normalisation layers; None where
            the network has none.
        extra: keys of the file that this version does not know.
    """

    sha256: str
    network: str | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    sha256_without_statistics: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sha256", "sha256_without_statistics"):
            value = getattr(self, name)
            absent = value is None and name != "sha256"
            if not absent and (not isinstance(value, str) or not _SHA256.fullmatch(value)):
                raise AdapterError(f"the base's {name} is {value!r}, it must be 64 hexadecimal digits")
        if not isinstance(self.network_args, Mapping):
            raise AdapterError(f"the base's network_args are {self.network_args!r}, they must be an object")
        if self.network is not None and not isinstance(self.network, str):
            raise AdapterError(f"the base's network is {self.network!r}, it must be a name or null")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """All factors of one training run, for all targets, and what is needed to use them.

    Attributes:
        targets: by the weight's state-dict name, in the model's order when trained, in name order when read.
        factors: by the weight's name and the factor's: ``"conv1.weight.lora_A"``. Any device; do not write to them.
        base: the base model that it belongs to.
        training: how it came to be: data set, class, hyperparameters, results; plain JSON values.
        extra: top-level keys of the file that this version does not know.

    Raises:
        AdapterError: no targets, a factor missing, left over or not finite, or a dtype that is not a float.
        ShapeError: a factor's shape is not what rank and weight shape ask for.
    """

    targets: Mapping[str, Target]
    factors: Mapping[str, Tensor]
    base: BaseReference
    training: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))
        object.__setattr__(self, "factors", MappingProxyType(dict(self.factors)))
        object.__setattr__(self, "training", MappingProxyType(dict(self.training)))
        check_factors(self.targets, {name: tuple(tensor.shape) for name, tensor in self.factors.items()})
        problems = []
        for name, tensor in self.factors.items():
            if str(tensor.dtype) not in _FLOAT_NAMES:
                problems.append(f"{name!r} has dtype {tensor.dtype}, not a float that adapters use")
            elif not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                problems.append(f"{name!r} holds {bad} values that are NaN or infinite, of {tensor.numel()}")
        if problems:
            raise AdapterError("factors that cannot be used", problems=problems)

    def __eq__(self, other: object) -> bool:
        """Same metadata and bit-identical factors of the same dtypes."""
        if not isinstance(other, Adapter):
            return NotImplemented
        parts = ("targets", "base", "training", "extra")
        return (
            all(_plain(getattr(self, part)) == _plain(getattr(other, part)) for part in parts)
            and self.factors.keys() == other.factors.keys()
            and all(_same_bits(tensor, other.factors[name]) for name, tensor in self.factors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no value hash

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which the read-only mappings would refuse."""
        return _rebuilt, (dict(self.targets), dict(self.factors), self.base, dict(self.training), self.extra)

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold, over all targets."""
        return sum(target.parameters for target in self.targets.values())

    def factors_of(self, name: str) -> dict[str, Tensor]:
        """The factors of one target by their short names: ``{"lora_A": ..., "lora_B": ...}``.

        Raises:
            UnknownNameError: no such target.
        """
        target = lookup(self.targets, name, what="target")
        return {short: self.factors[f"{name}.{short}"] for short in target.factor_shapes}

    def fold(self, name: str, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The new weight of one target, rounded once; the factors go to the weight's device.

        Raises:
            UnknownNameError: no such target.
            ShapeError: the weight has another shape.
            AdapterError: the sum overflows the weight's dtype.
        """
        target = lookup(self.targets, name, what="target")
        if tuple(weight.shape) != target.shape:
            raise ShapeError(f"{name!r}: the weight is {tuple(weight.shape)}, the adapter needs {target.shape}")
        factors = {short: factor.to(weight.device) for short, factor in self.factors_of(name).items()}
        folded = target.fold(weight, factors, strength=strength)
        if bool((weight.isfinite() & ~folded.isfinite()).any()):
            raise AdapterError(f"{name!r}: the sum overflows {weight.dtype} at strength {strength:g}")
        return folded


def _rebuilt(targets: Any, factors: Any, base: Any, training: Any, extra: Any) -> Adapter:
    return Adapter(targets=targets, factors=factors, base=base, training=training, extra=extra)


PART_VALUES = 1 << 18
"""About how many numbers of a weight are folded at once where memory counts."""


_TILE = 48  # matrix products go by tiles of 8 or 24 rows and sum in another order in what is left at the end


def parts_of(adapter: Adapter, name: str, values: int = PART_VALUES) -> Iterator[tuple[slice, Adapter]]:
    """One target in slices along the first dimension of its weight, each with an adapter that folds it.

    The folded slices are the slices of the folded weight, bit for bit: each number is summed over the same ranks in
    the same order. A weight of which no slice can be folded by itself comes in one.

    Args:
        adapter: the adapter.
        name: of the target.
        values: about how many numbers a slice should hold.

    Raises:
        UnknownNameError: no such target.
    """
    factors = adapter.factors_of(name)
    target = adapter.targets[name]
    length = target.shape[0]
    rows = max(values // math.prod(target.shape[1:]) // _TILE, 1) * _TILE
    apart = target._layer.slices == "rows" or (target._layer.slices == "columns" and target._kind.columns_apart)
    for start in range(0, length, rows) if apart else (0,):
        at = slice(start, min(start + rows, length) if apart else length)
        part = target
        if at.stop - start < length:
            part = replace(target, shape=(at.stop - start, *target.shape[1:]), groups=1)
        mine = {}
        for short, shape in part.factor_shapes.items():
            axes = zip(shape, factors[short].shape, strict=True)  # the sliced one is the one that is shorter here
            mine[f"{name}.{short}"] = factors[short][tuple(slice(None) if a == b else at for a, b in axes)]
        yield at, Adapter(targets={name: part}, factors=mine, base=adapter.base)


def check_strength(strength: float) -> float:
    """The strength as a float.

    Raises:
        ConfigError: not a finite number.
    """
    if not _is_number(strength):
        raise ConfigError(f"strength is {strength!r}, it must be a finite number")
    return float(strength)


def check_factors(targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse targets and factors that do not belong together; needs names and shapes only.

    Args:
        targets: by weight name.
        shapes: of the factors, by full name: ``"conv1.weight.lora_A"``.

    Raises:
        AdapterError: no targets, or factors missing or left over; all of them are listed.
        ShapeError: shapes that rank and weight shape do not give; all of them are listed.
    """
    if not targets:
        raise AdapterError("an adapter needs at least one target")
    expected = {f"{name}.{short}": shape for name, t in targets.items() for short, shape in t.factor_shapes.items()}
    problems = [f"{name!r} is missing" for name in expected if name not in shapes]
    problems += [f"{name!r} belongs to no target" for name in shapes if name not in expected]
    if problems:
        raise AdapterError("targets and factors do not match", problems=problems)
    problems = [
        f"{name!r} has the shape {shapes[name]}, rank and weight need {shape}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if problems:
        raise ShapeError("factors of a wrong shape", problems=problems)


_FLOAT_NAMES = tuple(f"torch.{TORCH_DTYPES[code]}" for code in FLOAT_DTYPES)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of float64
        return False


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))
