"""The adapter folders of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Of its methods LoRA, DoRA and rank-stabilised LoRA. A state dict taken from a live PEFT model is read too; it has the
adapter's name in its keys, and no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.exported import ORIGIN
from loraio.formats.foreign import Encoded, Factors, Foreign, ForeignLayer, Options
from loraio.formats.peft_config import (
    MEANT,
    ends_of,
    in_modules,
    layer_of,
    names_in,
    refused_settings,
    tables_of,
    unmatched,
)
from loraio.formats.peft_export import PARAMETERS, PREFIX, Export, why_not
from loraio.formats.pitfalls import misuse, passed_over
from loraio.formats.report import settings
from loraio.formats.sources import Source
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor, nn

_SLOTS = (
    (re.compile(r"(?P<path>.+)\.lora_(?P<slot>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"), ""),
    (re.compile(r"(?P<path>.+)\.lora_(?P<slot>B)(?:\.(?P<adapter>[^.]+))?\.bias"), "bias"),
    (re.compile(r"(?P<path>.+)\.lora_embedding_(?P<slot>[AB])(?:\.(?P<adapter>[^.]+))?"), ""),
    (re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"), "magnitude"),
)

_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")

_AGAIN = ".modules_to_save."

_TWICE = ".base_layer.out_proj.lora_"
"""In keys of the projection whose product PEFT's MultiheadAttention adds twice, attached and merged [0.21.2]."""

_QUANTISED = (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".qweight", ".qzeros")


class Peft:
    """Hugging Face PEFT, its LORA method."""

    name = "peft"
    container = "folder"

    def recognise(self, source: Source) -> str | None:
        """By ``peft_type`` in a configuration, else by keys that only its models have."""
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
        """Layers, replaced tensors and settings; every reason not to use them is listed."""
        config = source.config
        parsed = {key: _parse(key) for key in source.tensors}
        adapters = sorted({one.adapter for one in parsed.values() if one is not None and one.adapter})
        refusals = refused_settings(config or {}) + [
            f"{key!r}: the base is quantised" for key in source.tensors if key.endswith(_QUANTISED)
        ]
        if len(adapters) > 1:
            refusals.append(f"it holds {len(adapters)} adapters, {known(adapters)}; one is read")
        slots: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        saved: set[str] = set()
        not_used: dict[str, str] = {}
        for key, one in parsed.items():
            if one is None:
                not_used[key] = "the base's own module, which another one stands for"
            elif one.slot == "" and _AGAIN in one.path:  # written by bias="all" for a module that is saved too
                not_used[key] = f"the same as {one.path.replace(_AGAIN, '.')!r}"
            elif one.slot == "":
                whole[one.path] = key
                if one.saved:
                    saved.add(one.path)
            else:
                slots.setdefault(one.path, {})[one.slot] = key
        layers, lost = [], {}
        tables, problems = tables_of(config)
        refusals += problems
        for path, found in slots.items():
            if "bias" in found and config is not None and not config.get("lora_bias"):
                lost[found.pop("bias")] = "lora_bias is not set: PEFT would pass over it"
            layer, problems = layer_of(path, found, source, config, tables)
            refusals += problems
            if layer is not None:
                layers.append(layer)
        refusals += unmatched(config or {}, [layer.name for layer in layers])
        excluded = set(names_in((config or {}).get("exclude_modules")))
        refusals += [
            f"{layer.name!r} is in exclude_modules: PEFT would pass over it"
            for layer in layers
            if not excluded.isdisjoint(ends_of(layer.name))
        ]
        if not layers and not refusals:
            refusals.append("it holds no layer's factors")
        modules = names_in((config or {}).get("modules_to_save"))
        saved |= {name for name in whole if in_modules(name, modules)}
        lines = settings(set(config or {}) & MEANT.keys(), "carried")
        lines += settings(set(config or {}) - MEANT.keys(), "carried", f"kept in the record, 'training.{ORIGIN}'")
        return Foreign(
            layers=tuple(layers),
            whole=whole,
            biases=frozenset(whole.keys() - saved),
            not_used=not_used,
            lost=lost,
            settings=dict(config or {}),
            lines=tuple(lines),
            refusals=tuple(dict.fromkeys(refusals)),
        )

    def spell(self, place: TargetModule) -> Sequence[str]:
        """Module names as they are; of an attention layer its name stands for the weight of all three projections."""
        return (place.path,) if place.parameter in PARAMETERS else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What PEFT's layers hold."""
        return why_not(layer, kind, grouped=grouped)

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """Only shapes change, but for a bias beside B."""
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

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """A folder's two files."""
        if network is None:
            raise AdapterError(
                "PEFT's layers ignore dilation and padding mode, which only the network says",
                hint="--base BASE, or --model NAME",
            )
        return Export(adapter, network, state).encoded()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """What a key of the file says: slot "" is a tensor of the base's own, whose name is the path."""

    path: str
    slot: str
    adapter: str | None = None
    saved: bool = False


def _parse(key: str) -> _Key | None:
    """None for the base's own copy of a module that the adapter replaces."""
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
    """Without what PEFT wraps around a layer."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


PEFT = Peft()
