"""torchtune's own ``adapter_model.pt``: ``<module>.lora_a.weight`` and ``.lora_b.weight``, of Linear layers alone.

Its ``adapter_config.json`` holds alpha; it writes one for language models, beside a second file in PEFT's layout, which
is read as PEFT's. In that one the rows of the q and k projections stand in another order, for another base: each file
is for the base whose names it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter
from loraio.bases.targets import TargetModule
from loraio.errors import AdapterError
from loraio.formats.foreign import Encoded, Factors, Foreign, ForeignLayer, Options
from loraio.formats.report import settings
from loraio.formats.sources import Source
from loraio.formats.statedicts import Export, joined, lone_biases, module_and_parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

_FACTOR = re.compile(r"(?:(?P<path>.+)\.)?lora_(?P<slot>[ab])\.weight")

_MAGNITUDE = re.compile(r"(?:(?P<path>.+)\.)?magnitude")

_EXPERTS = re.compile(r"(?:.+\.)?lora_(?:gate|down|up)_[ab](?:\.weight)?")

_SCALES_BIAS = "torchtune's DoRA multiplies the layer's bias too, which is no change of its weight"

_SETTINGS = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")


class Torchtune:
    """torchtune's LoRALinear and DoRALinear."""

    name = "torchtune"
    container = "pickle"

    def recognise(self, source: Source) -> str | None:
        """By a key that ends in ``lora_a.weight`` or ``lora_b.weight``, or an expert's."""
        for key in source.tensors:
            if _FACTOR.fullmatch(key) or _EXPERTS.fullmatch(key):
                return f"the key {key!r}"
        return None

    def read(self, source: Source) -> Foreign:
        """Layers by their pairs; every other key is a tensor of the base's own, replaced."""
        config = source.config or {}
        slots: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        refusals = []
        for key in source.tensors:
            factor, magnitude = _FACTOR.fullmatch(key), _MAGNITUDE.fullmatch(key)
            if factor:
                slots.setdefault(factor["path"] or "", {})[factor["slot"]] = key
            elif magnitude:
                slots.setdefault(magnitude["path"] or "", {})["magnitude"] = key
            elif _EXPERTS.fullmatch(key):
                refusals.append(f"{key!r}: a layer of experts has a pair for each, which is no pair of one weight")
            else:
                whole[key] = key
        refusals += [
            f"unknown setting {key!r}: {config[key]!r}" for key in sorted(config.keys() - set(_SETTINGS)) if config[key]
        ]
        alpha = config.get("lora_alpha")
        if alpha is not None and (not isinstance(alpha, int | float) or isinstance(alpha, bool)):
            refusals.append(f"lora_alpha is {alpha!r}, not a number")
            alpha = None
        layers = []
        for path, found in slots.items():
            rank, problem = _rank(path, found, source, config)
            if problem:
                refusals.append(problem)
            else:
                kind = "dora" if "magnitude" in found else "lora"
                layers.append(ForeignLayer(name=path, slots=found, rank=rank, alpha=alpha, kind=kind))
        return Foreign(
            layers=tuple(layers),
            whole=whole,
            biases=lone_biases(whole),
            settings=dict(config),
            lines=tuple(settings(config, "carried")),
            refusals=tuple(refusals),
            own_alpha="in torchtune it stands in the recipe's configuration, as lora_alpha, and in adapter_config.json",
        )

    def spell(self, place: TargetModule) -> Sequence[str]:
        """Module names as they are."""
        return (place.path,) if place.parameter == "weight" else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What its layers hold."""
        if layer != "Linear":
            return "torchtune has no LoRA for this layer type"
        return None if kind in ("lora", "dora") else f"torchtune has no {kind}"

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """As they are; DoRA of layers without a bias alone."""
        factors = {"lora_A": values["a"], "lora_B": values["b"]}
        if layer.kind == "dora":
            if getattr(place.module, "bias", None) is not None:
                raise AdapterError(_SCALES_BIAS)
            factors["magnitude"] = values["magnitude"]
        return Factors(values=factors)

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """A state dict for ``load_state_dict(.., strict=False)``."""
        export = Export(tool="torchtune", adapter=adapter)
        modules = dict(network.named_modules()) if network is not None else {}
        for name, target in adapter.targets.items():
            path, _ = module_and_parameter(name)
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            if reason is None and target.kind == "dora" and getattr(modules.get(path), "bias", True) is not None:
                reason = f"{_SCALES_BIAS}; without one it is written where the network is known"
            if reason is not None:
                export.problems.append(f"{name!r}: {reason}")
                continue
            export.alpha(name, target)
            factors = adapter.factors_of(name)
            slots = {"lora_a.weight": factors["lora_A"], "lora_b.weight": factors["lora_B"]}
            if target.kind == "dora":
                slots["magnitude"] = factors["magnitude"]
            export.add(name, {joined(path, slot): value for slot, value in slots.items()})
        for what, values in (
            ("rank", {t.rank for t in adapter.targets.values()}),
            ("alpha", set(export.alphas.values())),
        ):
            if len(values) > 1:
                export.problems.append(
                    f"torchtune's recipes have one {what} for all layers, the adapter has {sorted(values)}"
                )
        export.add_whole()
        return export.encoded()


def _rank(path: str, slots: Mapping[str, str], source: Source, config: Mapping[str, Any]) -> tuple[int, str | None]:
    missing = [f"lora_{slot}.weight" for slot in "ab" if slot not in slots]
    if missing:
        return 0, f"{path!r}: {missing[0]} is missing"
    down, up = (source.tensors[slots[slot]].shape for slot in "ab")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        return 0, f"{path!r}: lora_a is {down} and lora_b is {up}, which is no pair"
    if config.get("r", down[0]) != down[0]:
        return 0, f"{path!r}: the configuration says rank {config['r']!r}, the tensors have {down[0]}"
    return down[0], None
