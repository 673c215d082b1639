"""Read and write LoRA files of Hugging Face diffusers: PEFT's tensors under other names.

The usual name is ``pytorch_lora_weights.safetensors``. Keys start with a part of a pipeline ("unet"). Alpha stands in
the metadata, or in tensors of its own, or nowhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.errors import FormatError
from loraio.files.strictjson import parse_json
from loraio.formats.exported import origin_of
from loraio.formats.foreign import Context, Encoded, Factors, Foreign, ForeignLayer, Options, Values
from loraio.formats.peft import PEFT
from loraio.formats.peft_config import PeftConfig
from loraio.formats.peft_export import PREFIX
from loraio.formats.pitfalls import is_pipeline
from loraio.formats.reading import Reading
from loraio.formats.report import settings, tensors
from loraio.formats.sources import Source
from loraio.formats.writing import Writing
from loraio.registry import known, lookup

if TYPE_CHECKING:
    pass

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "controlnet",
    "prior",
)
"""Parts of pipelines, with which keys start."""

_METADATA = "lora_adapter_metadata"

_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d")

_NOW, _MIDDLE, _OLD = "now", "middle", "old"

_SLOTS = (
    (_NOW, re.compile(r"(?P<path>.+)\.lora_(?P<slot>[AB])\.weight")),
    (_NOW, re.compile(r"(?P<path>.+)\.lora_B\.(?P<slot>bias)")),
    (_NOW, re.compile(r"(?P<path>.+)\.lora_(?P<slot>magnitude)_vector(?:\.weight)?")),
    (_OLD, re.compile(r"(?P<path>.+)\.processor\.to_(?P<to>[qkv]|out)_lora\.(?P<slot>down|up)\.weight")),
    (_OLD, re.compile(r"(?P<path>.+)\.processor\.to_(?P<to>[qkv]|out)_lora\.(?P<slot>alpha)")),
    (_MIDDLE, re.compile(r"(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<slot>down|up)\.weight")),
    (_MIDDLE, re.compile(r"(?P<path>.+?)(?:\.lora(?:_linear_layer)?)?\.(?P<slot>alpha)")),
)
"""Slots of three eras; alpha may stand beside any of them."""

_AS_PEFT = {"down": "A", "up": "B"}


class Diffusers:
    """Hugging Face diffusers."""

    name = "diffusers"
    container = "safetensors"
    takes: tuple[str, ...] = ("prefix",)

    def recognise(self, source: Source) -> str | None:
        for key in source.tensors:
            found = _parse(key)
            if found is None or found.slot not in ("A", "B"):
                continue
            if found.era != _NOW or found.component:
                return f"the key {key!r}"
            if _METADATA in source.metadata and not key.startswith("base_model."):
                return f"the metadata's {_METADATA}, and the key {key!r}"
        return None

    def read(self, source: Source) -> Foreign:
        settings_of = _settings(source)
        configs = {part: PeftConfig(values, part=part) for part, values in settings_of.items()}
        reading = Reading(source=source)
        for config in configs.values():
            reading.lines += config.lines()
        slots = _sort_keys(reading)
        components = list(dict.fromkeys(component for component, _ in slots))
        configs |= {part: PeftConfig(None) for part in components if part not in configs}
        for part, config in configs.items():
            behind = f" ({part})" if part else ""
            reading.refusals += [f"{reason}{behind}" for reason in config.refusals(ignore=("modules_to_save",))]
        for (component, path), own in slots.items():
            _read_layer(component, path, own, reading, configs[component])
        for part, config in configs.items():
            reading.refusals += config.unmatched([path for component, path in slots if component == part])
        reading.settings = {"components": sorted(components), "metadata": settings_of}
        return reading.foreign()

    def spell(self, place: TargetModule) -> Sequence[str]:
        if place.parameter != "weight":
            return ()
        return (place.path, *(f"{component}.{place.path}" for component in COMPONENTS))

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        if layer not in _LAYERS:
            return "diffusers' files have no slots for this layer type"
        return PEFT.refusal(layer, kind, grouped=grouped)

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        return PEFT.factors(layer, values, place, options)

    def encode(self, adapter: Adapter, context: Context) -> Encoded:
        network, options = context.network, context.options
        if options.prefix is not None:
            lookup(dict.fromkeys(COMPONENTS), options.prefix, what="part of a pipeline")
        writing = Writing(tool=self.name, adapter=adapter)
        for name, target in adapter.targets.items():
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            if reason is not None:
                writing.problems.append(f"{name!r}: {reason}")
        writing.check()
        writing.lines += tensors(adapter.whole, "lost", "diffusers' files replace no tensor of the base")
        pipeline = network is not None and options.prefix is None and is_pipeline(network, COMPONENTS)
        parts = _parts(adapter) if pipeline else _one_part(adapter, options)
        config: dict[str, Any] = {}
        for component, (inside, part) in parts.items():
            own = network.get_submodule(inside) if network is not None and inside else network
            made = PEFT.encode(part, Context(network=own, options=options))
            writing.tensors |= {f"{component}.{key.removeprefix(PREFIX)}": value for key, value in made.tensors.items()}
            config |= {f"{component}.{key}": value for key, value in (made.config or {}).items()}
            writing.lines += [
                replace(line, name=f"{inside}.{line.name}" if inside else line.name)
                for line in made.report.lines
                if line.what == "tensor" or line.fate == "changed"
            ]
        how = f"in the metadata, {_METADATA}"
        writing.lines += settings(("rank", "alpha", "kind", "scale_rule"), "carried", how)
        writing.lines += settings(["prefix"], "carried", f"{known(parts)}, in front of every name")
        return writing.in_safetensors({"format": "pt", _METADATA: json.dumps(config, indent=2, sort_keys=True)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    component: str
    path: str
    slot: str
    era: str


def _parse(key: str) -> _Key | None:
    for era, pattern in _SLOTS:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        path = found["path"]
        if found.get("to"):
            path += f".to_{found['to']}" + (".0" if found["to"] == "out" else "")
        component, dot, rest = path.partition(".")
        known_part = bool(dot) and component in COMPONENTS
        slot = _AS_PEFT.get(found["slot"], found["slot"])
        return _Key(component=component if known_part else "", path=rest if known_part else path, slot=slot, era=era)
    return None


def _sort_keys(reading: Reading) -> dict[tuple[str, str], dict[str, str]]:
    """Return each layer's keys by slot; a layer is a part of a pipeline and a path in it."""
    slots: dict[tuple[str, str], dict[str, str]] = {}
    for key in reading.source.tensors:
        found = _parse(key)
        if found is None:
            reading.refusals.append(f"{key!r} is no key that diffusers knows")
            continue
        own = slots.setdefault((found.component, found.path), {})
        if found.slot in own:
            reading.refusals.append(f"{key!r} is there again as {own[found.slot]!r}")
        own[found.slot] = key
    return slots


