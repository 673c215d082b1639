"""The adapter itself: frozen data, checked on construction. No files and no modules here.

`Target` is the metadata of one adapted weight and needs no torch to be imported, so that a file's header can be
checked in a tenth of a second. `Adapter` adds the factor tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loraio.adapter.metadata import FLOAT_DTYPES, WHOLE_DTYPES, BaseReference, Target, WholeTensor, check_tensors
from loraio.errors import AdapterError, ShapeError
from loraio.files.tensors import TORCH_DTYPES, same_bytes
from loraio.registry import lookup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """The result of one training run, with all that is needed to use it.

    Attributes:
        targets: by the weight's state-dict name, in the model's order when trained, in name order when read.
        factors: by the weight's name and the factor's: ``"conv1.weight.lora_A"``. Any device; do not write to them.
        base: the base model that it belongs to.
        whole: tensors of the base that it replaces altogether, by their state-dict names: a new head, statistics of
            normalisation layers. Strength does not enter: they are replaced, or they are not.
        tensors: what they are replaced by, under the same names.
        training: how it came to be: data set, class, hyperparameters, results; plain JSON values.
        extra: top-level keys of the file that this version does not know.

    Raises:
        AdapterError: no targets, a tensor missing, left over or not finite, or of a dtype that it cannot have.
        ShapeError: a tensor's shape is not what its metadata ask for.
    """

    targets: Mapping[str, Target]
    factors: Mapping[str, Tensor]
    base: BaseReference
    whole: Mapping[str, WholeTensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("targets", "factors", "whole", "tensors", "training"):
            object.__setattr__(self, part, MappingProxyType(dict(getattr(self, part))))
        clash = sorted(self.factors.keys() & self.tensors.keys())
        if clash:
            raise AdapterError(f"{clash[0]!r} is a factor and a whole tensor")
        own = self.all_tensors
        check_tensors(self.targets, self.whole, {name: tuple(tensor.shape) for name, tensor in own.items()})
        problems = []
        for name, tensor in own.items():
            code = _CODES.get(str(tensor.dtype))
            if name in self.whole and code != self.whole[name].dtype:
                problems.append(f"{name!r} has dtype {tensor.dtype}, it was to have {self.whole[name].dtype}")
            elif name not in self.whole and code not in FLOAT_DTYPES:
                problems.append(f"{name!r} has dtype {tensor.dtype}, not a float that adapters use")
            elif not _is_finite(tensor):
                bad = int((~tensor.isfinite()).sum())
                problems.append(f"{name!r} holds {bad} values that are NaN or infinite, of {tensor.numel()}")
        if problems:
            raise AdapterError("tensors that cannot be used", problems=problems)

    def __eq__(self, other: object) -> bool:
        """Same metadata and bit-identical tensors of the same dtypes."""
        if not isinstance(other, Adapter):
            return NotImplemented
        parts = ("targets", "base", "whole", "training", "extra")
        own, others = self.all_tensors, other.all_tensors
        return (
            all(_plain(getattr(self, part)) == _plain(getattr(other, part)) for part in parts)
            and own.keys() == others.keys()
            and all(same_bytes(tensor, others[name]) for name, tensor in own.items())
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no value hash

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which the read-only mappings would refuse."""
        parts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return _rebuilt, ({name: _plain(part) for name, part in parts.items()},)

    @property
    def parameters(self) -> int:
        """Number of parameters in the factors of all targets."""
        return sum(target.parameters for target in self.targets.values())

    @property
    def all_tensors(self) -> dict[str, Tensor]:
        """Factors and whole tensors, as they lie in a file."""
        return {**self.factors, **self.tensors}

    @property
    def heads(self) -> dict[str, int]:
        """Layers to which the adapter gives another number of outputs, by their names in the model, and that number."""
        return {
            name.rpartition(".")[0]: whole.shape[0]
            for name, whole in self.whole.items()
            if whole.shape != whole.base_shape
        }

    def factors_of(self, name: str) -> dict[str, Tensor]:
        """Return the factors of one target by their short names: ``{"lora_A": ..., "lora_B": ...}``.

        Raises:
            UnknownNameError: no such target.
        """
        target = lookup(self.targets, name, what="target")
        return {short: self.factors[f"{name}.{short}"] for short in target.factor_shapes}

    def fold(self, name: str, weight: Tensor, *, strength: float = 1.0, exact: bool = True) -> Tensor:
        """Return the new weight of one target, rounded once; the factors go to the weight's device.

        Args:
            name: of the target.
            weight: the base weight.
            strength: multiplies the scale.
            exact: as `Target.fold` takes it.

        Raises:
            UnknownNameError: no such target.
            ShapeError: the weight has another shape.
            AdapterError: the sum overflows the weight's dtype.
        """
        from loraio.adapter.overflow import fold_finite

        target = lookup(self.targets, name, what="target")
        if tuple(weight.shape) != target.shape:
            raise ShapeError(f"{name!r}: the weight is {tuple(weight.shape)}, the adapter needs {target.shape}")
        return fold_finite(name, target, weight, self.factors_of(name), strength=strength, exact=exact)

    def replace(self, name: str, base: Tensor) -> Tensor:
        """Copy a whole tensor to the device and dtype of the base's tensor, which it replaces.

        Raises:
            UnknownNameError: no such whole tensor.
        """
        lookup(self.whole, name, what="whole tensor")
        return self.tensors[name].detach().to(base.device, base.dtype, copy=True)


def _rebuilt(parts: dict[str, Any]) -> Adapter:
    return Adapter(**parts)


def parts_of(adapter: Adapter, name: str) -> Iterator[tuple[slice, Adapter]]:
    """Yield the `Target.slices` of one target, each with an adapter that folds that slice, bit for bit.

    Args:
        adapter: the adapter.
        name: of the target.

    Raises:
        UnknownNameError: no such target.
    """
    factors = adapter.factors_of(name)
    for at in adapter.targets[name].slices():
        part, mine = adapter.targets[name].part(at, factors)
        named = {f"{name}.{short}": factor for short, factor in mine.items()}
        yield at, _unchecked({name: part}, named, adapter.base)


def _unchecked(targets: Mapping[str, Target], factors: Mapping[str, Tensor], base: BaseReference) -> Adapter:
    """Make a slice of an adapter without checking its factors again, which would take long."""
    part = object.__new__(Adapter)
    given: dict[str, Any] = {"targets": MappingProxyType(targets), "factors": MappingProxyType(factors), "base": base}
    for entry in fields(Adapter):
        object.__setattr__(part, entry.name, given.get(entry.name, MappingProxyType({})))
    return part


_CODES = {f"torch.{TORCH_DTYPES[code]}": code for code in WHOLE_DTYPES}


def _is_finite(tensor: Tensor) -> bool:
    import torch

    # a sum is finite only where all are; but one of finite numbers may overflow itself
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(tensor.isfinite().all())


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
