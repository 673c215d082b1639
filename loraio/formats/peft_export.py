"""Write an adapter as a PEFT folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter, Target
from loraio.bases.targets import TargetModule, target_modules
from loraio.errors import AdapterError
from loraio.formats.exported import carried_lines, exported_document, origin_of
from loraio.formats.foreign import Encoded
from loraio.formats.peft_config import RECORD
from loraio.formats.pitfalls import misuse
from loraio.formats.report import Line, Report, settings, tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "base_model.model."

_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")


PARAMETERS = ("weight", "in_proj_weight")
"""Names of the weights that PEFT adapts in their modules."""


def why_not(layer: str, kind: str, *, grouped: bool = False) -> str | None:
    """Return why PEFT cannot hold this kind on this layer type; None where it can."""
    if layer not in _LAYERS:
        return "PEFT has no LoRA for this layer type"
    if grouped:
        return "PEFT's factors of a grouped convolution give a dense kernel, which PEFT itself cannot merge"
    if layer == "MultiheadAttention" and kind == "dora":
        return "PEFT has no DoRA for MultiheadAttention"
    return None


@dataclass
class Export:
    """An adapter on its way to PEFT."""

    adapter: Adapter
    network: nn.Module
    state: Mapping[str, Tensor] | None
    problems: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def encoded(self) -> Encoded:
        adapter = self.adapter
        places = target_modules(self.network)
        attention = {place.path for place in places.values() if place.layer.name == "MultiheadAttention"}
        kinds = Counter(target.kind for target in adapter.targets.values())
        if len(kinds) > 1:
            self.problems.append("PEFT has one use_dora for all layers, the adapter has layers of both kinds")
        rules = {target.scale_rule for target in adapter.targets.values()}
        ranks: dict[str, int] = {}
        alphas: dict[str, int | float] = {}
        for name, target in adapter.targets.items():
            place = places.get(name)
            if place is None or (place.layer.name, place.groups) != (target.layer, target.groups):
                self.problems.append(f"{name!r} is no {target.layer} with groups={target.groups} of the network")
                continue
            path = place.path
            ranks[path], alphas[path] = target.rank, self._alpha(name, target, mixed=len(rules) > 1)
            self._add(name, target, place, attention)
        attention &= {path.removesuffix("out_proj").removesuffix(".") for path in ranks} | ranks.keys()
        for path in sorted(attention) if not self.problems else ():
            self._complete_attention(path, ranks, alphas)
        saved = self._whole(set(ranks), attention)
        if self.problems:
            raise AdapterError(
                "PEFT cannot hold this adapter, or would use it wrongly",
                problems=self.problems,
                hint="loraio merge puts it into the base for good",
            )
        config = self._config(ranks, alphas, rules, saved)
        self.lines += settings(("rank", "alpha", "kind", "scale_rule"), "carried", "in adapter_config.json")
        self.lines += carried_lines(adapter)
        return Encoded(
            tensors=dict(sorted(self.tensors.items())),
            report=Report.of(self.lines),
            document=exported_document(adapter),
            metadata={"format": "pt"},
            config=config,
        )

    def _alpha(self, name: str, target: Target, *, mixed: bool) -> int | float:
        """The alpha under the rule that the configuration will say."""
        if not mixed or target.scale_rule == "alpha/r":
            return target.alpha
        alpha = target.scale * target.rank
        if alpha / target.rank != target.scale:
            self.problems.append(f"{name!r}: PEFT has one use_rslora for all layers, and no alpha / r is its scale")
        self.lines += settings([f"{name}.alpha"], "changed", f"{alpha!r} for alpha / r: one rule for all layers")
        return alpha

    def _add(self, name: str, target: Target, place: TargetModule, attention: set[str]) -> None:
        reason = why_not(target.layer, target.kind, grouped=target.groups > 1)
        if reason is None and place.parameter not in PARAMETERS:
            reason = "PEFT has no LoRA for attention whose projections are apart"
        if reason is None and target.layer == "Conv3d" and target.shape[2:4] == (1, 1):
            reason = f"PEFT fails to merge a Conv3d with the kernel {target.shape[2:]}"
        wrong = misuse(place.module)
        if reason is None and wrong is not None:
            reason = f"PEFT {wrong}"
        if reason is not None:
            self.problems.append(f"{name!r}: {reason}")
            return
        factors = self.adapter.factors_of(name)
        path = _wrapped(place.path, attention)
        twice = path != place.path
        ones = (1,) * (len(target.shape) - 2)
        A, B = factors["lora_A"], factors["lora_B"] / 2 if twice else factors["lora_B"]
        if twice and not (2 * B).equal(factors["lora_B"]):
            self.problems.append(f"{name!r}: lora_B has values too small to be halved, and PEFT adds the product twice")
        if target.layer == "Embedding":
            slots = {"lora_embedding_A": A, "lora_embedding_B": B}
        elif ones:
            slots = {"lora_A.weight": A.reshape(-1, *target.shape[1:]), "lora_B.weight": B.reshape(*B.shape, *ones)}
        else:
            slots = {"lora_A.weight": A, "lora_B.weight": B}
        if "magnitude" in factors:
            magnitude = factors["magnitude"]
            slots["lora_magnitude_vector"] = magnitude.reshape(1, -1, *ones) if ones else magnitude
        self.tensors |= {f"{PREFIX}{path}.{slot}": value for slot, value in slots.items()}
        halved = {f"{name}.lora_B"} if twice else set()
        self.lines += tensors(halved, "changed", "halved: PEFT adds the product of an attention layer's out_proj twice")
        self.lines += tensors({f"{name}.{short}" for short in factors} - halved, "carried")

    def _complete_attention(self, path: str, ranks: dict[str, int], alphas: dict[str, int | float]) -> None:
        """PEFT adapts both projections of an attention layer, at one rank and alpha."""
        import torch

        out = f"{path}.out_proj" if path else "out_proj"
        if path not in ranks and out not in ranks:
            return
        both = [name for name in (path, out) if name in ranks]
        rank = max(ranks[name] for name in both)
        scales = {alphas[name] / ranks[name] if self._plain_rule else alphas[name] for name in both}
        if len(both) == 2 and (len(scales) > 1 or (not self._plain_rule and ranks[path] != ranks[out])):
            self.problems.append(
                f"{path!r}: PEFT has one rank and one alpha for both projections of an attention layer"
            )
            return
        alpha = next(alphas[name] for name in both if ranks[name] == rank)
        width: Any = self.network.get_submodule(path).embed_dim
        for name, rows in ((path, 3 * width), (out, width)):
            key = PREFIX + _wrapped(name, {path})
            have = ranks.get(name, 0)
            if have == rank:
                continue
            like = next(self.tensors[f"{PREFIX}{_wrapped(one, {path})}.lora_A.weight"] for one in both)
            A, B = (self.tensors.get(f"{key}.lora_{slot}.weight") for slot in "AB")
            more = rank - have
            zero_A, zero_B = like.new_zeros(more, width), like.new_zeros(rows, more)
            self.tensors[f"{key}.lora_A.weight"] = zero_A if A is None else torch.cat([A, zero_A.to(A.dtype)])
            self.tensors[f"{key}.lora_B.weight"] = zero_B if B is None else torch.cat([B, zero_B.to(B.dtype)], 1)
            what = "a pair of zeros is added" if not have else f"padded with zeros to rank {rank}"
            self.lines += settings([f"{name}.rank"], "changed", f"{what}: PEFT adapts both projections at one rank")
        ranks[path], alphas[path] = rank, alpha
        ranks.pop(out, None)
        alphas.pop(out, None)

    @property
    def _plain_rule(self) -> bool:
        rules = {target.scale_rule for target in self.adapter.targets.values()}
        return rules != {"alpha/sqrt(r)"}

    def _whole(self, targeted: set[str], attention: set[str]) -> tuple[str, list[str]]:
        """Adds the tensors that are replaced; returns what the configuration says of biases and of saved modules."""
        bias = "none"
        modules: set[str] = set()
        for name, whole in self.adapter.whole.items():
            path, _, last = name.rpartition(".")
            if whole.role == "bias":
                projection = path.rpartition(".")[0] in attention and path.endswith("out_proj")
                inside = path in targeted or projection
                key = f"{_wrapped(path, attention)}.base_layer.{last}" if inside else name
                self.tensors[PREFIX + key] = self.adapter.tensors[name]
                bias = "lora_only" if inside and last == "bias" and bias != "all" else "all"
                self.lines += tensors([name], "carried")
            elif not path:
                self.problems.append(f"{name!r}: PEFT saves modules, and the network itself is none of its modules")
            else:
                modules.add(path)
        entries = sorted(modules)
        everywhere = [path for path, _ in self.network.named_modules() if any(path.endswith(one) for one in entries)]
        for path in everywhere:
            self._save_module(path, new=path not in modules)
        return bias, entries

    def _save_module(self, path: str, *, new: bool) -> None:
        """The whole state of a module: PEFT saves and loads no less."""
        for last in self.network.get_submodule(path).state_dict():
            name = f"{path}.{last}"
            if name in self.adapter.whole and self.adapter.whole[name].role != "bias":
                self.tensors[PREFIX + name] = self.adapter.tensors[name]
                resized = self.adapter.whole[name].shape != self.adapter.whole[name].base_shape
                how = f"the base for PEFT needs its shape {self.adapter.whole[name].shape}" if resized else ""
                self.lines += tensors([name], "carried", how)
            elif name in self.adapter.targets:
                self.problems.append(f"{name!r} is adapted, and PEFT would save its module {path!r} whole")
            elif self.state is None or name not in self.state:
                self.problems.append(
                    f"{name!r} of the base is needed, since PEFT saves the module {path!r} whole: --base"
                )
            elif PREFIX + name not in self.tensors:
                self.tensors[PREFIX + name] = self.state[name]

    def _config(
        self,
        ranks: Mapping[str, int],
        alphas: Mapping[str, int | float],
        rules: set[str],
        saved: tuple[str, list[str]],
    ) -> dict[str, Any]:
        rank = _commonest(ranks.values())
        alpha = _commonest(alphas.values())
        before = {key: value for key, value in origin_of(self.adapter, "peft").items() if key in RECORD}
        return {
            "auto_mapping": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "task_type": None,
            **before,
            "alpha_pattern": {_anchored(path): one for path, one in sorted(alphas.items()) if one != alpha},
            "bias": saved[0],
            "fan_in_fan_out": False,
            "lora_alpha": alpha,
            "lora_bias": False,
            "modules_to_save": saved[1] or None,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {_anchored(path): one for path, one in sorted(ranks.items()) if one != rank},
            "target_modules": self._target_modules(sorted(ranks)),
            "use_dora": "dora" in {target.kind for target in self.adapter.targets.values()},
            "use_rslora": rules == {"alpha/sqrt(r)"},
        }

    def _target_modules(self, paths: list[str]) -> list[str] | str:
        """The names themselves, or an expression where a name is the end of another module's too."""
        others = [path for path, _ in self.network.named_modules() if path not in paths]
        if not any(path == one or path.endswith(f".{one}") for path in others for one in paths):
            return paths
        return "|".join(re.escape(path) for path in paths)


def _wrapped(path: str, attention: set[str]) -> str:
    """A module's name in a PEFT model: an attention layer keeps its output projection in what it wraps."""
    parent, _, last = path.rpartition(".")
    if last == "out_proj" and parent in attention:
        return f"{parent}.base_layer.out_proj"
    return path


def _anchored(path: str) -> str:
    """A pattern for this module alone: others may end in its name."""
    return f"^{re.escape(path)}"


def _commonest(values: Iterable[Any]) -> Any:
    """The value that occurs most often; of several the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
