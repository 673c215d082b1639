"""Read and write torchtune's own ``adapter_model.pt``: ``<module>.lora_a.weight`` and ``.lora_b.weight``, Linear only.

Its ``adapter_config.json`` holds alpha. For language models torchtune writes one, with a second file in PEFT's layout,
which is read as PEFT's. That file has the rows of the q and k projections in another order, for another base: each file
is for the base with the names that it uses.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loraio.adapter import Target
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Factors, ForeignLayer, Options, Values
from loraio.formats.reading import Reading
from loraio.formats.report import settings
from loraio.formats.statedicts import Export, StateDictDialect, joined

if TYPE_CHECKING:
    pass

_MAGNITUDE = "magnitude"

_EXPERT = r"lora_(?:gate|down|up)_[ab](?:\.weight)?"

_SCALES_BIAS = "torchtune's DoRA multiplies the layer's bias too, which is no change of its weight"

_SETTINGS = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")


class Torchtune(StateDictDialect):
    """torchtune's LoRALinear and DoRALinear."""

    name = tool = "torchtune"
    own_alpha = "in torchtune it stands in the recipe's configuration, as lora_alpha, and in adapter_config.json"
    keys = re.compile(r"(?:(?P<path>.+)\.)?(?P<slot>lora_[ab]\.weight|magnitude)")
    telling = re.compile(rf"(?:.+\.)?(?:lora_[ab]\.weight|{_EXPERT})")

    def take(self, key: str, reading: Reading) -> bool:
        if super().take(key, reading):
            return True
        expert = self.telling.fullmatch(key) is not None
        if expert:
            reading.refusals.append(f"{key!r}: a layer of experts has a pair for each, which is no pair of one weight")
        return expert

    def read_settings(self, reading: Reading) -> None:
        config = reading.source.config or {}
        reading.settings |= config
        reading.lines += settings(config, "carried")
        unknown = sorted(key for key in config.keys() - set(_SETTINGS) if config[key])
        reading.refusals += [f"unknown setting {key!r}: {config[key]!r}" for key in unknown]
        alpha = config.get("lora_alpha")
        if alpha is not None and not _is_number(alpha):
            reading.refusals.append(f"lora_alpha is {alpha!r}, not a number")

    def read_layer(self, name: str, slots: dict[str, str], reading: Reading) -> None:
        shapes = reading.pair(name, slots, "lora_a.weight", "lora_b.weight")
        if shapes is None:
            return
        down, up = shapes
        rank, config = down[0], reading.settings
        if rank != up[1] or not rank:
            reading.refuse_pair(name, down, up)
            return
        if config.get("r", rank) != rank:
            reading.refusals.append(f"{name!r}: the configuration says rank {config['r']!r}, the tensors have {rank}")
            return
        alpha = config.get("lora_alpha")
        kind = "dora" if _MAGNITUDE in slots else "lora"
        reading.layers.append(
            ForeignLayer(name=name, slots=slots, rank=rank, alpha=alpha if _is_number(alpha) else None, kind=kind)
        )

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        if layer != "Linear":
            return "torchtune has no LoRA for this layer type"
        return None if kind in ("lora", "dora") else f"torchtune has no {kind}"

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        factors = {"lora_A": values["lora_a.weight"], "lora_B": values["lora_b.weight"]}
        if layer.kind == "dora":
            if getattr(place.module, "bias", None) is not None:
                raise AdapterError(_SCALES_BIAS)
            factors["magnitude"] = values[_MAGNITUDE]
        return Factors(values=factors)

    def write_layer(self, name: str, target: Target, export: Export) -> None:
        path = name.rpartition(".")[0]
        network = export.context.network
        modules = dict(network.named_modules()) if network is not None else {}
        factors = export.adapter.factors_of(name)
        slots = {"lora_a.weight": factors["lora_A"], "lora_b.weight": factors["lora_B"]}
        if target.kind == "dora":
            if getattr(modules.get(path), "bias", True) is not None:
                export.problems.append(
                    f"{name!r}: {_SCALES_BIAS}; without one it is written where the network is known"
                )
                return
            slots[_MAGNITUDE] = factors["magnitude"]
        export.add(name, target, {joined(path, slot): value for slot, value in slots.items()})

    def check(self, export: Export) -> None:
        ranks = {target.rank for target in export.adapter.targets.values()}
        for what, values in (("rank", ranks), ("alpha", set(export.alphas.values()))):
            if len(values) > 1:
                export.problems.append(
                    f"torchtune's recipes have one {what} for all layers, the adapter has {sorted(values)}"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
