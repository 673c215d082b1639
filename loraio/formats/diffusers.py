"""The LoRA files of Hugging Face diffusers, usually ``pytorch_lora_weights.safetensors``: PEFT's tensors, named anew.

Keys start with a part of a pipeline ("unet"). Alpha stands in the metadata, or in tensors of its own, or nowhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError, FormatError
from loraio.files.strictjson import parse_json
from loraio.formats.exported import ORIGIN, carried_lines, exported_document, origin_of
from loraio.formats.foreign import Encoded, Factors, Foreign, ForeignLayer, Options
from loraio.formats.patterns import PatternTable
from loraio.formats.peft import PEFT
from loraio.formats.peft_config import MEANT, layer_of, refused_settings, tables_of, unmatched
from loraio.formats.pitfalls import is_pipeline
from loraio.formats.report import Report, settings, tensors
from loraio.formats.sources import Source
from loraio.registry import known, lookup

if TYPE_CHECKING:
    from torch import Tensor, nn

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
"""Parts of pipelines that keys start with."""

_METADATA = "lora_adapter_metadata"

_PEFT_PREFIX = "base_model.model."

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
"""Slots of three eras, by what they are called in `layer_of`; alpha may stand beside any."""

_AS_PEFT = {"down": "A", "up": "B"}


class Diffusers:
    """Hugging Face diffusers."""

    name = "diffusers"
    container = "safetensors"

    def recognise(self, source: Source) -> str | None:
        """By slots of an earlier era, or by PEFT's behind a pipeline's part or beside the metadata."""
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
        """Layers by their names in the file; every reason not to use them is listed."""
        configs = _configs(source)
        refusals = [f"{reason}{f' ({part})' if part else ''}" for part in configs for reason in _refused(configs[part])]
        slots: dict[tuple[str, str], dict[str, str]] = {}
        for key in source.tensors:
            found = _parse(key)
            if found is None:
                refusals.append(f"{key!r} is no key that diffusers knows")
                continue
            own = slots.setdefault((found.component, found.path), {})
            if found.slot in own:
                refusals.append(f"{key!r} is there again as {own[found.slot]!r}")
            own[found.slot] = key
        layers = []
        tables = {}
        for part in dict.fromkeys(component for component, _ in slots):
            tables[part], problems = tables_of(configs.get(part))
            refusals += problems
        for (component, path), own in slots.items():
            layer, problems = _layer(component, path, own, source, configs.get(component), tables[component])
            refusals += problems
            if layer is not None:
                layers.append(layer)
        for part, config in configs.items():
            refusals += unmatched(config, [path for component, path in slots if component == part])
        if not layers and not refusals:
            refusals.append("it holds no layer's factors")
        lines = []
        for part, config in configs.items():
            named = {f"{part}.{key}" if part else key: key in MEANT for key in config}
            lines += settings([name for name, meant in named.items() if meant], "carried")
            record = [name for name, meant in named.items() if not meant]
            lines += settings(record, "carried", f"kept in the record, 'training.{ORIGIN}'")
        components = sorted({component for component, _ in slots})
        return Foreign(
            layers=tuple(layers),
            settings={"components": components, "metadata": configs},
            lines=tuple(lines),
            refusals=tuple(dict.fromkeys(refusals)),
        )

    def spell(self, place: TargetModule) -> Sequence[str]:
        """The module's name, as it is and behind each part of a pipeline."""
        if place.parameter != "weight":
            return ()
        return (place.path, *(f"{component}.{place.path}" for component in COMPONENTS))

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What diffusers' keys can say, of what PEFT holds."""
        if layer not in _LAYERS:
            return "diffusers' files have no slots for this layer type"
        return PEFT.refusal(layer, kind, grouped=grouped)

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """As PEFT's, which diffusers puts them into."""
        return PEFT.factors(layer, values, place, options)

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """One safetensors file of the present form."""
        if options.prefix is not None:
            lookup(dict.fromkeys(COMPONENTS), options.prefix, what="part of a pipeline")
        problems = [
            f"{name!r}: {reason}"
            for name, target in adapter.targets.items()
            if (reason := self.refusal(target.layer, target.kind, grouped=target.groups > 1)) is not None
        ]
        if problems:
            raise AdapterError(
                "diffusers cannot hold this adapter, or would use it wrongly",
                problems=problems,
                hint="loraio merge puts it into the base for good",
            )
        lost = tensors(adapter.whole, "lost", "diffusers' files replace no tensor of the base")
        pipeline = network is not None and options.prefix is None and is_pipeline(network, COMPONENTS)
        parts = _parts(adapter) if pipeline else _one_part(adapter, options)
        lines = [*lost, *carried_lines(adapter)]
        values: dict[str, Tensor] = {}
        config: dict[str, Any] = {}
        for component, (inside, part) in parts.items():
            own = network.get_submodule(inside) if network is not None and inside else network
            made = PEFT.encode(part, network=own, state=None, options=options)
            values |= {f"{component}.{key.removeprefix(_PEFT_PREFIX)}": value for key, value in made.tensors.items()}
            config |= {f"{component}.{key}": value for key, value in (made.config or {}).items()}
            lines += [
                replace(line, name=f"{inside}.{line.name}" if inside else line.name)
                for line in made.report.lines
                if line.what == "tensor" or line.fate == "changed"
            ]
        lines += settings(("rank", "alpha", "kind", "scale_rule"), "carried", f"in the metadata, {_METADATA}")
        lines += settings(["prefix"], "carried", f"{known(parts)}, in front of every name")
        return Encoded(
            tensors=dict(sorted(values.items())),
            report=Report.of(lines),
            document=exported_document(adapter),
            metadata={"format": "pt", _METADATA: json.dumps(config, indent=2, sort_keys=True)},
        )


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


