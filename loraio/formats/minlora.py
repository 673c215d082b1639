"""State dicts of minLoRA, whose pairs are torch parametrizations: ``<module>.parametrizations.weight.0.lora_A``.

Its pairs are of the weight as (first dimension, all others), any groups; those of an Embedding stand the other way
round: ``lora_A @ lora_B`` is the table's change. Files with A named from the output side have the same keys and shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Encoded, Factors, Foreign, ForeignLayer, Options
from loraio.formats.sources import Source
from loraio.formats.statedicts import Export, at_other_rank, joined, lone_biases, module_and_parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

_PART = re.compile(
    r"(?:(?P<path>.+)\.)?parametrizations\.(?P<parameter>[^.]+)\.(?P<at>\d+)\."
    r"(?P<slot>lora_A|lora_B|lora_dropout_mask)"
)

_ORIGINAL = re.compile(r"(?:(?P<path>.+)\.)?parametrizations\.(?P<parameter>[^.]+)\.original")

_LAYERS = ("Conv1d", "Conv2d", "Conv3d", "Linear", "Bilinear", "MultiheadAttention", "Embedding")


class MinLora:
    """minLoRA, and other parametrizations with its names."""

    name = "minlora"
    container = "pickle"

    def recognise(self, source: Source) -> str | None:
        """By a parametrization's ``lora_A`` or ``lora_B``."""
        for key in source.tensors:
            match = _PART.fullmatch(key)
            if match and match["slot"] != "lora_dropout_mask":
                return f"the key {key!r}"
        return None

    def read(self, source: Source) -> Foreign:
        """Layers by their weights; one weight may have several pairs, one upon the other."""
        slots: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        not_used: dict[str, str] = {}
        for key in source.tensors:
            part, original = _PART.fullmatch(key), _ORIGINAL.fullmatch(key)
            if part and part["slot"] == "lora_dropout_mask":
                not_used[key] = "ones, which the dropout of training starts from"
            elif part:
                name = joined(part["path"] or "", part["parameter"])
                slots.setdefault(name, {})[f"{int(part['at'])}.{part['slot'][-1]}"] = key
            elif original:
                whole[joined(original["path"] or "", original["parameter"])] = key
            else:
                whole[key] = key
        layers, refusals = [], []
        for name, found in slots.items():
            ranks, problems = _ranks(name, found, source)
            refusals += problems
            if not problems:
                layers.append(ForeignLayer(name=name, slots=found, rank=sum(ranks), alpha=None))
        return Foreign(
            layers=tuple(layers),
            whole=whole,
            biases=lone_biases(whole),
            not_used=not_used,
            refusals=tuple(refusals),
            own_alpha="minLoRA's lora_alpha is 1 unless its configuration has another",
        )

    def spell(self, place: TargetModule) -> Sequence[str]:
        """The weight's own name: any parameter may be parametrized."""
        return (place.name,)

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What its parametrization holds."""
        if layer not in _LAYERS:
            return "minLoRA's pair would be of the weight as it lies, (in, out ...), which is no pair of (out, in ...)"
        return None if kind == "lora" else f"minLoRA has no {kind}"

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """As they are, of an Embedding exchanged; several pairs as one."""
        import torch

        assert layer.alpha is not None
        out, fan_in = place.layer.matrix_shape(place.weight.shape, place.groups)
        pairs = [_pair(values[f"{at}.A"], values[f"{at}.B"], out, fan_in, place) for at in _places(layer.slots)]
        ranks = [len(A) for A, _ in pairs]
        if len(pairs) == 1:
            return Factors(values={"lora_A": pairs[0][0], "lora_B": pairs[0][1]}, rank=ranks[0])
        common = math.lcm(*ranks)
        ups = [_times(B, common // rank) for (_, B), rank in zip(pairs, ranks, strict=True)]
        down = torch.cat([A for A, _ in pairs])  # of several dtypes it has the widest
        note = f"{len(pairs)} pairs on one weight as one of rank {len(down)}"
        return at_other_rank(down, torch.cat(ups, 1), alpha=layer.alpha, rank=common, note=note)

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """A state dict for ``load_state_dict(.., strict=False)``, as the tool's own get_lora_state_dict gives it."""
        export = Export(tool="minLoRA", adapter=adapter)
        for name, target in adapter.targets.items():
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            if reason is not None:
                export.problems.append(f"{name!r}: {reason}")
                continue
            export.alpha(name, target)
            path, parameter = module_and_parameter(name)
            factors = adapter.factors_of(name)
            A, B = factors["lora_A"], factors["lora_B"]
            if target.layer == "Embedding":
                A, B = A.T, B.T
            place = joined(path, "parametrizations", parameter, "0")
            export.add(name, {f"{place}.lora_A": A, f"{place}.lora_B": B})
        export.add_whole()
        return export.encoded()


def _places(slots: Mapping[str, str]) -> list[int]:
    """The numbers of a weight's parametrizations, in their order."""
    return sorted({int(slot.partition(".")[0]) for slot in slots})


def _ranks(name: str, slots: Mapping[str, str], source: Source) -> tuple[list[int], list[str]]:
    """The ranks of a weight's pairs, by their shapes alone, and what is wrong with them."""
    ranks, problems = [], []
    for at in _places(slots):
        missing = [f"lora_{slot}" for slot in "AB" if f"{at}.{slot}" not in slots]
        if missing:
            problems.append(f"{name!r}: {missing[0]} of parametrization {at} is missing")
            continue
        A, B = (source.tensors[slots[f"{at}.{slot}"]].shape for slot in "AB")
        inner = [A[i] for i, j in ((0, 1), (1, 0)) if len(A) == len(B) == 2 and A[i] == B[j] and A[i]]
        if not inner:
            problems.append(f"{name!r}: lora_A is {A} and lora_B is {B}, which is no pair")
        else:
            ranks.append(min(inner))
    return ranks, problems


def _pair(A: Tensor, B: Tensor, out: int, fan_in: int, place: TargetModule) -> tuple[Tensor, Tensor]:
    """lora_A (r, fan_in) and lora_B (out, r)."""
    if place.layer.name == "Embedding":
        exchanged = len(A) == fan_in and B.shape[1] == out and A.shape[1] == len(B)
        A, B = (A.T, B.T) if exchanged else (B.T, A.T)  # else a pair of the table as (entries, features)
    if (A.shape[1], len(B)) != (fan_in, out) or len(A) != B.shape[1]:
        raise AdapterError(
            f"a pair of {tuple(A.shape)} and {tuple(B.shape)}, the base needs (r, {fan_in}) and ({out}, r)"
        )
    return A, B


def _times(B: Tensor, factor: int) -> Tensor:
    """B times a whole number, exactly: in its own dtype where that holds it, else in float64.

    Raises:
        AdapterError: B is float64 already, and the product does not fit.
    """
    wide = B.double() * factor
    if B.dtype == wide.dtype and factor & (factor - 1):
        raise AdapterError(f"pairs of several ranks on one weight, and float64 cannot hold lora_B times {factor}")
    narrow = wide.to(B.dtype)
    return narrow if narrow.double().equal(wide) else wide
