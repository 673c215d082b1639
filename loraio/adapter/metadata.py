"""Describe an adapter without its tensors; imports no torch.

These are frozen data, checked on construction, so that a file's header can be checked in a tenth of a second."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loraio.adapter.kinds import KINDS, Kind
from loraio.adapter.layers import LAYER_TYPES, LayerType
from loraio.errors import AdapterError, ConfigError, ShapeError
from loraio.files.integrity import is_sha256
from loraio.registry import lookup

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraio.adapter.folding import SlicedFold


SCALE_RULES: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}
"""Scales from alpha and rank. The second is rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""


FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes that base weights and factors may have."""


WHOLE_DTYPES = (*FLOAT_DTYPES, "I64")
"""Dtypes that whole tensors may have; the integers count batches."""


ROLES = ("bias", "head", "layer", "norm")
"""Purposes of whole tensors: a layer's bias, a head of the adapter's own, any other layer, normalisation layers."""


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
        kind: a name in `loraio.adapter.kinds.KINDS`.
        scale_rule: a name in `SCALE_RULES`.
        sketch: a few numbers that tell how far another weight is, `loraio.bases.sketches.sketch`; may be empty.
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
        if not is_sha256(self.base_sha256):
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
        """Factor of the product, without strength."""
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
        """Number of parameters in the factors."""
        return sum(math.prod(shape) for shape in self.factor_shapes.values())

    @property
    def saves_nothing(self) -> bool:
        """True if the factors hold at least as many numbers as the base weight."""
        return self.parameters >= math.prod(self.shape)

    @property
    def largest_saving_rank(self) -> int:
        """Largest rank at which the factors hold fewer numbers than the base weight; 0 if no rank does."""
        ranks = range(1, min(self.matrix_shape) + 1)  # beyond the rank that a matrix can have nothing is saved
        return bisect.bisect_left(ranks, True, key=lambda rank: replace(self, rank=rank).saves_nothing)

    @property
    def _layer(self) -> LayerType:
        return LAYER_TYPES[self.layer]

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    def fold(
        self, weight: Tensor, factors: Mapping[str, Tensor], *, strength: float = 1.0, exact: bool = True
    ) -> Tensor:
        """Return the new weight, summed in float64 and rounded once. Merge, attach and verify all use this.

        On the CPU the bits of a float64 weight depend on the values alone: its sums have one order on every processor
        and for any number of threads. Narrower weights are summed by the library of matrix products, in an order of
        its own. Rounding hides the order, unless a float64 sum lies beside a tie: with two orders about one float32
        weight in 1e9 differs, one float16 weight in 1e13. Compiled programs and accelerators also have their own order.

        Args:
            weight: the base weight, ``shape``, any float dtype and device.
            factors: by short name, same device, any float dtype.
            strength: multiplies the scale; 0 gives the base weight's bits.
            exact: false sums in float32 where the weight's dtype has no more: faster, and off by up to (r + 3) * 2**-24
                of the sum of the terms' magnitudes, which is many units in the last place where they cancel.

        Returns:
            a new tensor, shape, dtype, device and memory format of ``weight``, without gradient.
        """
        import torch

        from loraio.adapter.rounding import round_once

        if strength == 0:
            return weight.detach().clone()
        with torch.no_grad():
            if weight.device.type == "mps" and exact:  # has no float64
                moved = {name: factor.cpu() for name, factor in factors.items()}
                return self.fold(weight.cpu(), moved, strength=strength).to(weight.device)
            sliced = self.sliced_fold(weight, factors, strength=strength, exact=exact)
            if sliced is not None:
                return sliced.write(torch.empty_like(weight))  # with its strides: channels_last runs other kernels
            folded = self._fold_in(_sums(weight, exact), weight, factors, strength)
            folded = round_once(folded, weight.dtype) if exact else folded.to(weight.dtype)
            return folded if folded.stride() == weight.stride() else torch.empty_like(weight).copy_(folded)

    def sliced_fold(
        self, weight: Tensor, factors: Mapping[str, Tensor], *, strength: float = 1.0, exact: bool = True
    ) -> SlicedFold | None:
        """Prepare the fold that `fold` makes; return None if the memory is not plain memory of the CPU.

        An accelerator gains nothing from slices.
        """
        from loraio.adapter.folding import SlicedFold
        from loraio.adapter.rounding import is_plain_memory

        if not is_plain_memory(weight, *factors.values()):
            return None
        return SlicedFold(
            weight.detach(),
            factors,
            layer=self._layer,
            kind=self._kind,
            groups=self.groups,
            scale=self.scale,
            strength=strength,
            wide=_sums(weight, exact),
        )

    def stays_finite(self, peaks: Mapping[str, float], dtype: torch.dtype, *, strength: float) -> bool:
        """Return True if the factors alone show that `fold` makes no finite number infinite.

        Args:
            peaks: the largest magnitude in each factor, or more, by short name.
            dtype: of the weight.
            strength: multiplies the scale.
        """
        import torch

        limits = torch.finfo(dtype)
        room = limits.max * (limits.eps / 4)  # half of the spacing, and half of that for rounding on the way
        return self._kind.stays_finite(peaks, rank=self.rank, scale=self.scale, strength=strength, room=room)

    def slices(self) -> list[slice]:
        """Cut the weight for a fold on the CPU, as `loraio.adapter.folding.slices` does."""
        from loraio.adapter.folding import slices

        return slices(self.shape, self._layer, self._kind)

    def part(self, at: slice, factors: Mapping[str, Tensor]) -> tuple[Target, dict[str, Tensor]]:
        """Return one of the `slices` as a target of its own, with its share of the factors."""
        from loraio.adapter.folding import share

        if at.stop - at.start == self.shape[0]:
            return self, dict(factors)
        part = replace(self, shape=(at.stop - at.start, *self.shape[1:]), groups=1)
        return part, share(at, factors, self._layer, self._kind)

    def fold_for_training(self, weight: Tensor, factors: Mapping[str, Tensor], *, strength: float = 1.0) -> Tensor:
        """Return the new weight, differentiable, computed in float32 (float64 for float64 weights).

        Equal to `fold` up to the rounding of that dtype; arguments and result as there, with gradients.
        """
        import torch

        dtype = torch.promote_types(weight.dtype, torch.float32)
        return self._fold_in(dtype, weight, factors, strength).to(weight.dtype)

    def _fold_in(self, dtype: Any, weight: Tensor, factors: Mapping[str, Tensor], strength: float) -> Tensor:
        import torch

        matrix = self._layer.to_matrix(weight.to(dtype), self.groups)
        cast = {name: factor.to(dtype) for name, factor in factors.items()}
        kind = weight.device.type
        if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(kind):  # torch 2.6 cannot trace it
            kind = "cpu"
        with torch.autocast(kind, enabled=False):  # would round the base weight itself to bfloat16
            folded = self._kind.fold(matrix, cast, scale=self.scale, strength=strength)
        return self._layer.from_matrix(folded, weight.shape, self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTensor:
    """One tensor of the base that the adapter replaces: everything about it but its name and its values.

    Attributes:
        role: a word of `ROLES`.
        shape: of the adapter's own tensor.
        dtype: of it and of the base's, as a safetensors code.
        base_sha256: of the bytes of the base's tensor, as in `Target`.
        base_shape: of the base's tensor. A head may have another number of outputs, which is its first size.
        extra: keys of the file that this version does not know.

    Raises:
        AdapterError: a value is out of range, or the shapes do not go together.
    """

    role: str
    shape: tuple[int, ...]
    dtype: str
    base_sha256: str
    base_shape: tuple[int, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise AdapterError(f"role is {self.role!r}, it must be one of {', '.join(ROLES)}")
        for name in ("shape", "base_shape"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(_is_size(size) for size in value):
                raise AdapterError(f"{name} is {value!r}, it must be a tuple of whole numbers from 1 to 2**63 - 1")
        if self.dtype not in WHOLE_DTYPES:
            raise AdapterError(f"dtype is {self.dtype!r}, it must be one of {', '.join(WHOLE_DTYPES)}")
        if not is_sha256(self.base_sha256):
            raise AdapterError(f"base_sha256 is {self.base_sha256!r}, it must be 64 hexadecimal digits")
        same = self.shape == self.base_shape
        resized = len(self.shape) == len(self.base_shape) >= 1 and self.shape[1:] == self.base_shape[1:]
        if not same and not (self.role == "head" and resized):
            raise AdapterError(
                f"shape is {self.shape}, the base has {self.base_shape}: only a head's number of outputs may differ"
            )

    @property
    def parameters(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReference:
    """Which base model an adapter was trained on.

    Attributes:
        sha256: digest of the whole state dict, as `loraio.bases.identity.state_sha256`.
        network: the network's name, None when it has none.
        network_args: keyword options that the network is built with, plain JSON values.
        heads: layers of the network with another number of outputs than it is built with, and that number.
        sha256_without_statistics: the same digest without running statistics of normalisation layers; None where
            the network has none.
        extra: keys of the file that this version does not know.
    """

    sha256: str
    network: str | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    sha256_without_statistics: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sha256", "sha256_without_statistics"):
            value = getattr(self, name)
            absent = value is None and name != "sha256"
            if not absent and not is_sha256(value):
                raise AdapterError(f"the base's {name} is {value!r}, it must be 64 hexadecimal digits")
        if not isinstance(self.network_args, Mapping):
            raise AdapterError(f"the base's network_args are {self.network_args!r}, they must be an object")
        check_heads(self.heads, what="the base's heads")
        if self.network is not None and not isinstance(self.network, str):
            raise AdapterError(f"the base's network is {self.network!r}, it must be a name or null")


def _sums(weight: Tensor, exact: bool) -> torch.dtype:
    """Return the dtype of a weight's sums."""
    import torch

    return torch.float64 if exact else torch.promote_types(weight.dtype, torch.float32)


