"""``loraio inspect``: describe a file from its header alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output
from loraio.registry import known

if TYPE_CHECKING:
    from loraio.adapter import Target
    from loraio.files.tensorfile import Header, TensorInfo
    from loraio.formats.foreign import Dialect
    from loraio.formats.sources import Source

Facts = dict[str, Any]

TARGET = (
    "kind", "layer", "groups", "shape", "dtype", "rank", "alpha", "scale_rule", "scale", "parameters", "base_sha256",
)  # fmt: skip
"""Keys of each target of an adapter."""

RESIDUE = ("adapter_sha256", "base_sha256", "merged_sha256", "strength")


@click.command(epilog=_options.example("loraio inspect one.safetensors --json"))
@click.argument("file", type=click.Path())
@_options.json_option
def inspect(file: str, as_json: bool) -> None:
    """Describe FILE: an adapter, a pack, a base or a residue.

    Only headers are read, which takes a tenth of a second. For a sharded base, FILE is its index or its folder.
    """
    from loraio.files import sharded
    from loraio.formats.sources import is_adapter_folder

    if sharded.is_sharded(file) and not is_adapter_folder(file):
        found = sharded.read_sharded_header(file)
        facts = _base_facts(found.tensors, found.document(), shards=list(found.headers))
        facts = {"bytes": found.file_bytes, "header_bytes": found.header_bytes, **facts}
    else:
        facts = _facts(file)
    facts = {"file": file, **facts}
    if as_json:
        _output.print_json("inspect", facts)
    else:
        PRINTERS[facts["type"]](facts)


def _facts(file: str) -> Facts:
    from loraio.formats import dialects
    from loraio.formats.pack import is_pack
    from loraio.formats.sources import open_source

    source = open_source(file)
    found, header = dialects.recognised(source), source.header
    if found is not None and found.dialect is not None:
        facts = _foreign_facts(found.dialect, source)
    elif found is not None and header is not None:
        facts = _adapter_facts(header)
    elif header is not None and is_pack(header):
        facts = _pack_facts(header)
    elif header is not None and isinstance((header.document() or {}).get("residue"), dict):
        facts = _residue_facts(header)
    else:
        facts = _base_facts(source.tensors, (header and header.document()) or {})
    reason = {} if found is None else {"reason": found.reason}
    return {"bytes": source.file_bytes, "header_bytes": header and header.header_bytes, **facts, **reason}


def _common(values: Iterable[Any]) -> Any:
    """Return the one value that all have, or None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _foreign_facts(dialect: Dialect, source: Source) -> Facts:
    foreign = dialect.read(source)
    layers, targets = foreign.layers, {}
    for layer in layers:
        shapes = {slot: source.tensors[key].shape for slot, key in layer.slots.items()}
        stated = {key: getattr(layer, key) for key in ("kind", "rank", "alpha", "scale_rule", "scale")}
        parameters = sum(math.prod(shape) for slot, shape in shapes.items() if slot != "alpha")
        targets[layer.name] = {**dict.fromkeys(TARGET), **stated, "parameters": parameters, "tensors": shapes}
    whole = {name: source.tensors[key] for name, key in foreign.whole.items()}
    return {
        "type": "adapter",
        "dialect": dialect.name,
        "format_version": None,
        "rank": _common(layer.rank for layer in layers),
        "alpha": _common(layer.alpha for layer in layers),
        "parameters": sum(target["parameters"] for target in targets.values()),
        "targets": targets,
        "whole": {
            name: {
                "role": None,
                "dtype": info.dtype,
                "shape": info.shape,
                "base_shape": None,
                "parameters": math.prod(info.shape),
            }
            for name, info in whole.items()
        },
        "base": {"network": None, "network_args": {}, "heads": {}, "sha256": None},
        "training": {"settings": dict(foreign.settings)} if foreign.settings else {},
        "warnings": [
            *(f"cannot be used: {reason}" for reason in foreign.refusals),
            *(f"needs --approximate: {layer.name!r}: {layer.product}" for layer in layers if layer.product),
        ],
    }


def _adapter_facts(header: Header) -> Facts:
    from loraio.formats.native import FORMAT_VERSION, read_metadata

    metadata = read_metadata(header)
    targets = metadata.targets
    return {
        "type": "adapter",
        "dialect": "native",
        "format_version": FORMAT_VERSION,
        "rank": _common(target.rank for target in targets.values()),
        "alpha": _common(target.alpha for target in targets.values()),
        "parameters": sum(target.parameters for target in targets.values()),
        "targets": {name: {key: getattr(target, key) for key in TARGET} for name, target in targets.items()},
        "whole": {name: _output.whole_facts(tensor) for name, tensor in metadata.whole.items()},
        "base": {key: getattr(metadata.base, key) for key in ("network", "network_args", "heads", "sha256")},
        "training": metadata.training,
        "warnings": [_warning(name, target) for name, target in targets.items() if target.saves_nothing],
    }


def _warning(name: str, target: Target) -> str:
    largest = target.largest_saving_rank
    advice = f"ranks up to {largest} hold fewer" if largest else "no rank holds fewer"
    return (
        f"{name!r}: at rank {target.rank} the factors hold {target.parameters:,} numbers, "
        f"the weight itself {math.prod(target.shape):,}; {advice}"
    )


def _pack_facts(header: Header) -> Facts:
    from loraio.formats.pack import PACK_VERSION, check_index

    members = check_index(header, stamp=()).members
    rows = {name: {"begin": one.begin, "bytes": one.size, "sha256": one.sha256} for name, one in members.items()}
    return {"type": "pack", "format_version": PACK_VERSION, "adapters": rows}


