"""The native format, version 1. `SPEC.md` beside this file says it in words precise enough for a second reader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from loraio import container
from loraio.adapter import FLOAT_DTYPES, Adapter, BaseReference, Target, WholeTensor, check_tensors
from loraio.container import METADATA_KEY, Header
from loraio.errors import AdapterError, FormatError, LoraioError

FORMAT_VERSION = 1

_DOCUMENT_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "targets": dict,
    "base": dict,
    "training": dict,
}
_BASE_KEYS: dict[str, type | tuple[type, ...]] = {"network": (str, type(None)), "sha256": str}
_TARGET_KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "rank": int,
    "alpha": (int, float),
    "scale_rule": str,
    "shape": list,
    "dtype": str,
    "layer": str,
    "groups": int,
    "base_sha256": str,
}
_TARGET_OPTIONS: dict[str, type | tuple[type, ...]] = {"sketch": list}
_BASE_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "network_args": dict,
    "heads": dict,
    "sha256_without_statistics": str,
}
_WHOLE_KEYS: dict[str, type | tuple[type, ...]] = {"role": str, "shape": list, "dtype": str, "base_sha256": str}
_WHOLE_OPTIONS: dict[str, type | tuple[type, ...]] = {"base_shape": list}
_DOCUMENT_OPTIONS: dict[str, type | tuple[type, ...]] = {"whole": dict}
"""Keys that may be missing, and are not written where they would be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeMetadata:
    """The metadata of a native file, checked against the tensors that its header lists."""

    targets: dict[str, Target]
    base: BaseReference
    whole: dict[str, WholeTensor]
    training: dict[str, Any]
    extra: dict[str, Any]


