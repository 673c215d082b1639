"""``loraio inspect``: what a file is, from its header alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output
from loraio.registry import known

if TYPE_CHECKING:
    from loraio.adapter import Target
    from loraio.files.tensorfile import Header, TensorInfo
    from loraio.formats.foreign import Dialect
    from loraio.formats.sources import Source


@click.command(epilog=_options.example("loraio inspect three.safetensors --json"))
@click.argument("file", type=click.Path())
@_options.json_option
def inspect(file: str, as_json: bool) -> None:
    """Say what FILE is: an adapter, a pack, a base or a residue. Reads headers only, in a tenth of a second.

    Of a base that is parted into several files FILE is the index, or its folder.
    """
    from loraio.files import sharded
    from loraio.formats.sources import is_adapter_folder

    if sharded.is_sharded(file) and not is_adapter_folder(file):
        parted = sharded.read_sharded_header(file)
        facts = _base_facts(parted.tensors, parted.document(), parts=list(parted.headers))
        facts = {"bytes": parted.file_bytes, "header_bytes": parted.header_bytes, **facts}
    else:
        facts = _facts(file)
    facts = {"file": file, **facts}
    if as_json:
        _output.print_json("inspect", facts)
    elif facts["type"] == "adapter":
        _print_adapter(facts)
    elif facts["type"] == "pack":
        _print_pack(facts)
    elif facts["type"] == "residue":
        _print_residue(facts)
    else:
        _print_base(facts)


def _facts(file: str) -> dict[str, Any]:
    """What a file or an adapter's folder is."""
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


def _foreign_facts(dialect: Dialect, source: Source) -> dict[str, Any]:
    foreign = dialect.read(source)
    layers = foreign.layers
    ranks, alphas = ({getattr(layer, key) for layer in layers} for key in ("rank", "alpha"))
    numbers = {
        layer.name: sum(math.prod(source.tensors[key].shape) for slot, key in layer.slots.items() if slot != "alpha")
        for layer in layers
    }
    nothing = {"layer": None, "groups": None, "shape": None, "dtype": None, "base_sha256": None}
    return {
        "type": "adapter",
        "dialect": dialect.name,
        "format_version": None,
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "alpha": alphas.pop() if len(alphas) == 1 else None,
        "parameters": sum(numbers.values()),
        "targets": {
            layer.name: {
                "kind": layer.kind,
                **nothing,
                "rank": layer.rank,
                "alpha": layer.alpha,
                "scale_rule": layer.scale_rule,
                "scale": layer.scale,
                "parameters": numbers[layer.name],
                "tensors": {slot: list(source.tensors[key].shape) for slot, key in layer.slots.items()},
            }
            for layer in layers
        },
        "whole": {
            name: {
                "role": None,
                "dtype": source.tensors[key].dtype,
                "shape": list(source.tensors[key].shape),
                "base_shape": None,
                "parameters": math.prod(source.tensors[key].shape),
            }
            for name, key in foreign.whole.items()
        },
        "base": {"network": None, "network_args": {}, "heads": {}, "sha256": None},
        "training": {"settings": dict(foreign.settings)} if foreign.settings else {},
        "warnings": [
            *(f"cannot be used: {reason}" for reason in foreign.refusals),
            *(f"needs --approximate: {layer.name!r}: {layer.product}" for layer in layers if layer.product),
        ],
    }


def _adapter_facts(header: Header) -> dict[str, Any]:
    from loraio.formats.native import FORMAT_VERSION, read_metadata

    metadata = read_metadata(header)
    targets = metadata.targets
    ranks, alphas = ({getattr(target, key) for target in targets.values()} for key in ("rank", "alpha"))
    return {
        "type": "adapter",
        "dialect": "native",
        "format_version": FORMAT_VERSION,
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "alpha": alphas.pop() if len(alphas) == 1 else None,
        "parameters": sum(target.parameters for target in targets.values()),
        "targets": {
            name: {
                "kind": target.kind,
                "layer": target.layer,
                "groups": target.groups,
                "shape": list(target.shape),
                "dtype": target.dtype,
                "rank": target.rank,
                "alpha": target.alpha,
                "scale_rule": target.scale_rule,
                "scale": target.scale,
                "parameters": target.parameters,
                "base_sha256": target.base_sha256,
            }
            for name, target in targets.items()
        },
        "whole": {name: _output.whole_facts(tensor) for name, tensor in metadata.whole.items()},
        "base": {
            "network": metadata.base.network,
            "network_args": dict(metadata.base.network_args),
            "heads": dict(metadata.base.heads),
            "sha256": metadata.base.sha256,
        },
        "training": metadata.training,
        "warnings": [_warning(name, target) for name, target in targets.items() if target.saves_nothing],
    }


def _warning(name: str, target: Target) -> str:
    """That the weight itself would be no larger than the factors, and which ranks are smaller."""
    largest = target.largest_saving_rank
    advice = f"ranks up to {largest} hold fewer" if largest else "no rank holds fewer"
    return (
        f"{name!r}: at rank {target.rank} the factors hold {target.parameters:,} numbers, "
        f"the weight itself {math.prod(target.shape):,}; {advice}"
    )


def _pack_facts(header: Header) -> dict[str, Any]:
    from loraio.formats.pack import PACK_VERSION, check_index

    members = check_index(header, stamp=()).members
    rows = {name: {"begin": one.begin, "bytes": one.size, "sha256": one.sha256} for name, one in members.items()}
    return {"type": "pack", "format_version": PACK_VERSION, "adapters": rows}