def _residue_facts(header: Header) -> Facts:
    document = header.document() or {}
    return {
        "type": "residue",
        "format_version": document.get("format_version"),
        **{key: document["residue"].get(key) for key in RESIDUE},
        "tensors": {name: info.end - info.begin for name, info in sorted(header.tensors.items())},
    }


def _base_facts(tensors: Mapping[str, TensorInfo], document: Facts, *, shards: Sequence[str] = ()) -> Facts:
    def stated(key: str, kind: type) -> Any:
        """Return a value if it is of its kind: other people's files may hold anything."""
        value = document.get(key)
        return value if isinstance(value, kind) else kind()

    return {
        "type": "base",
        "network": document.get("network"),
        "network_args": stated("network_args", dict),
        "heads": stated("heads", dict),
        "sha256": document.get("sha256"),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "tensors": {name: {"dtype": info.dtype, "shape": info.shape} for name, info in sorted(tensors.items())},
        "parts": list(shards),
        "merged": stated("merged", list),
        "training": stated("training", dict),
    }


def _print_adapter(facts: Facts) -> None:
    base, native = facts["base"], facts["dialect"] == "native"
    _output.notes(facts["warnings"])
    version = f" format version {facts['format_version']}" if native else ""
    size = _output.size(facts["bytes"])
    _output.line(f"{facts['file']}: adapter, {facts['dialect']}{version}, {facts['parameters']:,} parameters, {size}")
    named = f"base: {base['network'] or 'network not named'}, sha256 {base['sha256']}"
    _output.line(named if native else f"by {facts['reason']}")
    table = _output.table("Targets", ["weight", "layer", "shape", "kind", "rank", "alpha", "scale", "parameters"])
    for name, target in facts["targets"].items():
        alpha, scale = ("?" if target[key] is None else f"{target[key]:g}" for key in ("alpha", "scale"))
        shape, numbers = "x".join(map(str, target["shape"] or ["?"])), f"{target['parameters']:,}"
        layer, rank = target["layer"] or "?", str(target["rank"])
        table.add_row(name, layer, shape, target["kind"], rank, alpha, scale, numbers)
    _output.console().print(table)
    if native:
        for line in _output.whole_lines(facts["whole"]):
            _output.line(line)
    elif facts["whole"]:
        _output.line(f"{len(facts['whole'])} tensors of the base are replaced whole")
    _print_training(facts["training"])


def _print_pack(facts: Facts) -> None:
    adapters, size = facts["adapters"], _output.size(facts["bytes"])
    _output.line(f"{facts['file']}: pack of {len(adapters)} adapters, format version {facts['format_version']}, {size}")
    table = _output.table("Adapters", ["name", "bytes", "sha256"])
    for name, one in adapters.items():
        table.add_row(name, f"{one['bytes']:,}", f"{one['sha256'][:12]}..")
    _output.console().print(table)


def _print_residue(facts: Facts) -> None:
    about = f"format version {facts['format_version']}, {len(facts['tensors'])} tensors"
    _output.line(f"{facts['file']}: residue of a merge, {about}, {_output.size(facts['bytes'])}")
    for key in RESIDUE:
        _output.line(f"{key}: {_words(facts[key])}")


def _print_base(facts: Facts) -> None:
    network, size = _words(facts["network"] or "network not named"), _output.size(facts["bytes"])
    shards = f" in {len(facts['parts'])} shards" if facts["parts"] else ""
    _output.line(f"{facts['file']}: base model{shards}, {network}, {facts['parameters']:,} parameters, {size}")
    if facts["sha256"]:
        _output.line(f"sha256 {facts['sha256']}")
    _print_receipts(facts["merged"])
    table = _output.table("Tensors", ["name", "dtype", "shape"])
    for name, tensor in facts["tensors"].items():
        table.add_row(name, tensor["dtype"], "x".join(map(str, tensor["shape"])) or "scalar")
    _output.console().print(table)
    _print_training(facts["training"])


PRINTERS: dict[str, Callable[[Facts], None]] = {
    "adapter": _print_adapter,
    "pack": _print_pack,
    "residue": _print_residue,
    "base": _print_base,
}


def _print_receipts(merged: Sequence[Any]) -> None:
    """Print the merges of a base, in order; other people's files may hold anything in place of a receipt."""
    for number, receipt in enumerate(merged, 1):
        _output.line(f"merged, receipt {number} of {len(merged)}:")
        for key, value in receipt.items() if isinstance(receipt, dict) else [("receipt", receipt)]:
            lines = value if key in ("base_mismatch", "forced") and isinstance(value, list) else [value]
            if key == "changed" and isinstance(value, dict):
                lines = [f"{len(value)} tensors ({known(value, limit=5)})"]
            for line in lines:
                _output.line(f"  {key}: {_words(line)}")


def _print_training(training: Facts) -> None:
    results = training.get("results")
    for key, value in training.items():
        if key != "results" or not isinstance(value, dict):
            _output.line(f"{key}: {_words(value)}")
    if isinstance(results, dict):
        _output.line(f"results: {_words({key: each for key, each in results.items() if not isinstance(each, dict)})}")
        for when in ("before", "after"):
            if when in results:
                _output.line(f"  {when}: {_words(results[when])}")


def _words(value: Any) -> str:
    """Return a JSON value on one line, whatever it is."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
