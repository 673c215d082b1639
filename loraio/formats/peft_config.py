"""Read the settings of PEFT's ``adapter_config.json``: which are refused, and what they say of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loraio.errors import FormatError, quoted
from loraio.formats.foreign import ForeignLayer
from loraio.formats.patterns import Budget, Pattern, PatternTable
from loraio.formats.sources import Source
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
"""Settings that say how the adapter was made; they change nothing of what it does."""

_MOST_SAVED = 100


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
    own = {*MEANT, *RECORD, *_OTHER_MATHS}
    reasons += [f"unknown setting {key!r}: {config[key]!r}" for key in sorted(config.keys() - own) if config[key]]
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        reasons.append(f"bias is {config['bias']!r}, not none, all or lora_only")
    for key in ("modules_to_save", "exclude_modules"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            reasons.append(f"{key} is {names!r}, not a list of names")
    saved = len(names_in(config.get("modules_to_save")))
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


def names_in(value: Any) -> list[str]:
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
        if not _attention_of(name, there) and entries.isdisjoint(ends_of(name))
    ]
    answered = {end for name in names for end in ends_of(name) if end in entries}
    return lines + [
        f"target_modules names {entry!r}, of which the file has no factors"
        for entry in sorted(wanted)
        if entry not in answered
    ]


def _attention_of(name: str, names: set[str]) -> bool:
    """Whether it is the output projection of an attention layer that is adapted, which comes with it."""
    path, _, last = name.rpartition(".")
    return last == "out_proj" and path in names


def ends_of(name: str) -> Iterator[str]:
    """What a list of modules may call it by: its name, and what is left of it after each dot."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor's module is one of those that are saved whole: PEFT compares ends of names, dots or not."""
    path = name.rpartition(".")[0]
    while path:
        if any(path.endswith(module) for module in modules):
            return True
        path = path.rpartition(".")[0]
    return False
