"""Read and write the native format, version 2; `loraio/docs/format.md` specifies it."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import FLOAT_DTYPES, BaseReference, Target, WholeTensor, check_tensors
from loraio.errors import AdapterError, FormatError, LoraioError
from loraio.files import tensorfile
from loraio.files.strictjson import canonical_json
from loraio.files.tensorfile import METADATA_KEY, Header

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
"""Version of files that are written. Version 1, without digests and without common keys, is read too."""

_Types = dict[str, type | tuple[type, ...]]

_DOCUMENT_KEYS: _Types = {"format_version": int, "targets": dict, "base": dict, "training": dict}
_BASE_KEYS: _Types = {"network": (str, type(None)), "sha256": str}
_TARGET_KEYS: _Types = {
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
_TARGET_OPTIONS: _Types = {"sketch": (list, str)}
_COMMON = ("kind", "rank", "alpha", "scale_rule", "dtype", "layer", "groups")
"""Keys that most targets may share."""
_BASE_OPTIONS: _Types = {"network_args": dict, "heads": dict, "sha256_without_statistics": str}
_WHOLE_KEYS: _Types = {"role": str, "shape": list, "dtype": str, "base_sha256": str}
_WHOLE_OPTIONS: _Types = {"base_shape": list}
_DOCUMENT_OPTIONS: _Types = {"common": dict, "whole": dict}
"""Keys that may be missing, and are not written if they are empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeMetadata:
    """The metadata of a native file, checked against the tensors that its header lists."""

    targets: dict[str, Target]
    base: BaseReference
    whole: dict[str, WholeTensor]
    training: dict[str, Any]
    extra: dict[str, Any]

    def with_values(self, factors: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter with this metadata, these factors and these whole tensors."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Adapter(**own, factors=factors, tensors=tensors)


class Native:
    """Our own dialect: one safetensors file, all metadata in one JSON document."""

    name = "native"

    def detect(self, header: Header) -> bool:
        """Return True if the file's loraio metadata describe targets."""
        return "targets" in (header.document() or {})

    def read(self, header: Header) -> Adapter:
        """Return the adapter; see `loraio.load`."""
        metadata = read_metadata(header)
        tensors = tensorfile.read_tensors(header)
        names = [f"{name}.{short}" for name, target in metadata.targets.items() for short in target.factor_shapes]
        try:
            factors = {name: tensors[name] for name in names}
            return metadata.with_values(factors, {name: tensors[name] for name in metadata.whole})
        except LoraioError as error:
            raise error.at(f"{str(header.path)!r}") from error

    def write(self, adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write the adapter; see `loraio.save`."""
        document = to_document(adapter)
        try:
            kept = json.loads(canonical_json(document)) == document
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"the adapter's metadata is not plain JSON: {error}") from error
        if not kept:  # JSON makes a list of a tuple and a string of a key that is a number
            raise AdapterError("the adapter's metadata is not plain JSON: a tuple, or a key that is no string")
        tensorfile.write(adapter.all_tensors, path, document=document, overwrite=overwrite)


def to_document(adapter: Adapter) -> dict[str, Any]:
    """Return the JSON document of an adapter, for the header key ``loraio``.

    Raises:
        AdapterError: an ``extra`` has a key of the format.
    """
    targets = {}
    for name, target in adapter.targets.items():
        own = {key: getattr(target, key) for key in _TARGET_KEYS} | {"shape": list(target.shape)}
        if target.sketch:
            own["sketch"] = _packed(target.sketch)
        targets[name] = _with_extra(own, target.extra, _TARGET_OPTIONS)
    common = _common(adapter.targets)
    for entry in targets.values():
        for key in [key for key in common if _text(entry[key]) == _text(common[key])]:
            del entry[key]
    base = {"network": adapter.base.network, "sha256": adapter.base.sha256}
    base |= {key: value for key in _BASE_OPTIONS if (value := getattr(adapter.base, key))}
    own = {
        "format_version": FORMAT_VERSION,
        "targets": targets,
        "base": _with_extra(base, adapter.base.extra, _BASE_OPTIONS),
        "training": dict(adapter.training),
    }
    if common:
        own["common"] = common
    if adapter.whole:
        own["whole"] = {name: _whole_entry(whole) for name, whole in adapter.whole.items()}
    return _with_extra(own, adapter.extra, _DOCUMENT_OPTIONS)


def _common(targets: Mapping[str, Target]) -> dict[str, Any]:
    """Return the values that most targets share, and more than one; of equally frequent ones that of the first name."""
    common = {}
    for key in _COMMON:
        values = [getattr(target, key) for _, target in sorted(targets.items())]
        counts = Counter(map(_text, values))
        text, count = counts.most_common(1)[0]  # the first of several
        if count > 1:
            common[key] = next(value for value in values if _text(value) == text)
    return common


def _text(value: Any) -> str:
    """Return a value's text in the file, which tells 4 from 4.0."""
    return json.dumps(value)


def _packed(sketch: Sequence[float]) -> str | list[float]:
    """Return a sketch of six-digit numbers in base64; any other as it is."""
    try:
        raw = struct.pack(f"<{len(sketch)}f", *sketch)
    except OverflowError:  # beyond binary32
        return list(sketch)
    return base64.b64encode(raw).decode("ascii") if _six_digits(raw) == tuple(sketch) else list(sketch)


def _six_digits(raw: bytes) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in struct.unpack(f"<{len(raw) // 4}f", raw))


def _unpacked(sketch: str | list[float], name: str, where: str) -> tuple[float, ...]:
    if isinstance(sketch, list):
        return tuple(sketch)
    try:
        raw = base64.b64decode(sketch, validate=True)
        if not raw or len(raw) % 4:
            raise ValueError(len(raw))
    except ValueError as error:
        raise FormatError(f"target {name!r} has a sketch that is no base64 of binary32", where=where) from error
    return _six_digits(raw)


def _whole_entry(whole: WholeTensor) -> dict[str, Any]:
    own = {key: getattr(whole, key) for key in _WHOLE_KEYS} | {"shape": list(whole.shape)}
    if whole.base_shape != whole.shape:
        own["base_shape"] = list(whole.base_shape)
    return _with_extra(own, whole.extra, _WHOLE_OPTIONS)


def read_metadata(header: Header) -> NativeMetadata:
    """Check the metadata and tensor shapes of a header against each other, and return the metadata. Needs no torch.

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
        raise error.at(where) from error
    whole = metadata.whole
    for name, info in header.tensors.items():
        if name in whole and info.dtype != whole[name].dtype:
            raise FormatError(f"{name!r} is {info.dtype}, its metadata say {whole[name].dtype}", where=where)
        if name not in whole and info.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{name!r} is {info.dtype}, factors are one of {', '.join(FLOAT_DTYPES)}", where=where)
    return metadata


def read_document(document: Any, *, where: str) -> NativeMetadata:
    """Return the metadata in a document of this format, not compared with tensors.

    Raises:
        FormatError, AdapterError, UnknownNameError: as `read_metadata`.
    """
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FormatError(
            f"format version {version!r}, this loraio reads versions up to {FORMAT_VERSION}",
            where=where,
            hint="a newer loraio" if isinstance(version, int) and version > FORMAT_VERSION else None,
        )
    top, extra = _split(document, _DOCUMENT_KEYS, _DOCUMENT_OPTIONS, "the metadata", where)
    base, base_extra = _split(top["base"], _BASE_KEYS, _BASE_OPTIONS, "'base'", where)
    common = top.get("common", {})
    unknown = sorted(common.keys() - set(_COMMON))
    if unknown:
        raise FormatError(f"'common' has {', '.join(map(repr, unknown))}, which targets do not share", where=where)
    try:
        return NativeMetadata(
            targets={name: _target(name, common, entry, where) for name, entry in sorted(top["targets"].items())},
            base=BaseReference(**base, extra=base_extra),
            whole={name: _whole(name, entry, where) for name, entry in sorted(top.get("whole", {}).items())},
            training=top["training"],
            extra=extra,
        )
    except LoraioError as error:
        raise error.at(where) from error


def _target(name: str, common: Mapping[str, Any], entry: Any, where: str) -> Target:
    entry = {**common, **entry} if isinstance(entry, dict) else entry
    own, extra = _split(entry, _TARGET_KEYS, _TARGET_OPTIONS, f"target {name!r}", where)
    sketch = _unpacked(own["sketch"], name, where) if "sketch" in own else ()
    return Target(**own | {"shape": tuple(own["shape"]), "sketch": sketch}, extra=extra)


def _whole(name: str, entry: Any, where: str) -> WholeTensor:
    own, extra = _split(entry, _WHOLE_KEYS, _WHOLE_OPTIONS, f"whole tensor {name!r}", where)
    shapes = {"shape": tuple(own["shape"]), "base_shape": tuple(own.get("base_shape", own["shape"]))}
    return WholeTensor(**own | shapes, extra=extra)


def _split(entry: Any, keys: _Types, options: _Types, what: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of the format's own keys, checked, and those of all other keys."""
    if not isinstance(entry, dict):
        raise FormatError(f"{what} is not a JSON object", where=where)
    own = {}
    for key, types in (keys | options).items():
        if key not in entry and key in options:
            continue
        if key not in entry:
            raise FormatError(f"{what} has no {key!r}", where=where)
        if not isinstance(entry[key], types) or isinstance(entry[key], bool):
            raise FormatError(f"{what} has {key!r}: {entry[key]!r}, of a wrong type", where=where)
        own[key] = entry[key]
    return own, {key: value for key, value in entry.items() if key not in own}


def _with_extra(own: dict[str, Any], extra: Mapping[str, Any], options: Iterable[str] = ()) -> dict[str, Any]:
    clash = sorted({*own, *options} & extra.keys())
    if clash:
        raise AdapterError(f"extra holds {', '.join(map(repr, clash))}, which this version knows itself")
    return own | dict(extra)
