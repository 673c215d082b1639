"""Assemble an adapter from the tensors of another tool's file, with a line on the fate of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraio.adapter.layers import AFFINE, HEAD_LAYERS, STATISTICS, tensor_name
from loraio.adapter.metadata import FLOAT_DTYPES, WHOLE_DTYPES, BaseReference, Target, WholeTensor
from loraio.bases.targets import TargetModule, normalisation_modules
from loraio.errors import AdapterError
from loraio.files.tensors import dtype_code, same_bytes, tensor_sha256
from loraio.formats.foreign import Factors, ForeignLayer
from loraio.formats.native import NativeMetadata
from loraio.formats.report import Line, tensors
from loraio.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


class Assembly:
    """An adapter in the making, with its report.

    Args:
        base: the network, without an adapter.
        state: the base's tensors by name.
        lines: of the report so far.
    """

    def __init__(self, base: nn.Module, state: Mapping[str, Tensor], lines: Iterable[Line] = ()) -> None:
        self.state = state
        self.modules = dict(base.named_modules())
        self.targets: dict[str, Target] = {}
        self.factors: dict[str, Tensor] = {}
        self.whole: dict[str, WholeTensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.lines: list[Line] = list(lines)
        self.problems: list[str] = []
        self._base = base
        self._norms = normalisation_modules(base)
        self._deltas: list[tuple[str, str, Tensor]] = []

    def add_layer(self, layer: ForeignLayer, place: TargetModule, made: Factors) -> None:
        """Add one adapted weight."""
        from loraio.bases.sketches import sketch

        weight = self.state[place.name]
        alpha = made.alpha if made.alpha is not None else layer.alpha
        assert alpha is not None  # it was given, or the file would have been refused
        code = dtype_code(weight.dtype)
        if code not in FLOAT_DTYPES:
            self.problems.append(f"{place.name!r} of the base is {code}, not one of {', '.join(FLOAT_DTYPES)}")
            return
        target = Target(
            kind=layer.kind,
            rank=made.rank or layer.rank,
            alpha=alpha,
            scale_rule=layer.scale_rule,
            shape=tuple(weight.shape),
            dtype=code,
            layer=place.layer.name,
            groups=place.groups,
            base_sha256=tensor_sha256(weight),
            sketch=sketch(weight),
        )
        for short, shape in target.factor_shapes.items():
            found = tuple(made.values[short].shape)
            if found != shape:
                self.problems.append(f"{layer.name!r}: {short} is {found}, {place.name!r} of the base needs {shape}")
        self.targets[place.name] = target
        self.factors |= {f"{place.name}.{short}": value.contiguous() for short, value in made.values.items()}
        fate = "changed" if made.note else "carried"
        self.lines += tensors((key for slot, key in layer.slots.items() if slot != "bias"), fate, made.note)
        if made.bias is not None:
            self.add_delta(place.path, "bias", layer.slots["bias"], made.bias)

    def add_whole(self, name: str, key: str, value: Tensor, *, module_saved: bool) -> None:
        """Put one tensor in the place of the base's; one that equals the base's needs no place."""
        base = self.state.get(name)
        if base is None:
            self.problems.append(f"{key!r}: the base has no {name!r}{nearest(name, self.state)}")
            return
        how = ""
        if value.dtype != base.dtype and value.is_floating_point() and base.is_floating_point():
            how = f"from {value.dtype} to the base's {base.dtype}"
            value = value.to(base.dtype)
        if value.dtype != base.dtype or dtype_code(base.dtype) not in WHOLE_DTYPES:
            self.problems.append(f"{key!r} is {value.dtype}, {name!r} of the base {base.dtype}")
            return
        if same_bytes(value, base):
            self.lines += tensors([key], "carried", "as in the base")
            return
        if name in self.targets:
            self.problems.append(f"{key!r} is not the base's {name!r}: the adapter belongs to another base")
            return
        try:
            self._replace(name, value, self._role(name, module_saved))
        except AdapterError as error:
            self.problems.append(f"{key!r}: {error.message}")
            return
        self.lines += tensors([key], "changed" if how else "carried", how)

    def add_delta(self, path: str, parameter: str, key: str, delta: Tensor) -> None:
        """Note a tensor, float64, that is to be added to a module's parameter."""
        self._deltas.append((tensor_name(path, parameter), key, delta))

    def apply_deltas(self) -> None:
        """Replace each tensor to which something is added by the sum; strength does not scale it."""
        from loraio.adapter.rounding import round_once

        for name, key, delta in self._deltas:
            base = self.tensors.get(name, self.state.get(name))
            path, _, last = name.rpartition(".")
            if base is None:
                self.lines += tensors([key], "lost", f"the layer {path!r} of the base has no {last} to add it to")
                continue
            if delta.shape != base.shape:
                self.problems.append(f"{key!r} is {tuple(delta.shape)}, {name!r} of the base {tuple(base.shape)}")
                continue
            self._replace(name, round_once(base.double() + delta, base.dtype), self._role(name, module_saved=False))
            self.lines += tensors([key], "changed", f"added to {name!r}, which is replaced whole, at any strength")

    def belong_to(self, kept: NativeMetadata) -> None:
        """Take the facts about the adapter's own base from kept metadata, not from this base."""
        for name, target in self.targets.items():
            own = kept.targets.get(name)
            if own is not None and own.shape == target.shape:
                self.targets[name] = replace(target, dtype=own.dtype, sketch=own.sketch, base_sha256=own.base_sha256)
        for name, whole in self.whole.items():
            told = kept.whole.get(name)
            if told is not None and told.base_shape == whole.base_shape:
                self.whole[name] = replace(whole, base_sha256=told.base_sha256)

    def base_reference(self) -> BaseReference:
        """Return the network and the digests of the base."""
        from loraio.bases.identity import base_reference

        return base_reference(self.state, model=self._base)

    def _replace(self, name: str, value: Tensor, role: str) -> None:
        base = self.state[name]
        self.whole[name] = WholeTensor(
            role=role,
            shape=tuple(value.shape),
            dtype=dtype_code(base.dtype),
            base_sha256=tensor_sha256(base),
            base_shape=tuple(base.shape),
        )
        self.tensors[name] = value.contiguous()

    def _role(self, name: str, module_saved: bool) -> str:
        path, _, last = name.rpartition(".")
        module = self.modules.get(path)
        if path in self._norms and last in (*AFFINE, *STATISTICS):
            return "norm"
        headlike = any(cls.__name__ in HEAD_LAYERS for cls in type(module).__mro__)
        if module_saved and headlike and getattr(module, "groups", 1) == 1:
            return "head"
        return "bias" if last.endswith("bias") else "layer"
