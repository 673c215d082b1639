"""The adapter folders of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Of its methods LoRA, DoRA and rank-stabilised LoRA. A state dict taken from a live PEFT model is read too; it has the
adapter's name in its keys, and no configuration.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter, Target
from loraio.adapter.layers import TargetModule, target_modules
from loraio.errors import AdapterError, FormatError, quoted
from loraio.formats.foreign import (
    ORIGIN,
    Encoded,
    Factors,
    Foreign,
    ForeignLayer,
    Options,
    carried_lines,
    exported_document,
    misuse,
    origin_of,
    passed_over,
)
from loraio.formats.patterns import Budget, Pattern, PatternTable
from loraio.formats.report import Line, Report, settings, tensors
from loraio.formats.sources import Source
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor, nn

_PREFIX = "base_model.model."

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

_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_OTHER_MATHS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings that, where they are set, give other weights than factors alone do."""

MEANT: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "lora_alpha": None,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": None,
    "rank_pattern": {},
    "target_modules": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Settings that say what the tensors mean, and what they are where they are missing."""

_RECORD = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Settings that say how the adapter was made; they change nothing of what it does."""

_MOST_SAVED = 100

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
            if key.startswith(_PREFIX) or found.adapter:
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
        excluded = set(_names((config or {}).get("exclude_modules")))
        refusals += [
            f"{layer.name!r} is in exclude_modules: PEFT would pass over it"
            for layer in layers
            if not excluded.isdisjoint(_ends_of(layer.name))
        ]
        if not layers and not refusals:
            refusals.append("it holds no layer's factors")
        modules = _names((config or {}).get("modules_to_save"))
        saved |= {name for name in whole if _in_modules(name, modules)}
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
        return (place.path,) if place.parameter in ("weight", "in_proj_weight") else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """What PEFT's layers hold."""
        if layer not in _LAYERS:
            return "PEFT has no LoRA for this layer type"
        if grouped:
            return "PEFT's factors of a grouped convolution give a dense kernel, which PEFT itself cannot merge"
        if layer == "MultiheadAttention" and kind == "dora":
            return "PEFT has no DoRA for MultiheadAttention"
        return None

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
        return _Export(adapter, network, state).encoded()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """What a key of the file says: slot "" is a tensor of the base's own, whose name is the path."""

    path: str
    slot: str
    adapter: str | None = None
    saved: bool = False


def _parse(key: str) -> _Key | None:
    """None for the base's own copy of a module that the adapter replaces."""
    name = key.removeprefix(_PREFIX)
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


