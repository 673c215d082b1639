"""Read and write state dicts of minLoRA, with torch parametrizations: ``<module>.parametrizations.weight.0.lora_A``.

Its pairs are of the weight as (first dimension, all others), for any groups. Those of an Embedding are exchanged:
``lora_A @ lora_B`` is the table's change. Files that name A from the output side have the same keys and shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraio.adapter import Target
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Factors, ForeignLayer, Options, Values
from loraio.formats.reading import Reading
from loraio.formats.statedicts import Export, StateDictDialect, at_other_rank, joined

if TYPE_CHECKING:
    from torch import Tensor

_PARAMETER = r"(?:(?P<path>.+)\.)?parametrizations\.(?P<parameter>[^.]+)\."

_ORIGINAL = re.compile(_PARAMETER + "original")

_LAYERS = ("Conv1d", "Conv2d", "Conv3d", "Linear", "Bilinear", "MultiheadAttention", "Embedding")


class MinLora(StateDictDialect):
    """minLoRA, and other parametrizations with its names.

    A layer is a weight, since any parameter may be parametrized; it may have several pairs, which become one.
    """

    name = "minlora"
    tool = "minLoRA"
    own_alpha = "minLoRA's lora_alpha is 1 unless its configuration has another"
    keys = re.compile(_PARAMETER + r"(?P<at>\d+)\.(?P<slot>lora_A|lora_B|lora_dropout_mask)")
    telling = re.compile(_PARAMETER + r"\d+\.lora_[AB]")

    def take(self, key: str, reading: Reading) -> bool:
        match = self.keys.fullmatch(key)
        if match and match["slot"] == "lora_dropout_mask":
            reading.not_used[key] = "ones, which the dropout of training starts from"
        elif match:
            weight = joined(match["path"] or "", match["parameter"])
            reading.take(weight, f"{int(match['at'])}.{match['slot']}", key)
        return match is not None

    def take_whole(self, key: str, reading: Reading) -> None:
        match = _ORIGINAL.fullmatch(key)
        reading.whole[joined(match["path"] or "", match["parameter"]) if match else key] = key

    def read_layer(self, name: str, slots: dict[str, str], reading: Reading) -> None:
        ranks = []
        for at in _places(slots):
            own = {slot.partition(".")[2]: key for slot, key in slots.items() if slot.startswith(f"{at}.")}
            shapes = reading.pair(name, own, "lora_A", "lora_B", of=f" of parametrization {at}")
            if shapes is None:
                continue
            A, B = shapes
            inner = [A[i] for i, j in ((0, 1), (1, 0)) if A[i] == B[j] and A[i]]
            if inner:
                ranks.append(min(inner))
            else:
                reading.refuse_pair(name, A, B)
        if len(ranks) == len(_places(slots)):
            reading.layers.append(ForeignLayer(name=name, slots=slots, rank=sum(ranks), alpha=None))

    def spell(self, place: TargetModule) -> Sequence[str]:
        return (place.name,)

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        if layer not in _LAYERS:
            return "minLoRA's pair would be of the weight as it lies, (in, out ...), which is no pair of (out, in ...)"
        return None if kind == "lora" else f"minLoRA has no {kind}"

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        import torch

        assert layer.alpha is not None
        out, fan_in = place.layer.matrix_shape(place.weight.shape, place.groups)
        pairs = [
            _pair(values[f"{at}.lora_A"], values[f"{at}.lora_B"], out, fan_in, place) for at in _places(layer.slots)
        ]
        ranks = [len(A) for A, _ in pairs]
        if len(pairs) == 1:
            return Factors(values={"lora_A": pairs[0][0], "lora_B": pairs[0][1]}, rank=ranks[0])
        common = math.lcm(*ranks)
        ups = [_times(B, common // rank) for (_, B), rank in zip(pairs, ranks, strict=True)]
        down = torch.cat([A for A, _ in pairs])  # of several dtypes it has the widest
        note = f"{len(pairs)} pairs on one weight as one of rank {len(down)}"
        return at_other_rank(down, torch.cat(ups, 1), alpha=layer.alpha, rank=common, note=note)

    def write_layer(self, name: str, target: Target, export: Export) -> None:
        path, _, parameter = name.rpartition(".")
        factors = export.adapter.factors_of(name)
        A, B = factors["lora_A"], factors["lora_B"]
        if target.layer == "Embedding":
            A, B = A.T, B.T
        place = joined(path, "parametrizations", parameter, "0")
        export.add(name, target, {f"{place}.lora_A": A, f"{place}.lora_B": B})


def _places(slots: Mapping[str, str]) -> list[int]:
    """Return the numbers of a weight's parametrizations, in their order."""
    return sorted({int(slot.partition(".")[0]) for slot in slots})


def _pair(A: Tensor, B: Tensor, out: int, fan_in: int, place: TargetModule) -> tuple[Tensor, Tensor]:
    """Return lora_A (r, fan_in) and lora_B (out, r)."""
    if place.layer.name == "Embedding":
        exchanged = len(A) == fan_in and B.shape[1] == out and A.shape[1] == len(B)
        A, B = (A.T, B.T) if exchanged else (B.T, A.T)  # else a pair of the table as (entries, features)
    if (A.shape[1], len(B)) != (fan_in, out) or len(A) != B.shape[1]:
        raise AdapterError(
            f"a pair of {tuple(A.shape)} and {tuple(B.shape)}, the base needs (r, {fan_in}) and ({out}, r)"
        )
    return A, B


def _times(B: Tensor, factor: int) -> Tensor:
    """Multiply B by a whole number, exactly: in its own dtype if that holds the product, else in float64.

    Raises:
        AdapterError: B is float64 already, and the product does not fit.
    """
    wide = B.double() * factor
    if B.dtype == wide.dtype and factor & (factor - 1):
        raise AdapterError(f"pairs of several ranks on one weight, and float64 cannot hold lora_B times {factor}")
    narrow = wide.to(B.dtype)
    return narrow if narrow.double().equal(wide) else wide
