"""Read the settings of PEFT's ``adapter_config.json``: which are refused, and what they say of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loraio.errors import FormatError, quoted
from loraio.formats.exported import ORIGIN
from loraio.formats.foreign import ForeignLayer
from loraio.formats.patterns import Budget, Pattern, PatternTable
from loraio.formats.reading import Reading
from loraio.formats.report import Line, settings
from loraio.registry import known

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
"""Settings that change the maths when they are set: factors alone then give other weights."""

_MEANT = (
    "alpha_pattern",
    "bias",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
)
"""Settings that give the tensors their meaning."""

RECORD = (
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
"""Settings that record how the adapter was made; they do not change its effect."""

_MOST_SAVED = 100


class PeftConfig:
    """The settings of a PEFT adapter.

    Args:
        values: by name; None for a file without a configuration.
        part: of a pipeline that they are for; empty for a whole model.
    """

    def __init__(self, values: Mapping[str, Any] | None, *, part: str = "") -> None:
        self.values = values or {}
        self.is_there = values is not None
        self._part = part
        self._tables: dict[str, PatternTable] = {}
        self._problems: list[str] = []
        budget = Budget()
        for name in ("rank_pattern", "alpha_pattern"):
            try:
                self._tables[name] = PatternTable(self.values.get(name), budget)
            except FormatError as error:
                self._tables[name] = PatternTable({}, budget)
                self._problems.append(f"{name}: {error.message}")

    def lines(self) -> list[Line]:
        """Return the fate of each setting."""
        named = {f"{self._part}.{key}" if self._part else key: key in _MEANT for key in self.values}
        record = [name for name, meant in named.items() if not meant]
        return [
            *settings([name for name, meant in named.items() if meant], "carried"),
            *settings(record, "carried", f"kept in the record, 'training.{ORIGIN}'"),
        ]

    def refusals(self, *, ignore: Sequence[str] = ()) -> list[str]:
        """Return the reasons why an adapter with these settings, some of them ignored, cannot be used."""
        config = {key: value for key, value in self.values.items() if key not in ignore}
        method = config.get("peft_type", "LORA")
        if method != "LORA":
            return [f"peft_type is {method!r}; only 'LORA' is read"]
        reasons = []
        start = config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            reasons.append(
                f"init_lora_weights is {start!r}: the factors are relative to a base that was changed at the start; "
                "PEFT's path_initial_model_for_weight_conversion saves them without it"
            )
        reasons += [f"{key} is set, which changes the maths" for key in _OTHER_MATHS if config.get(key)]
        own = {*_MEANT, *RECORD, *_OTHER_MATHS}
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
        return reasons + self._problems

    def layer(self, path: str, slots: Mapping[str, str], reading: Reading) -> ForeignLayer | None:
        """Return the layer of a module; None if it cannot be read, and the refusals are noted."""
        missing = [f"{path!r}: lora_{slot} is missing" for slot in ("A", "B") if slot not in slots]
        shapes = [reading.shape(slots[slot]) for slot in ("A", "B") if slot in slots]
        if missing or any(len(shape) < 2 for shape in shapes):
            reading.refusals += missing or [f"{path!r}: factors of shapes {known(map(str, shapes))}"]
            return None
        rank, ups = shapes[0][0], shapes[1][1]
        if rank != ups or not rank:
            reading.refusals.append(f"{path!r}: lora_A has rank {rank}, lora_B {ups}")
            return None
        kind = "dora" if "magnitude" in slots else "lora"
        if not self.is_there:
            return ForeignLayer(name=path, slots=slots, rank=rank, alpha=None, kind=kind)
        config = self.values
        try:
            stated = self._tables["rank_pattern"].value(path, config.get("r", rank))
            alpha = self._tables["alpha_pattern"].value(path, config.get("lora_alpha"))
        except FormatError as error:
            reading.refusals.append(error.message)
            return None
        if stated != rank:
            reading.refusals.append(f"{path!r}: the configuration says rank {stated!r}, the tensors have {rank}")
        if alpha is not None and (not isinstance(alpha, int | float) or isinstance(alpha, bool)):
            reading.refusals.append(f"{path!r}: alpha is {alpha!r}, not a number")
            alpha = None
        if bool(config.get("use_dora")) != (kind == "dora"):
            there = "there" if kind == "dora" else "not there"
            reading.refusals.append(f"{path!r}: use_dora is {bool(config.get('use_dora'))}, a magnitude is {there}")
        if "bias" in slots and not config.get("lora_bias"):
            reading.refusals.append(f"{slots['bias']!r} is there, but lora_bias is not set: PEFT would pass over it")
        rule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
        return ForeignLayer(name=path, slots=slots, rank=rank, alpha=alpha, kind=kind, scale_rule=rule)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Return a line for each layer that PEFT would pass over, and for each entry of a list without a layer."""
        wanted = self.values.get("target_modules")
        there = set(names)
        if isinstance(wanted, str):
            try:
                pattern = None if wanted == "all-linear" else Pattern(wanted, Budget())
                return [
                    f"{name!r} is not in target_modules: PEFT would pass over it"
                    for name in names
                    if pattern is not None and not _comes_with_attention(name, there) and not pattern.matches(name)
                ]
            except FormatError as error:
                return [f"target_modules: {error.message}"]
        if not isinstance(wanted, list) or not all(isinstance(entry, str) for entry in wanted):
            return [] if wanted is None else [f"target_modules is {quoted(wanted)}"]
        entries = set(wanted)
        lines = [
            f"{name!r} is not in target_modules: PEFT would pass over it"
            for name in names
            if not _comes_with_attention(name, there) and entries.isdisjoint(_ends_of(name))
        ]
        answered = {end for name in names for end in _ends_of(name) if end in entries}
        return lines + [
            f"target_modules names {entry!r}, of which the file has no factors"
            for entry in sorted(wanted)
            if entry not in answered
        ]

    def excluded(self, names: Iterable[str]) -> list[str]:
        """Return a line for each layer that the configuration excludes."""
        entries = set(_names(self.values.get("exclude_modules")))
        return [
            f"{name!r} is in exclude_modules: PEFT would pass over it"
            for name in names
            if not entries.isdisjoint(_ends_of(name))
        ]

    def saves(self, name: str) -> bool:
        """Return True if a tensor's module is saved whole: PEFT compares ends of names, with or without a dot."""
        modules = _names(self.values.get("modules_to_save"))
        path = name.rpartition(".")[0]
        while path:
            if any(path.endswith(module) for module in modules):
                return True
            path = path.rpartition(".")[0]
        return False


def _names(value: Any) -> list[str]:
    """Return the names in a list; none of any other value."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _comes_with_attention(name: str, names: set[str]) -> bool:
    """Return True for the output projection of an attention layer that is adapted itself."""
    path, _, last = name.rpartition(".")
    return last == "out_proj" and path in names


def _ends_of(name: str) -> Iterator[str]:
    """Yield the names by which a list may call a module: its own, and the rest of it after each dot."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
