"""Read and write files of LyCORIS: kohya's layout, with methods of its own.

LoCon with and without DoRA, whole changes (``diff``) and normalisation layers are read as they are. LoHa and LoKr
become plain pairs on request. Methods that multiply the weight, or depend on it, have no form here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraio.adapter import Target
from loraio.adapter.layers import tensor_name
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Added, Factors, ForeignLayer, Options, Values
from loraio.formats.kohya import ALPHA, DOWN, MID, PREFIXES, UP, Kohya, NamedWriting, check_kernel, has_only
from loraio.formats.products import (
    DIFF,
    HADA,
    HADA_CORES,
    KERNELS,
    KRON,
    alpha_at,
    hadamard_rank,
    kronecker_ranks,
    matrix_shape,
    nearest_pair,
    product_of,
    relative_error,
)
from loraio.formats.reading import Reading
from loraio.formats.report import settings, tensors
from loraio.formats.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

_DORA, _DIFF_BIAS = "dora_scale", "diff_b"

_NORM = {"w_norm": "weight", "b_norm": "bias"}

_OTHER_METHODS = {
    "oft_blocks": "OFT multiplies the weight by a rotation",
    "on_input": "(IA)3 multiplies the weight's rows or columns",
    "a1.weight": "GLoRA multiplies the weight itself",
    "lambda_layer": "T-LoRA goes by the time step",
    "bias_indices": "a sparse change of the weight beside the factors",
}
"""Slots of methods that factors cannot hold, and why."""

_BY_SLOT_ALONE = (*HADA, *KRON, _DORA)

_EPS = 2.0**-23
"""The number that LyCORIS adds to the length of a row: DoRA's lengths are float32 there."""

_NEAR = 2.0**-20
"""The largest relative effect of it that is not reported: 8 units in the last place of float32."""


