"""Check the headers of safetensors files, read the tensors of checked files, and write files byte for byte the same.

The gate needs no torch and stands in front of the safetensors library. It refuses what the library accepts:

- a tensor's name, or a key of the metadata, that occurs twice, and unknown keys in a tensor's entry;
- names that are empty, too long, or hold characters that are not printable, such as escape codes;
- headers, numbers of tensors and numbers of dimensions beyond `loraio.files.limits`;
- white space before the header, and a document of loraio that is not a JSON object;
- files and tensors whose digests are not those in the document.

All metadata of loraio is one JSON document under the header key ``loraio``: the library writes several keys in an
order that changes from run to run.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from loraio.errors import FormatError, MissingFileError, quoted
from loraio.files import integrity, library
from loraio.files.atomic import staged
from loraio.files.limits import Limits, limits, raising
from loraio.files.names import is_hidden
from loraio.files.sniffing import FETCH_AGAIN, LOOKED_AT, open_file, reason, recognised
from loraio.files.strictjson import canonical_json, parse_json
from loraio.files.tensors import DTYPE_BITS, TORCH_DTYPES, dtype_code, tensor_sha256

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "loraio"
"""The header key that holds the JSON document."""


_LAYOUT_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
"""The order of dtypes in which the safetensors library writes tensors."""


class TensorInfo(NamedTuple):
    """One tensor of a header: dtype code, shape, and its bytes as offsets into the data part of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        path: the file.
        tensors: by name, in the order of their bytes.
        metadata: the strings under ``__metadata__``; empty when there is none.
        header_bytes: length of the JSON header, without the eight bytes that hold this length.
        file_bytes: length of the whole file.
        parsed: the JSON document under the key ``loraio``; None where there is none.
        digests: SHA-256 of each tensor's bytes, where the file says it; `read_tensors` compares it.
        sha256: of the header and the eight bytes before it.
        data: the whole file, where it was read from memory; None where it is still to be read from ``path``.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header_bytes: int
    file_bytes: int
    parsed: dict[str, Any] | None = field(repr=False)
    digests: Mapping[str, str] | None = field(repr=False)
    sha256: str
    data: bytes | None = field(default=None, repr=False)

    def document(self) -> dict[str, Any] | None:
        """Return the JSON document under the key ``loraio``, without its digests; None if the file has none."""
        return self.parsed