def _residue_facts(header: Header) -> dict[str, Any]:
    document = header.document() or {}
    said = document["residue"]
    return {
        "type": "residue",
        "format_version": document.get("format_version"),
        **{key: said.get(key) for key in ("adapter_sha256", "base_sha256", "merged_sha256", "strength")},
        "tensors": {name: info.end - info.begin for name, info in sorted(header.tensors.items())},
    }


def _base_facts(
    tensors: Mapping[str, TensorInfo], document: dict[str, Any], *, parts: Sequence[str] = ()
) -> dict[str, Any]:
    merged, training, args, heads = (document.get(key) for key in ("merged", "training", "network_args", "heads"))
    return {
        "type": "base",
        "network": document.get("network"),
        "network_args": args if isinstance(args, dict) else {},
        "heads": heads if isinstance(heads, dict) else {},
        "sha256": document.get("sha256"),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "tensors": {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in sorted(tensors.items())},
        "parts": list(parts),
        "merged": merged if isinstance(merged, list) else [],
        "training": training if isinstance(training, dict) else {},
    }


def _print_adapter(facts: dict[str, Any]) -> None:
    base, training = facts["base"], facts["training"]
    for warning in facts["warnings"]:
        _output.note(f"note: {warning}")
    _output.line(
        f"{facts['file']}: adapter, {facts['dialect']}"
        f"{f' format version {version}' if (version := facts['format_version']) else ''}, "
        f"{facts['parameters']:,} parameters, {_output.size(facts['bytes'])}"
    )
    if facts["dialect"] == "native":
        _output.line(f"base: {base['network'] or 'network not named'}, sha256 {base['sha256']}")
    else:
        _output.line(f"by {facts['reason']}")
    table = _output.table("Targets", ["weight", "layer", "shape", "kind", "rank", "alpha", "scale", "parameters"])
    for name, target in facts["targets"].items():
        shape = "x".join(map(str, target["shape"] or ["?"]))
        alpha, scale = ("?" if value is None else f"{value:g}" for value in (target["alpha"], target["scale"]))
        table.add_row(
            name,
            target["layer"] or "?",
            shape,
            target["kind"],
            str(target["rank"]),
            alpha,
            scale,
            f"{target['parameters']:,}",
        )
    _output.console().print(table)
    for line in _output.whole_lines(facts["whole"]) if facts["dialect"] == "native" else ():
        _output.line(line)
    if facts["whole"] and facts["dialect"] != "native":
        _output.line(f"{len(facts['whole'])} tensors of the base are replaced whole")
    _print_training(training)


def _print_pack(facts: dict[str, Any]) -> None:
    adapters, size = facts["adapters"], _output.size(facts["bytes"])
    _output.line(f"{facts['file']}: pack of {len(adapters)} adapters, format version {facts['format_version']}, {size}")
    table = _output.table("Adapters", ["name", "bytes", "sha256"])
    for name, one in adapters.items():
        table.add_row(name, f"{one['bytes']:,}", f"{one['sha256'][:12]}..")
    _output.console().print(table)


def _print_residue(facts: dict[str, Any]) -> None:
    version, size = facts["format_version"], _output.size(facts["bytes"])
    _output.line(
        f"{facts['file']}: residue of a merge, format version {version}, {len(facts['tensors'])} tensors, {size}"
    )
    for key in ("adapter_sha256", "base_sha256", "merged_sha256", "strength"):
        _output.line(f"{key}: {_words(facts[key])}")


def _print_base(facts: dict[str, Any]) -> None:
    network = _words(facts["network"] or "network not named")
    size = _output.size(facts["bytes"])
    parts = f" in {len(facts['parts'])} parts" if facts["parts"] else ""
    _output.line(f"{facts['file']}: base model{parts}, {network}, {facts['parameters']:,} parameters, {size}")
    if facts["sha256"]:
        _output.line(f"sha256 {facts['sha256']}")
    _print_lineage(facts["merged"])
    table = _output.table("Tensors", ["name", "dtype", "shape"])
    for name, tensor in facts["tensors"].items():
        table.add_row(name, tensor["dtype"], "x".join(map(str, tensor["shape"])) or "scalar")
    _output.console().print(table)
    _print_training(facts["training"])


def _print_lineage(merged: Sequence[Any]) -> None:
    """What was merged into a base, in order; other people's files may hold anything in the place of a receipt."""
    for number, receipt in enumerate(merged, 1):
        _output.line(f"merged, receipt {number} of {len(merged)}:")
        for key, value in receipt.items() if isinstance(receipt, dict) else [("receipt", receipt)]:
            if key in ("base_mismatch", "forced") and isinstance(value, list):
                for line in value:
                    _output.line(f"  {key}: {_words(line)}")
            elif key == "changed" and isinstance(value, dict):
                _output.line(f"  {key}: {len(value)} tensors ({known(value, limit=5)})")
            else:
                _output.line(f"  {key}: {_words(value)}")


def _print_training(training: dict[str, Any]) -> None:
    results = training.get("results")
    for key, value in training.items():
        if key != "results" or not isinstance(value, dict):
            _output.line(f"{key}: {_words(value)}")
    if isinstance(results, dict):
        _output.line(f"results: {_words({key: part for key, part in results.items() if not isinstance(part, dict)})}")
        for when in ("before", "after"):
            if when in results:
                _output.line(f"  {when}: {_words(results[when])}")


def _words(value: Any) -> str:
    """A JSON value on one line; the metadata of other people's files may hold anything."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
