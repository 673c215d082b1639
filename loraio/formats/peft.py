"""Read adapter folders of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA, DoRA and rank-stabilised LoRA are read. So is a state dict taken from a live PEFT model, which has the adapter's
name in its keys, and no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.formats.foreign import Context, Encoded, Factors, Foreign, ForeignLayer, Options, Values
from loraio.formats.peft_config import PeftConfig
from loraio.formats.peft_export import PARAMETERS, PREFIX, Export, why_not
from loraio.formats.pitfalls import misuse, passed_over
from loraio.formats.reading import Reading
from loraio.formats.sources import Source
from loraio.registry import known

if TYPE_CHECKING:
    pass

_SLOTS = (
    (re.compile(r"(?P<path>.+)\.lora_(?P<slot>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"), ""),
    (re.compile(r"(?P<path>.+)\.lora_(?P<slot>B)(?:\.(?P<adapter>[^.]+))?\.bias"), "bias"),
    (re.compile(r"(?P<path>.+)\.lora_embedding_(?P<slot>[AB])(?:\.(?P<adapter>[^.]+))?"), ""),
    (re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"), "magnitude"),
)

_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")

_AGAIN = ".modules_to_save."

_TWICE = ".base_layer.out_proj.lora_"
"""Marks the projection of attention: PEFT adds its product twice, attached and merged [0.21.2]."""

_QUANTISED = (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".qweight", ".qzeros")


class Peft:
    """Hugging Face PEFT, its LORA method."""

    name = "peft"
    container = "folder"
    takes: tuple[str, ...] = ()

    def recognise(self, source: Source) -> str | None:
        method = (source.config or {}).get("peft_type")
        for key in source.tensors:
            found = _parse(key)
            if found is None or found.slot not in ("A", "B"):
                continue
            if method is not None:
                return f"adapter_config.json says peft_type {method!r}, and the key {key!r}"
            if key.startswith(PREFIX) or found.adapter:
                return f"the key {key!r}"
        return None if method in (None, "LORA") else f"adapter_config.json says peft_type {method!r}"

    def read(self, source: Source) -> Foreign:
        config = PeftConfig(source.config)
        reading = Reading(source=source, settings=dict(config.values), lines=config.lines(), refusals=config.refusals())
        saved = _sort_keys(reading)
        for path, slots in reading.slots.items():
            if "bias" in slots and config.is_there and not config.values.get("lora_bias"):
                reading.lost[slots.pop("bias")] = "lora_bias is not set: PEFT would pass over it"
            layer = config.layer(path, slots, reading)
            if layer is not None:
                reading.layers.append(layer)
        names = [layer.name for layer in reading.layers]
        reading.refusals += config.unmatched(names) + config.excluded(names)
        biases = {name for name in reading.whole if name not in saved and not config.saves(name)}
        return reading.foreign(biases=biases)

    def spell(self, place: TargetModule) -> Sequence[str]:
        # the name of an attention layer stands for the weight of all three projections
        return (place.path,) if place.parameter in PARAMETERS else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        return why_not(layer, kind, grouped=grouped)

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        factors = {"lora_A": values["A"].flatten(1), "lora_B": values["B"].flatten(1)}
        if "magnitude" in values:
            factors["magnitude"] = values["magnitude"].flatten()
        note = ""
        if _TWICE in layer.slots["A"]:
            factors["lora_B"] = 2 * factors["lora_B"]
            note = "lora_B doubled: PEFT adds the product of an attention layer's out_proj twice"
        bias = values["bias"].double() * layer.scale if "bias" in values and layer.scale is not None else None
        wrong = misuse(place.module) or (None if note else passed_over(place.module))
        if wrong is not None:
            note = f"as PEFT merges it; attached, PEFT {wrong}"
        return Factors(values=factors, bias=bias, note=note)

    def encode(self, adapter: Adapter, context: Context) -> Encoded:
        return Export(adapter=adapter, context=context).encoded()


def _sort_keys(reading: Reading) -> set[str]:
    """Note each key as a layer's or the base's own; return the base's names of tensors in ``modules_to_save``."""
    saved: set[str] = set()
    adapters: set[str] = set()
    for key in reading.source.tensors:
        found = _parse(key)
        if key.endswith(_QUANTISED):
            reading.refusals.append(f"{key!r}: the base is quantised")
        if found is None:
            reading.not_used[key] = "the base's own module, which another one stands for"
            continue
        if found.adapter:
            adapters.add(found.adapter)
        if found.slot:
            reading.take(found.path, found.slot, key)
        elif _AGAIN in found.path:  # written by bias="all" for a module that is saved too
            reading.not_used[key] = f"the same as {found.path.replace(_AGAIN, '.')!r}"
        else:
            reading.whole[found.path] = key
            if found.saved:
                saved.add(found.path)
    if len(adapters) > 1:
        reading.refusals.append(f"it holds {len(adapters)} adapters, {known(sorted(adapters))}; one is read")
    return saved


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """A key of the file in its pieces; with an empty slot it is a tensor of the base, and the path is its name."""

    path: str
    slot: str
    adapter: str | None = None
    saved: bool = False


def _parse(key: str) -> _Key | None:
    """Take a key apart; None for the base's own copy of a module that the adapter replaces."""
    name = key.removeprefix(PREFIX)
    for pattern, slot in _SLOTS:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            return _Key(path=_plain(groups["path"]), slot=slot or groups["slot"], adapter=groups["adapter"])
    match = _SAVED.fullmatch(name)
    if match:
        path = f"{_plain(match['path'])}.{match['rest']}"
        return _Key(path=path, slot="", adapter=match["adapter"], saved=True)
    if ".original_module." in name:
        return None
    return _Key(path=_plain(name), slot="")


def _plain(path: str) -> str:
    """Return a path without the wrappers that PEFT puts around a layer."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


PEFT = Peft()
