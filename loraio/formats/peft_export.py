"""Write an adapter as a PEFT folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraio.adapter import Target
from loraio.adapter.layers import tensor_name
from loraio.bases.targets import TargetModule
from loraio.formats.exported import origin_of
from loraio.formats.foreign import Encoded
from loraio.formats.peft_config import RECORD
from loraio.formats.pitfalls import misuse
from loraio.formats.report import settings, tensors
from loraio.formats.writing import Writing

PREFIX = "base_model.model."

_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")

PARAMETERS = ("weight", "in_proj_weight")
"""Names of the weights that PEFT adapts in their modules."""


def why_not(layer: str, kind: str, *, grouped: bool = False) -> str | None:
    """Return the reason why PEFT cannot hold this kind on this layer type; None if it can."""
    if layer not in _LAYERS:
        return "PEFT has no LoRA for this layer type"
    if grouped:
        return "PEFT's factors of a grouped convolution give a dense kernel, which PEFT itself cannot merge"
    if layer == "MultiheadAttention" and kind == "dora":
        return "PEFT has no DoRA for MultiheadAttention"
    return None if kind in ("lora", "dora") else f"PEFT has no {kind}"


@dataclass(kw_only=True)
class Export(Writing):
    """An adapter on its way to PEFT.

    Attributes:
        ranks: of each adapted module.
        alphas: of each adapted module, under the rule of the configuration.
        attention: the attention layers of the network; at last those that are adapted.
    """

    tool: str = "PEFT"
    needs: str = "PEFT's layers ignore dilation and padding mode"
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int | float] = field(default_factory=dict)
    attention: set[str] = field(default_factory=set)

    def encoded(self) -> Encoded:
        """Return the two files of a folder.

        Raises:
            AdapterError: PEFT cannot hold the adapter, or would use it wrongly; all reasons are listed.
        """
        adapter = self.adapter
        self.attention = {place.path for place in self.places.values() if place.layer.name == "MultiheadAttention"}
        if len({target.kind for target in adapter.targets.values()}) > 1:
            self.problems.append("PEFT has one use_dora for all layers, the adapter has layers of both kinds")
        for name, target in adapter.targets.items():
            place = self.place(name, target)
            if place is not None:
                self.ranks[place.path], self.alphas[place.path] = target.rank, self._alpha(name, target)
                self._add(name, target, place)
        self.attention &= {path.removesuffix("out_proj").removesuffix(".") for path in self.ranks} | self.ranks.keys()
        for path in sorted(self.attention) if not self.problems else ():
            self._complete_attention(path)
        bias, saved = self._add_biases(), self._add_modules()
        self.check()
        self.lines += settings(("rank", "alpha", "kind", "scale_rule"), "carried", "in adapter_config.json")
        return self.in_safetensors({"format": "pt"}, config=self._config(bias, saved))

    @property
    def _rules(self) -> set[str]:
        return {target.scale_rule for target in self.adapter.targets.values()}

    def _alpha(self, name: str, target: Target) -> int | float:
        """Return the alpha under the rule of the configuration."""
        if len(self._rules) == 1 or target.scale_rule == "alpha/r":
            return target.alpha
        alpha = target.scale * target.rank
        if alpha / target.rank != target.scale:
            self.problems.append(f"{name!r}: PEFT has one use_rslora for all layers, and no alpha / r is its scale")
        self.lines += settings([f"{name}.alpha"], "changed", f"{alpha!r} for alpha / r: one rule for all layers")
        return alpha

    def _add(self, name: str, target: Target, place: TargetModule) -> None:
        """Add the factors of one weight, or a problem."""
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
        path = _wrapped(place.path, self.attention)
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

    def _complete_attention(self, path: str) -> None:
        """Adapt both projections of an attention layer at one rank and alpha, as PEFT does, with zeros."""
        import torch

        ranks, alphas = self.ranks, self.alphas
        out = tensor_name(path, "out_proj")
        both = [name for name in (path, out) if name in ranks]
        if not both:
            return
        rank = max(ranks[name] for name in both)
        root_rule = self._rules == {"alpha/sqrt(r)"}
        scales = {alphas[name] if root_rule else alphas[name] / ranks[name] for name in both}
        if len(both) == 2 and (len(scales) > 1 or (root_rule and ranks[path] != ranks[out])):
            self.problems.append(
                f"{path!r}: PEFT has one rank and one alpha for both projections of an attention layer"
            )
            return
        alpha = next(alphas[name] for name in both if ranks[name] == rank)
        width: Any = self.net.get_submodule(path).embed_dim
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

    def _add_biases(self) -> str:
        """Add the biases that are replaced; return the ``bias`` of the configuration."""
        bias = "none"
        for name in self._replaced(bias=True):
            path, _, last = name.rpartition(".")
            projection = path.rpartition(".")[0] in self.attention and path.endswith("out_proj")
            inside = path in self.ranks or projection
            key = f"{_wrapped(path, self.attention)}.base_layer.{last}" if inside else name
            self.carry_whole(name, PREFIX + key)
            bias = "lora_only" if inside and last == "bias" and bias != "all" else "all"
        return bias

    def _add_modules(self) -> list[str]:
        """Add the modules with tensors that are replaced; return the ``modules_to_save`` of the configuration."""
        names = self._replaced(bias=False)
        self.problems += [
            f"{name!r}: PEFT saves modules, and the network itself is none of its modules"
            for name in names
            if "." not in name
        ]
        entries = sorted({name.rpartition(".")[0] for name in names if "." in name})
        for path, module in self.net.named_modules():
            if any(path.endswith(entry) for entry in entries):
                for last in module.state_dict():
                    self._save(path, f"{path}.{last}")
        return entries

    def _replaced(self, *, bias: bool) -> list[str]:
        return [name for name, whole in self.adapter.whole.items() if (whole.role == "bias") == bias]

    def _save(self, path: str, name: str) -> None:
        """Add one tensor of a module that PEFT saves whole."""
        if name in self.adapter.whole and self.adapter.whole[name].role != "bias":
            self.carry_whole(name, PREFIX + name)
        elif name in self.adapter.targets:
            self.problems.append(f"{name!r} is adapted, and PEFT would save its module {path!r} whole")
        elif self.context.state is None or name not in self.context.state:
            self.problems.append(f"{name!r} of the base is needed, since PEFT saves the module {path!r} whole: --base")
        else:
            self.tensors.setdefault(PREFIX + name, self.context.state[name])

    def _config(self, bias: str, saved: list[str]) -> dict[str, Any]:
        ranks, alphas = self.ranks, self.alphas
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
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
            "bias": bias,
            "fan_in_fan_out": False,
            "lora_alpha": alpha,
            "lora_bias": False,
            "modules_to_save": saved or None,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {_anchored(path): one for path, one in sorted(ranks.items()) if one != rank},
            "target_modules": self._target_modules(sorted(ranks)),
            "use_dora": "dora" in {target.kind for target in self.adapter.targets.values()},
            "use_rslora": self._rules == {"alpha/sqrt(r)"},
        }

    def _target_modules(self, paths: list[str]) -> list[str] | str:
        """Return the names, or an expression if a name is also the end of another module's."""
        others = [path for path, _ in self.net.named_modules() if path not in paths]
        if not any(path == one or path.endswith(f".{one}") for path in others for one in paths):
            return paths
        return "|".join(re.escape(path) for path in paths)


def _wrapped(path: str, attention: set[str]) -> str:
    """Return a module's name in a PEFT model, which wraps the output projection of attention once more."""
    parent, _, last = path.rpartition(".")
    if last == "out_proj" and parent in attention:
        return f"{parent}.base_layer.out_proj"
    return path


def _anchored(path: str) -> str:
    """Return a pattern for this module alone, since the names of others may end in its name."""
    return f"^{re.escape(path)}"


def _commonest(values: Iterable[Any]) -> Any:
    """Return the value that occurs most often; of several the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