# Reading


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file, without reading a tensor and without torch.

    Raises:
        MissingFileError: there is no such file.
        FormatError: the safetensors specification forbids it, or this module's docstring does.
    """
    path = Path(path)
    with open_file(path) as file:
        try:
            return _read_header(file, path, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise MissingFileError(f"{str(path)!r} cannot be read: {reason(error)}") from error


def parse_file(data: bytes, path: str | os.PathLike[str]) -> Header:
    """Check a whole safetensors file in memory as `read_header` does; `read_tensors` takes its tensors from there.

    Args:
        data: all bytes of the file.
        path: where they are from, for errors only.

    Raises:
        FormatError: as `read_header`.
    """
    return replace(_read_header(io.BytesIO(data), Path(path), len(data)), data=data)


def _read_header(file: BinaryIO, path: Path, size: int) -> Header:
    where, most = f"{str(path)!r}", limits()
    start = file.read(LOOKED_AT)
    length = int.from_bytes(start[:8], "little")
    if not start:
        raise FormatError("the file is empty", where=where, hint=FETCH_AGAIN)
    if len(start) < 8:
        raise FormatError(f"{size} bytes are too few for a safetensors file", where=where, hint=FETCH_AGAIN)
    if length > most.header_bytes or 8 + length > size or start[8:9] != b"{":
        raise _not_safetensors(start, length, size, most, where)
    text = start[: 8 + length] + file.read(max(0, 8 + length - len(start)))
    try:
        decoded = text[8:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not UTF-8: {error}", where=where) from error
    entries = parse_json(decoded, where=f"the header of {where}")
    del decoded
    metadata = _check_metadata(entries.pop("__metadata__", None), where)
    if len(entries) > most.tensors:
        raise FormatError(
            f"{len(entries):,} tensors, at most {most.tensors:,} are read", where=where, hint=raising("tensors")
        )
    tensors = {name: _check_entry(name, entry, most, where) for name, entry in entries.items()}
    del entries
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_offsets(tensors, 8 + length, size, where)
    document = _document(metadata, where)
    found = integrity.check(text, document, list(tensors), where=where)
    return Header(
        path=path,
        tensors=tensors,
        metadata=metadata,
        header_bytes=length,
        file_bytes=size,
        parsed=document,
        digests=found.tensors if found else None,
        sha256=hashlib.sha256(text).hexdigest(),
    )


def read_tensors(header: Header) -> dict[str, Tensor]:
    """Read all tensors of the file to the CPU, into memory of their own: the file may change or go away afterwards.

    The header that was checked is compared with the one in the file, and each tensor with its digest, if it has one.

    Raises:
        FormatError: the file is no longer what its header said, is damaged, or holds a dtype that torch lacks.
    """
    where = f"{str(header.path)!r}"
    for name, info in header.tensors.items():
        if info.dtype not in TORCH_DTYPES:
            raise FormatError(f"{name!r} has dtype {info.dtype}, which cannot be read", where=where)
    with io.BytesIO(header.data) if header.data is not None else open_file(header.path) as file:
        try:
            start = file.read(8 + header.header_bytes)
            if hashlib.sha256(start).hexdigest() != header.sha256:
                raise FormatError("the header changed while the file was being read", where=where)
            tensors = dict(library.read(file, header.tensors))
        except EOFError as error:
            raise FormatError(
                f"the file ends within '{error}': it changed while it was being read", where=where
            ) from None
        except OSError as error:
            raise FormatError(f"the file cannot be read: {reason(error)}", where=where) from error
    digests = header.digests or {}
    damaged = [name for name, digest in digests.items() if tensor_sha256(tensors[name]) != digest]
    if damaged:
        raise integrity.damaged_tensors(damaged, of=len(digests), where=where)
    return tensors


def _document(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    document = parse_json(text, where=f"the metadata of {where}")
    if not isinstance(document, dict):
        raise FormatError("the loraio metadata is not a JSON object", where=where)
    return document


def _check_metadata(metadata: Any, where: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not an object of strings", where=where)
    return metadata


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def check_name(name: str, most: Limits, where: str) -> None:
    """Refuse a tensor's name that would look like another one in a log or on a screen.

    Raises:
        FormatError: it is empty, longer than the limits say, or not printable.
    """
    if not name:
        raise FormatError("a tensor has an empty name", where=where)
    if name == "__metadata__":
        raise FormatError("a tensor is named '__metadata__', which is where the metadata are", where=where)
    if len(name) > most.name_bytes or len(name.encode("utf-8", "surrogatepass")) > most.name_bytes:
        raise FormatError(
            f"a tensor's name is longer than {most.name_bytes:,} bytes: {quoted(name)}",
            where=where,
            hint=raising("name_bytes"),
        )
    if not name.isprintable():  # which says no to spaces of all kinds, too
        bad = next(filter(is_hidden, name), None)
        if bad is not None:
            raise FormatError(f"the tensor name {quoted(name)} holds {bad!r}, which is not printable", where=where)


def _check_entry(name: str, entry: Any, most: Limits, where: str) -> TensorInfo:
    check_name(name, most, where)
    if not isinstance(entry, dict):
        raise FormatError(f"the entry of tensor {name!r} is not an object", where=where)
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"tensor {name!r} has dtype {quoted(dtype)}, which safetensors does not know", where=where)
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise FormatError(f"tensor {name!r} has the shape {quoted(shape)}, not a list of sizes", where=where)
    if len(shape) > most.dimensions:
        raise FormatError(
            f"tensor {name!r} has {len(shape):,} dimensions, at most {most.dimensions} are read",
            where=where,
            hint=raising("dimensions"),
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise FormatError(f"tensor {name!r} has data_offsets {quoted(offsets)}, not two offsets", where=where)
    if len(entry) > 3:
        more = next(key for key in entry if key not in ("dtype", "shape", "data_offsets"))
        raise FormatError(f"the entry of tensor {name!r} has the unknown key {quoted(more)}", where=where)
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= 2**63:  # also where a later size is 0
            raise FormatError(f"tensor {name!r} is too large for any file: {dtype}, sizes {shape!r}", where=where)
    if bits % 8 or end - begin != bits // 8:
        raise FormatError(
            f"tensor {name!r} has {end - begin} bytes, {dtype} of shape {tuple(shape)} needs {bits / 8:g}", where=where
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_offsets(tensors: Mapping[str, TensorInfo], data_begin: int, size: int, where: str) -> None:
    position = 0
    for name, info in tensors.items():
        if info.begin != position:
            problem = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            raise FormatError(f"tensor {name!r} starts at byte {info.begin} and {problem} ({position})", where=where)
        position = info.end
    if data_begin + position > size:
        raise FormatError(f"truncated: {size:,} of {data_begin + position:,} bytes", where=where, hint=FETCH_AGAIN)
    if data_begin + position < size:
        raise FormatError(
            f"{size - data_begin - position:,} bytes follow the last tensor, which belong to none: "
            f"the header speaks of {data_begin + position:,}, the file has {size:,}",
            where=where,
        )


def _not_safetensors(start: bytes, length: int, size: int, most: Limits, where: str) -> FormatError:
    """Make the error for a file that does not begin with the length of a readable header."""
    found = recognised(start)
    if start[8:9] == b"{" and not (found and length > size):
        if length > size - 8:
            return FormatError(
                f"truncated: the header alone has {length:,} bytes, the file {size:,}", where=where, hint=FETCH_AGAIN
            )
        return FormatError(
            f"the header has {length:,} bytes, at most {most.header_bytes:,} are read",
            where=where,
            hint=raising("header_bytes"),
        )
    if found is None:
        return FormatError("not a safetensors file", where=where, hint=FETCH_AGAIN)
    what, advice = found
    return FormatError(f"not a safetensors file but {what}", where=where, hint=advice)


# Writing


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, where: str
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the start of a safetensors file, and the place of each tensor's bytes.

    The order is that of the safetensors library, wide dtypes first and then by name, so that the file is byte for byte
    what the library writes.

    Args:
        tensors: dtype code and shape, by name.
        metadata: the strings under ``__metadata__``.
        where: the file, for errors.

    Returns:
        the length, the header and its padding to a multiple of eight bytes; the tensors in the order of their bytes,
        with offsets into what follows.

    Raises:
        FormatError: a name or a text that a safetensors file cannot hold.
    """
    most = limits()
    for name in tensors:
        check_name(name, most, where)
    position = 0
    placed: dict[str, TensorInfo] = {}
    try:
        for name in _in_layout_order(tensors):
            dtype, shape = tensors[name]
            end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
            placed[name] = TensorInfo(dtype, shape, position, end)
            position = end
        entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        for name, info in placed.items():
            entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{error.object[:80]!r} holds half a surrogate pair", where=where) from error
    text += b" " * (-len(text) % 8)
    return integrity.seal(len(text).to_bytes(8, "little") + text, where=where), placed