def _configs(source: Source) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each part; the key "" for those of a file of one model."""
    text = source.metadata.get(_METADATA)
    if text is None:
        return {}
    found = parse_json(text, where=f"the metadata's {_METADATA} of {str(source.file)!r}")
    if not isinstance(found, dict):
        raise FormatError(f"the metadata's {_METADATA} is no JSON object", where=f"{str(source.file)!r}")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        component, dot, rest = key.partition(".")
        part, name = (component, rest) if dot and component in COMPONENTS else ("", key)
        configs.setdefault(part, {})[name] = value
    return configs


def _refused(config: Mapping[str, Any]) -> list[str]:
    return refused_settings({key: value for key, value in config.items() if key != "modules_to_save"})


def _layer(
    component: str,
    path: str,
    slots: Mapping[str, str],
    source: Source,
    config: Mapping[str, Any] | None,
    tables: Mapping[str, PatternTable],
) -> tuple[ForeignLayer | None, list[str]]:
    name = f"{component}.{path}" if component else path
    if not slots.keys() & {"A", "B"}:
        return None, [f"{key!r} is there without factors" for key in slots.values()]
    layer, problems = layer_of(path, slots, source, config, tables)
    if layer is None:
        return None, problems
    alpha = source.number(slots["alpha"]) if "alpha" in slots else None
    if alpha is not None and layer.alpha is not None and alpha != layer.alpha:
        problems.append(f"{slots['alpha']!r} is {alpha}, the metadata say {layer.alpha}")
    implied = layer.rank if config is None else None
    own = layer.alpha if layer.alpha is not None else alpha
    return replace(layer, name=name, alpha=own, implied_alpha=implied), problems


def _one_part(adapter: Adapter, options: Options) -> dict[str, tuple[str, Adapter]]:
    """The adapter as that of one part, the base itself: the part that was asked for, or that of its own file."""
    before = origin_of(adapter, "diffusers").get("components")
    own = before[0] if isinstance(before, list) and len(before) == 1 and before[0] in COMPONENTS else COMPONENTS[0]
    return {options.prefix or own: ("", replace(adapter, whole={}, tensors={}))}


def _parts(adapter: Adapter) -> dict[str, tuple[str, Adapter]]:
    """The adapter by part of the pipeline, and the module of the base that each part is."""
    parts = {}
    for component in sorted({name.partition(".")[0] for name in adapter.targets}):
        start = f"{component}."
        targets = {name.removeprefix(start): t for name, t in adapter.targets.items() if name.startswith(start)}
        factors = {name.removeprefix(start): f for name, f in adapter.factors.items() if name.startswith(start)}
        part = replace(adapter, targets=targets, factors=factors, whole={}, tensors={})
        parts[component] = (component, part)
    return parts