def refused_settings(config: Mapping[str, Any]) -> list[str]:
    reasons = []
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        return [f"peft_type is {method!r}; only 'LORA' is read"]
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        reasons.append(
            f"init_lora_weights is {start!r}: the factors are relative to a base that was changed at the start; "
            "PEFT's path_initial_model_for_weight_conversion saves them without it"
        )
    reasons += [f"{key} is set, which changes the maths" for key in _OTHER_MATHS if config.get(key)]
    own = {*MEANT, *_RECORD, *_OTHER_MATHS}
    reasons += [f"unknown setting {key!r}: {config[key]!r}" for key in sorted(config.keys() - own) if config[key]]
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        reasons.append(f"bias is {config['bias']!r}, not none, all or lora_only")
    for key in ("modules_to_save", "exclude_modules"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            reasons.append(f"{key} is {names!r}, not a list of names")
    saved = len(_names(config.get("modules_to_save")))
    if saved > _MOST_SAVED:
        reasons.append(f"modules_to_save has {saved:,} names, at most {_MOST_SAVED} are read")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            reasons.append(f"{key} is {config[key]!r}, not an object")
    return reasons


def layer_of(
    path: str,
    slots: Mapping[str, str],
    source: Source,
    config: Mapping[str, Any] | None,
    tables: Mapping[str, PatternTable],
) -> tuple[ForeignLayer | None, list[str]]:
    """One layer, or why not; the tables are from `tables_of`."""
    missing = [f"{path!r}: lora_{slot} is missing" for slot in ("A", "B") if slot not in slots]
    shapes = [source.tensors[slots[slot]].shape for slot in ("A", "B") if slot in slots]
    if missing or any(len(shape) < 2 for shape in shapes):
        return None, missing or [f"{path!r}: factors of shapes {known(map(str, shapes))}"]
    rank, ups = shapes[0][0], shapes[1][1]
    if rank != ups or not rank:
        return None, [f"{path!r}: lora_A has rank {rank}, lora_B {ups}"]
    if config is None:
        return ForeignLayer(name=path, slots=slots, rank=rank, alpha=None, kind=_kind(slots)), []
    problems = []
    try:
        stated = tables["rank_pattern"].value(path, config.get("r", rank))
        alpha = tables["alpha_pattern"].value(path, config.get("lora_alpha"))
    except FormatError as error:
        return None, [error.message]
    if stated != rank:
        problems.append(f"{path!r}: the configuration says rank {stated!r}, the tensors have {rank}")
    if alpha is not None and (not isinstance(alpha, int | float) or isinstance(alpha, bool)):
        problems.append(f"{path!r}: alpha is {alpha!r}, not a number")
        alpha = None
    if bool(config.get("use_dora")) != ("magnitude" in slots):
        problems.append(f"{path!r}: use_dora is {bool(config.get('use_dora'))}, a magnitude is {_there(slots)}")
    if "bias" in slots and not config.get("lora_bias"):
        problems.append(f"{slots['bias']!r} is there, but lora_bias is not set: PEFT would pass over it")
    rule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    layer = ForeignLayer(name=path, slots=slots, rank=rank, alpha=alpha, kind=_kind(slots), scale_rule=rule)
    return layer, problems


def _names(value: Any) -> list[str]:
    """The names in a list that a configuration should hold."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _kind(slots: Mapping[str, str]) -> str:
    return "dora" if "magnitude" in slots else "lora"


def _there(slots: Mapping[str, str]) -> str:
    return "there" if "magnitude" in slots else "not there"


def tables_of(config: Mapping[str, Any] | None) -> tuple[dict[str, PatternTable], list[str]]:
    """The configuration's settings that have a value for each pattern, by name, and what is wrong with them."""
    budget, problems = Budget(), []
    tables = {name: PatternTable({}, budget) for name in ("rank_pattern", "alpha_pattern")}
    for name in tables:
        try:
            tables[name] = PatternTable((config or {}).get(name), budget)
        except FormatError as error:
            problems.append(f"{name}: {error.message}")
    return tables, problems


def unmatched(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A line for each layer that PEFT would pass over, and for each entry of the list that no layer answers to."""
    wanted = config.get("target_modules")
    there = set(names)
    if isinstance(wanted, str):
        try:
            pattern = None if wanted == "all-linear" else Pattern(wanted, Budget())
            return [
                f"{name!r} is not in target_modules: PEFT would pass over it"
                for name in names
                if pattern is not None and not _attention_of(name, there) and not pattern.matches(name)
            ]
        except FormatError as error:
            return [f"target_modules: {error.message}"]
    if not isinstance(wanted, list) or not all(isinstance(entry, str) for entry in wanted):
        return [] if wanted is None else [f"target_modules is {quoted(wanted)}"]
    entries = set(wanted)
    lines = [
        f"{name!r} is not in target_modules: PEFT would pass over it"
        for name in names
        if not _attention_of(name, there) and entries.isdisjoint(_ends_of(name))
    ]
    answered = {end for name in names for end in _ends_of(name) if end in entries}
    return lines + [
        f"target_modules names {entry!r}, of which the file has no factors"
        for entry in sorted(wanted)
        if entry not in answered
    ]


def _attention_of(name: str, names: set[str]) -> bool:
    """Whether it is the output projection of an attention layer that is adapted, which comes with it."""
    path, _, last = name.rpartition(".")
    return last == "out_proj" and path in names


def _ends_of(name: str) -> Iterator[str]:
    """What a list of modules may call it by: its name, and what is left of it after each dot."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor's module is one of those that are saved whole: PEFT compares ends of names, dots or not."""
    path = name.rpartition(".")[0]
    while path:
        if any(path.endswith(module) for module in modules):
            return True
        path = path.rpartition(".")[0]
    return False


@dataclass
class _Export:
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
        reason = PEFT.refusal(target.layer, target.kind, grouped=target.groups > 1)
        if reason is None and not PEFT.spell(place):
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
        self.tensors |= {f"{_PREFIX}{path}.{slot}": value for slot, value in slots.items()}
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
            key = _PREFIX + _wrapped(name, {path})
            have = ranks.get(name, 0)
            if have == rank:
                continue
            like = next(self.tensors[f"{_PREFIX}{_wrapped(one, {path})}.lora_A.weight"] for one in both)
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
                self.tensors[_PREFIX + key] = self.adapter.tensors[name]
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
                self.tensors[_PREFIX + name] = self.adapter.tensors[name]
                resized = self.adapter.whole[name].shape != self.adapter.whole[name].base_shape
                how = f"the base for PEFT needs its shape {self.adapter.whole[name].shape}" if resized else ""
                self.lines += tensors([name], "carried", how)
            elif name in self.adapter.targets:
                self.problems.append(f"{name!r} is adapted, and PEFT would save its module {path!r} whole")
            elif self.state is None or name not in self.state:
                self.problems.append(
                    f"{name!r} of the base is needed, since PEFT saves the module {path!r} whole: --base"
                )
            elif _PREFIX + name not in self.tensors:
                self.tensors[_PREFIX + name] = self.state[name]

    def _config(
        self,
        ranks: Mapping[str, int],
        alphas: Mapping[str, int | float],
        rules: set[str],
        saved: tuple[str, list[str]],
    ) -> dict[str, Any]:
        rank = _commonest(ranks.values())
        alpha = _commonest(alphas.values())
        before = {key: value for key, value in origin_of(self.adapter, "peft").items() if key in _RECORD}
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


PEFT = Peft()