def check_strength(strength: float) -> float:
    """Return the strength as a float.

    Raises:
        ConfigError: not a finite number.
    """
    if not _is_number(strength):
        raise ConfigError(f"strength is {strength!r}, it must be a finite number")
    return float(strength)


def check_heads(heads: Any, *, what: str) -> None:
    """Refuse heads that are not an object of layer names and numbers of outputs.

    Raises:
        AdapterError: it is not.
    """
    if not isinstance(heads, Mapping) or not all(isinstance(name, str) and _is_size(n) for name, n in heads.items()):
        raise AdapterError(f"{what} are {heads!r}, they must be an object of names and numbers of outputs")


def check_tensors(
    targets: Mapping[str, Target], whole: Mapping[str, WholeTensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse metadata and tensors that do not belong together; needs names and shapes only.

    Args:
        targets: by weight name.
        whole: by tensor name.
        shapes: of factors and whole tensors, by full name: ``"conv1.weight.lora_A"``, ``"fc.weight"``.

    Raises:
        AdapterError: no targets, a target that is replaced too, or tensors missing or left over; all are listed.
        ShapeError: shapes that the metadata do not give; all of them are listed.
    """
    if not targets:
        raise AdapterError("an adapter needs at least one target")
    both = sorted(targets.keys() & whole.keys())
    if both:
        raise AdapterError(f"{both[0]!r} is a target and a whole tensor")
    expected = {f"{name}.{short}": shape for name, t in targets.items() for short, shape in t.factor_shapes.items()}
    expected |= {name: tensor.shape for name, tensor in whole.items()}
    problems = [f"{name!r} is missing" for name in expected if name not in shapes]
    problems += [f"{name!r} belongs to no target" for name in shapes if name not in expected]
    if problems:
        raise AdapterError("targets and tensors do not match", problems=problems)
    problems = [
        f"{name!r} has the shape {shapes[name]}, "
        f"{'its metadata ask for' if name in whole else 'rank and weight need'} {shape}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if problems:
        raise ShapeError("tensors of a wrong shape", problems=problems)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of float64
        return False