def _settings(source: Source) -> dict[str, dict[str, Any]]:
    """Return PEFT's settings of each part; the key "" has those of a file of one model."""
    text = source.metadata.get(_METADATA)
    if text is None:
        return {}
    found = parse_json(text, where=f"the metadata's {_METADATA} of {str(source.file)!r}")
    if not isinstance(found, dict):
        raise FormatError(f"the metadata's {_METADATA} is no JSON object", where=f"{str(source.file)!r}")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        component, dot, rest = key.partition(".")
        part, name = (component, rest) if dot and component in COMPONENTS else ("", key)
        parts.setdefault(part, {})[name] = value
    return parts


def _read_layer(component: str, path: str, slots: Mapping[str, str], reading: Reading, config: PeftConfig) -> None:
    """Add a layer; its alpha is that of the metadata or that of a tensor, and both must agree."""
    if not slots.keys() & {"A", "B"}:
        reading.refusals += [f"{key!r} is there without factors" for key in slots.values()]
        return
    layer = config.layer(path, slots, reading)
    if layer is None:
        return
    alpha = reading.source.number(slots["alpha"]) if "alpha" in slots else None
    if alpha is not None and layer.alpha is not None and alpha != layer.alpha:
        reading.refusals.append(f"{slots['alpha']!r} is {alpha}, the metadata say {layer.alpha}")
    implied = None if config.is_there else layer.rank
    own = layer.alpha if layer.alpha is not None else alpha
    name = f"{component}.{path}" if component else path
    reading.layers.append(replace(layer, name=name, alpha=own, implied_alpha=implied))


def _one_part(adapter: Adapter, options: Options) -> dict[str, tuple[str, Adapter]]:
    """Return the adapter as that of one part: the one that was asked for, or the one of its own file."""
    before = origin_of(adapter, "diffusers").get("components")
    own = before[0] if isinstance(before, list) and len(before) == 1 and before[0] in COMPONENTS else COMPONENTS[0]
    return {options.prefix or own: ("", replace(adapter, whole={}, tensors={}))}


def _parts(adapter: Adapter) -> dict[str, tuple[str, Adapter]]:
    """Return the adapter by part of the pipeline, each with the name of its module in the base."""
    parts = {}
    for component in sorted({name.partition(".")[0] for name in adapter.targets}):
        start = f"{component}."
        targets = {name.removeprefix(start): t for name, t in adapter.targets.items() if name.startswith(start)}
        factors = {name.removeprefix(start): f for name, f in adapter.factors.items() if name.startswith(start)}
        part = replace(adapter, targets=targets, factors=factors, whole={}, tensors={})
        parts[component] = (component, part)
    return parts