class Lycoris(Kohya):
    """LyCORIS: its generic wrapper, and its module for sd-scripts."""

    name = "lycoris"
    takes: tuple[str, ...] = ("prefix", "as_full_delta")
    tool = "LyCORIS"
    prefix = "lycoris"
    network_module = "lycoris.kohya"
    layers = ("Linear", "Conv1d", "Conv2d", "Conv3d")
    ignores_dilation = False

    def recognise(self, source: Source) -> str | None:
        module = source.metadata.get("ss_network_module", "")
        for key, info in source.tensors.items():
            name, _, slot = key.partition(".")
            prefixed = name.startswith(tuple(f"{prefix}_" for prefix in PREFIXES))
            if slot in _BY_SLOT_ALONE or (prefixed and slot in (DIFF, *_NORM, *_OTHER_METHODS)):
                return f"the key {key!r}"
            if slot not in (DOWN, UP):
                continue
            if name.startswith(f"{self.prefix}_"):
                return f"the key {key!r}"
            if module.startswith("lycoris"):
                return f"the metadata, which say ss_network_module {module!r}, and the key {key!r}"
            if len(info.shape) in (3, 5):
                return f"the key {key!r} of a convolution with {len(info.shape) - 2} dimensions"
        return None

    def read_module(self, name: str, slots: Mapping[str, str], reading: Reading) -> None:
        """Read all keys of one mangled name; the methods are tried in LyCORIS' order."""
        kind = "dora" if _DORA in slots else "lora"
        named = [f"{slots[slot]!r}: {why}" for slot, why in _OTHER_METHODS.items() if slot in slots]
        if named:
            reading.refusals += named
        elif UP in slots or DOWN in slots:
            if has_only(slots, (DOWN, UP, MID, ALPHA, _DORA), "no slot of LoCon", reading):
                self.read_pair(name, slots, reading, kind=kind)
        elif HADA[0] in slots:
            if has_only(slots, (*HADA, *HADA_CORES, ALPHA, _DORA), "no slot of LoHa", reading):
                rank = hadamard_rank(name, slots, reading)
                if rank is not None:
                    product = f"LoHa of rank {rank}; a pair of rank {rank**2} is exact"
                    self.add_layer(name, slots, rank, reading, kind=kind, product=product)
        elif not slots.keys().isdisjoint(KRON):
            if has_only(slots, (*KRON, ALPHA, _DORA), "no slot of LoKr", reading):
                self._read_kronecker(name, slots, reading, kind)
        elif DIFF in slots:
            if has_only(slots, (DIFF, _DIFF_BIAS, ALPHA), "no slot of a whole change", reading):
                self._read_diff(name, slots, reading)
        elif "w_norm" in slots:
            if has_only(slots, (*_NORM, ALPHA), "no slot of a normalisation layer", reading):
                reading.added += [
                    Added(module=name, parameter=parameter, key=slots[slot])
                    for slot, parameter in _NORM.items()
                    if slot in slots
                ]
                self._ignore_alpha(slots, reading)
        else:
            reading.refusals.append(f"{next(iter(slots.values()))!r} is no key that LyCORIS knows")

    def zero_alpha(self, key: str, rank: int, reading: Reading) -> int | None:
        """Take it as r, as LyCORIS does, attached and merged."""
        reading.lines += settings([key], "changed", f"0, which LyCORIS takes as r, {rank}")
        return rank

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        # since release 4 grouped convolutions have modules too
        if layer not in self.layers:
            return "LyCORIS has no LoCon for this layer type"
        return None if kind in ("lora", "dora") else f"LyCORIS has no {kind}"

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        if layer.product or DIFF in values:
            made = self._from_product(layer, values, place, options)
        else:
            made = super().factors(layer, values, place, options)
        if _DORA not in values:
            return made
        length = values[_DORA].shape
        if tuple(length[:1]) != tuple(place.weight.shape[:1]) or math.prod(length[1:]) != 1:
            raise AdapterError(
                f"{layer.slots[_DORA]!r} is {tuple(length)}: lengths of the columns have no form here, those of the"
                f" {place.weight.shape[0]} rows do"
            )
        factors = {**made.values, "magnitude": values[_DORA].flatten()}
        rank, alpha = made.rank or layer.rank, layer.alpha if made.alpha is None else made.alpha
        assert alpha is not None
        notes = [made.note, _short_rows(place.weight, factors["lora_A"], factors["lora_B"], alpha / rank)]
        return replace(made, values=factors, note="; ".join(note for note in notes if note))

    def write_layer(self, mangled: str, name: str, target: Target, place: TargetModule, writing: NamedWriting) -> None:
        """Add a pair with its lengths, or the whole change on request."""
        if writing.context.options.as_full_delta:
            self._write_diff(mangled, name, target, place, writing)
            return
        super().write_layer(mangled, name, target, place, writing)
        factors = writing.adapter.factors_of(name)
        if "magnitude" not in factors:
            return
        note = ""
        if writing.context.state is not None:
            note = _short_rows(writing.context.state[name], factors["lora_A"], factors["lora_B"], target.scale)
        ones = (1,) * (len(target.shape) - 1)
        writing.tensors[f"{mangled}.{_DORA}"] = factors["magnitude"].reshape(-1, *ones)
        writing.lines += tensors([f"{name}.magnitude"], "changed" if note else "carried", note)

    def paths_of_whole(self, writing: NamedWriting) -> set[str]:
        """Return the normalisation layers that LyCORIS adapts too and that are replaced."""
        from torch import nn

        if writing.context.state is None:
            return set()
        return {
            path
            for path, module in writing.net.named_modules()
            if isinstance(module, nn.LayerNorm | nn.GroupNorm)
            and any(tensor_name(path, last) in writing.adapter.whole for last in _NORM.values())
        }

    def write_whole(self, writing: NamedWriting) -> None:
        """Add normalisation layers as differences; biases go with whole changes, and nothing else has a place."""
        for path in sorted(self.paths_of_whole(writing)):
            self._write_norm(path, writing)
        names = sorted(set(writing.adapter.whole) - writing.held)
        whole_changes = writing.context.options.as_full_delta
        hint = "" if whole_changes else "; of adapted layers it holds biases with --as-full-delta"
        writing.lines += tensors(names, "lost", f"LyCORIS replaces no tensor of the base{hint}")

    def metadata(self, writing: NamedWriting) -> dict[str, str]:
        """Return the record that LyCORIS' own training writes; it has no hashes."""
        return self.record(writing)

    def _read_kronecker(self, name: str, slots: Mapping[str, str], reading: Reading, kind: str) -> None:
        ranks = kronecker_ranks(name, slots, reading)
        if ranks is None:
            return
        rank, exact = ranks
        product = f"LoKr{f' of rank {rank}' if rank else ''}; a pair of rank {exact} is exact"
        if rank:
            self.add_layer(name, slots, rank, reading, kind=kind, product=product)
            return
        # two whole matrices have no rank of their own, and LyCORIS scales them by 1 at any alpha
        self._ignore_alpha(slots, reading)
        own = {slot: key for slot, key in slots.items() if slot != ALPHA}
        reading.layers.append(ForeignLayer(name=name, slots=own, rank=exact, alpha=exact, kind=kind, product=product))

    def _read_diff(self, name: str, slots: Mapping[str, str], reading: Reading) -> None:
        shape = reading.shape(slots[DIFF])
        if len(shape) < 2 or 0 in shape:
            reading.refusals.append(f"{slots[DIFF]!r} is {shape}, the change of no weight of a layer")
            return
        rank = min(shape[0], math.prod(shape[1:]))
        self._ignore_alpha(slots, reading)
        own = {("bias" if slot == _DIFF_BIAS else slot): key for slot, key in slots.items() if slot != ALPHA}
        reading.layers.append(ForeignLayer(name=name, slots=own, rank=rank, alpha=rank))

    def _ignore_alpha(self, slots: Mapping[str, str], reading: Reading) -> None:
        if ALPHA in slots:
            reading.not_used[slots[ALPHA]] = "LyCORIS scales nothing by it here"

    def _from_product(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        infinite = [layer.slots[slot] for slot, value in values.items() if not value.isfinite().all()]
        if infinite:
            raise AdapterError(f"{infinite[0]!r} holds NaN or infinity")
        own, found = (place.weight.shape[0], place.weight[0].numel()), matrix_shape(values)
        if own != found:
            raise AdapterError(f"it changes a weight of {found}, {place.name!r} of the base is {own}, as a matrix")
        exact = {slot: value.double() for slot, value in values.items()}
        for slot in KERNELS:
            if slot in values:
                check_kernel(values[slot].shape[2:], layer.slots[slot], place)
        assert layer.alpha is not None
        scale = layer.alpha / layer.rank
        asked = options.rank if options.approximate and options.rank is not None else layer.rank
        pair = nearest_pair(product_of(exact), asked)
        alpha = layer.alpha if pair.rank == layer.rank else alpha_at(scale, pair.rank)
        wrong = self.misuse(place.module)
        notes = [pair.note]
        if alpha / pair.rank != scale:
            notes.append("its scale is off by a unit in float64's last place")
        if wrong is not None:
            notes.append(f"as LyCORIS merges it; attached, it {wrong}")
        bias = exact.get("bias")
        return Factors(
            values={"lora_A": pair.down, "lora_B": pair.up},
            rank=pair.rank,
            alpha=alpha,
            bias=bias,
            note="; ".join(notes),
        )

    def _write_norm(self, path: str, writing: NamedWriting) -> None:
        import torch

        assert writing.context.state is not None
        for slot, last in _NORM.items():
            name, key = tensor_name(path, last), f"{writing.names[path]}.{slot}"
            if name in writing.adapter.whole:
                self._write_difference(name, key, writing)
            elif last == "weight":  # LyCORIS knows the layer by this one
                writing.tensors[key] = torch.zeros_like(writing.context.state[name], dtype=torch.float32)

    def _write_difference(self, name: str, key: str, writing: NamedWriting) -> None:
        """Add the difference of a replaced tensor from the base's, in float32, in which LyCORIS computes."""
        import torch

        from loraio.adapter.rounding import round_once

        assert writing.context.state is not None
        base, new = writing.context.state[name], writing.adapter.tensors[name]
        if base.shape != new.shape or not base.is_floating_point():
            return
        difference = (new.double() - base.double()).to(torch.float32)
        off = relative_error(new.double(), round_once(base.double() + difference.double(), base.dtype).double())
        exact = f", relative error {off:.2g}" if off else ""
        writing.tensors[key] = difference
        writing.held.add(name)
        writing.lines += tensors([name], "changed", f"as its difference from the base's, in {key}{exact}")

    def _write_diff(self, mangled: str, name: str, target: Target, place: TargetModule, writing: NamedWriting) -> None:

        state, adapter = writing.context.state, writing.adapter
        if state is None:
            writing.problems.append(f"{name!r}: its whole change is that of a base: --base")
            return
        base = state[name].double()
        factors = {short: factor.double() for short, factor in adapter.factors_of(name).items()}
        delta = target.fold(base, factors) - base if target.kind != "lora" else _change(target, factors)
        writing.tensors[f"{mangled}.{DIFF}"] = delta.float()
        error = relative_error(delta, delta.float().double())
        how = f"as the whole change, rounded once to float32, relative error {error:.2g}"
        writing.lines += tensors([f"{name}.{short}" for short in factors], "changed", how)
        said = [f"{name}.{setting}" for setting in ("alpha", "kind", "rank")]
        writing.lines += settings(said, "changed", "in the whole change")
        bias = tensor_name(place.path, "bias")
        if bias in adapter.whole:
            self._write_difference(bias, f"{mangled}.{_DIFF_BIAS}", writing)


def _change(target: Target, factors: Mapping[str, Tensor]) -> Tensor:
    return (target.scale * (factors["lora_B"] @ factors["lora_A"])).reshape(target.shape)


def _short_rows(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> str:
    """Return a note on the effect of LyCORIS' epsilon on the shortest row; empty if it is too small to matter."""
    if lora_A.shape != (lora_B.shape[1], weight[0].numel()) or len(lora_B) != len(weight):
        return ""  # does not fit the base, which is refused elsewhere
    changed = weight.detach().double().flatten(1) + scale * (lora_B.double() @ lora_A.double())
    lengths = changed.norm(dim=1)
    lengths = lengths[lengths > 0]
    off = _EPS / lengths.min().item() if len(lengths) else 0.0
    if off <= _NEAR:
        return ""
    return f"LyCORIS adds {_EPS:.2g} to the length of each row, by which its values are up to {off:.2g} smaller"