class Native:
    """Our own dialect: one safetensors file, all metadata in one JSON document."""

    name = "native"

    def detect(self, header: Header) -> bool:
        """Whether the file's loraio metadata describes targets."""
        return "targets" in (header.document() or {})

    def read(self, header: Header) -> Adapter:
        """The adapter; see `loraio.load`."""
        metadata = read_metadata(header)
        tensors = container.read_tensors(header)
        names = [f"{name}.{short}" for name, target in metadata.targets.items() for short in target.factor_shapes]
        try:
            return Adapter(
                targets=metadata.targets,
                factors={name: tensors[name] for name in names},
                base=metadata.base,
                whole=metadata.whole,
                tensors={name: tensors[name] for name in metadata.whole},
                training=metadata.training,
                extra=metadata.extra,
            )
        except LoraioError as error:
            raise _located(error, f"{str(header.path)!r}") from error

    def write(self, adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write the adapter; see `loraio.save`."""
        document = to_document(adapter)
        try:
            kept = json.loads(container.canonical_json(document)) == document
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"the adapter's metadata is not plain JSON: {error}") from error
        if not kept:  # JSON makes a list of a tuple and a string of a key that is a number
            raise AdapterError("the adapter's metadata is not plain JSON: a tuple, or a key that is no string")
        container.write(adapter.all_tensors, path, document=document, overwrite=overwrite)


def to_document(adapter: Adapter) -> dict[str, Any]:
    """The JSON document of an adapter, as it stands under the header key ``loraio``.

    Raises:
        AdapterError: an ``extra`` has a key that is not extra.
    """
    targets = {}
    for name, target in adapter.targets.items():
        own = {key: getattr(target, key) for key in _TARGET_KEYS} | {"shape": list(target.shape)}
        if target.sketch:
            own["sketch"] = list(target.sketch)
        targets[name] = _with_extra(own, target.extra, _TARGET_OPTIONS)
    base = {"network": adapter.base.network, "sha256": adapter.base.sha256}
    base |= {key: value for key in _BASE_OPTIONS if (value := getattr(adapter.base, key))}
    own = {
        "format_version": FORMAT_VERSION,
        "targets": targets,
        "base": _with_extra(base, adapter.base.extra, _BASE_OPTIONS),
        "training": dict(adapter.training),
    }
    if adapter.whole:
        own["whole"] = {name: _whole_entry(whole) for name, whole in adapter.whole.items()}
    return _with_extra(own, adapter.extra, _DOCUMENT_OPTIONS)


def _whole_entry(whole: WholeTensor) -> dict[str, Any]:
    own = {key: getattr(whole, key) for key in _WHOLE_KEYS} | {"shape": list(whole.shape)}
    if whole.base_shape != whole.shape:
        own["base_shape"] = list(whole.base_shape)
    return _with_extra(own, whole.extra, _WHOLE_OPTIONS)


def read_metadata(header: Header) -> NativeMetadata:
    """What the header alone says: metadata and tensor shapes, checked against each other. Needs no torch.

    Raises:
        FormatError: no loraio metadata, an unknown version, a key missing or of a wrong type, a tensor's dtype.
        AdapterError: a target that contradicts itself, or targets and tensors that do not match.
        UnknownNameError: a kind, layer type or scale rule that this version does not know.
    """
    where = f"{str(header.path)!r}"
    document = header.document()
    if document is None:
        raise FormatError(f"there is no {METADATA_KEY!r} metadata", where=where)
    metadata = read_document(document, where=where)
    try:
        check_tensors(metadata.targets, metadata.whole, {name: info.shape for name, info in header.tensors.items()})
    except LoraioError as error:
        raise _located(error, where) from error
    whole = metadata.whole
    for name, info in header.tensors.items():
        if name in whole and info.dtype != whole[name].dtype:
            raise FormatError(f"{name!r} is {info.dtype}, its metadata say {whole[name].dtype}", where=where)
        if name not in whole and info.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{name!r} is {info.dtype}, factors are one of {', '.join(FLOAT_DTYPES)}", where=where)
    return metadata


def read_document(document: Any, *, where: str) -> NativeMetadata:
    """What a document of this format says, without the tensors that it is about.

    Raises:
        FormatError, AdapterError, UnknownNameError: as `read_metadata`.
    """
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"format version {version!r}, this loraio reads version {FORMAT_VERSION}",
            where=where,
            hint="a newer loraio" if isinstance(version, int) and version > FORMAT_VERSION else None,
        )
    _check_keys(document, _DOCUMENT_KEYS, "the metadata", where, _DOCUMENT_OPTIONS)
    _check_keys(document["base"], _BASE_KEYS, "'base'", where, _BASE_OPTIONS)
    targets: dict[str, Target] = {}
    whole: dict[str, WholeTensor] = {}
    try:
        for name, entry in sorted(document["targets"].items()):
            _check_keys(entry, _TARGET_KEYS, f"target {name!r}", where, _TARGET_OPTIONS)
            known = {key: entry[key] for key in _TARGET_KEYS} | {"shape": tuple(entry["shape"])}
            extra = _others(entry, _TARGET_KEYS | _TARGET_OPTIONS)
            targets[name] = Target(**known, sketch=tuple(entry.get("sketch", ())), extra=extra)
        for name, entry in sorted(document.get("whole", {}).items()):
            _check_keys(entry, _WHOLE_KEYS, f"whole tensor {name!r}", where, _WHOLE_OPTIONS)
            shapes = {"shape": tuple(entry["shape"]), "base_shape": tuple(entry.get("base_shape", entry["shape"]))}
            known = {key: entry[key] for key in _WHOLE_KEYS} | shapes
            whole[name] = WholeTensor(**known, extra=_others(entry, _WHOLE_KEYS | _WHOLE_OPTIONS))
        found = document["base"]
        known = {key: found[key] for key in _BASE_KEYS | _BASE_OPTIONS if key in found}
        base = BaseReference(**known, extra=_others(found, _BASE_KEYS | _BASE_OPTIONS))
    except FormatError:
        raise
    except LoraioError as error:
        raise _located(error, where) from error
    return NativeMetadata(
        targets=targets,
        base=base,
        whole=whole,
        training=document["training"],
        extra=_others(document, _DOCUMENT_KEYS | _DOCUMENT_OPTIONS),
    )


def _check_keys(
    entry: Any,
    keys: dict[str, type | tuple[type, ...]],
    what: str,
    where: str,
    options: Mapping[str, type | tuple[type, ...]] = MappingProxyType({}),
) -> None:
    if not isinstance(entry, dict):
        raise FormatError(f"{what} is not a JSON object", where=where)
    for key, types in (keys | dict(options)).items():
        if key not in entry and key in options:
            continue
        if key not in entry:
            raise FormatError(f"{what} has no {key!r}", where=where)
        if not isinstance(entry[key], types) or isinstance(entry[key], bool):
            raise FormatError(f"{what} has {key!r}: {entry[key]!r}, of a wrong type", where=where)


def _with_extra(own: dict[str, Any], extra: Mapping[str, Any], options: Iterable[str] = ()) -> dict[str, Any]:
    clash = sorted({*own, *options} & extra.keys())
    if clash:
        raise AdapterError(f"extra holds {', '.join(map(repr, clash))}, which this version knows itself")
    return own | dict(extra)


def _others(entry: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in known}


def _located(error: LoraioError, where: str) -> LoraioError:
    """The same error, with the file's name."""
    return type(error)(error.message, problems=error.problems, where=where, hint=error.hint)