def _in_layout_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    return sorted(tensors, key=lambda name: (_LAYOUT_ORDER.index(tensors[name][0]), name.encode("utf-8")))


def metadata_of(
    document: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    digest_of: Callable[[str], str] | None,
    *,
    where: str,
) -> dict[str, str]:
    """Return the metadata of a file that holds a document, with room for the digest that `layout` fills in.

    Args:
        document: JSON values.
        tensors: as `layout`.
        digest_of: SHA-256 of the bytes of a tensor, by name; None where the document has them.
        where: the file, for errors.

    Raises:
        FormatError: it is not plain JSON, or has a key that the digests need, or a name that no file can hold.
    """
    try:
        digests = map(digest_of, _in_layout_order(tensors)) if digest_of else None
        return {METADATA_KEY: canonical_json(integrity.with_integrity(document, digests))}
    except UnicodeEncodeError as error:
        raise FormatError(f"{error.object[:80]!r} holds half a surrogate pair", where=where) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the metadata is not plain JSON: {error}", where=where) from error


def write(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    document: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write one safetensors file, atomically; the same tensors and document always give the same bytes.

    Args:
        tensors: any device; brought to the CPU and made contiguous, a few at a time.
        path: the file to make.
        document: goes under the header key ``loraio``, as canonical JSON, with the digests of all tensors.
        metadata: further strings of the header.
        overwrite: replace an existing file.
        inputs: files that the output must not be.
        check: called with the temporary file before it gets its name; if it raises, nothing was written.

    Raises:
        OutputExistsError, OutputError: as `loraio.files.atomic.staged`.
        FormatError: a tensor name, a dtype or a text that a safetensors file cannot hold.
    """
    where = f"{os.fspath(path)!r}"
    facts = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    strings = dict(metadata or {})
    if document is not None:
        strings |= metadata_of(document, facts, lambda name: tensor_sha256(tensors[name]), where=where)
    start, placed = layout(facts, strings, where=where)
    with staged(path, overwrite=overwrite, inputs=inputs) as temporary:
        with temporary.open("wb") as file:
            file.write(start)
            file.writelines(library.serialized(tensors, placed))
        if check is not None:
            check(temporary)
