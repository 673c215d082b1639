"""Read, write and check the digests with which a file notices damage; needs no torch.

The text of a file is the header of a safetensors file, or an index. It holds the SHA-256 of every tensor, and one of
itself, computed with 64 zeros in its place. Together they cover every bit of the file. They do not tell who wrote it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loraio.errors import FormatError

KEY = "integrity"
"""The key of a document that holds its digests."""

SEALED = 2
"""The format version in which every document has digests. Version 1 had none; other code refuses later versions."""

PENDING = "0" * 64
"""Placeholder for a digest that is not known yet."""

_DIGEST_BYTES = 32
_NAME = b'"integrity'  # where a quote is escaped, the backslash stands before it
_ENTRY = re.compile(rb'"integrity\\?":\s*\{\s*\\?"file\\?":\s*\\?"([0-9a-f]{64})\\?"')
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HINT = "get it again from where it came; a program that changes it on purpose must leave out the metadata key 'loraio'"


class Integrity(NamedTuple):
    """The digests that a text holds, all of them lower-case hexadecimal.

    Attributes:
        tensors: of each tensor's bytes, by name; None where the document itself has them elsewhere.
        shards: of the header of each shard, by file name; empty for a single file.
    """

    tensors: Mapping[str, str] | None
    shards: Mapping[str, str]


def with_integrity(
    document: Mapping[str, Any], tensors: Iterable[str] | None, shards: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the document with an entry for its digests, ready for `seal`.

    Args:
        document: JSON values.
        tensors: SHA-256 of each tensor, in the order in which the text lists them; None where the document has them.
        shards: as `Integrity.shards`.

    Raises:
        FormatError: the document has such an entry already.
    """
    if KEY in document:
        raise FormatError(f"the metadata have a key {KEY!r}, which the file itself needs")
    entry: dict[str, Any] = {"file": PENDING}
    if tensors is not None:
        entry["tensors"] = base64.b64encode(b"".join(bytes.fromhex(digest) for digest in tensors)).decode("ascii")
    if shards:
        entry["parts"] = dict(sorted(shards.items()))
    return {**document, KEY: entry}


def seal(text: bytes, *, where: str) -> bytes:
    """Fill in the digest where `with_integrity` left room for it; return other texts unchanged.

    Raises:
        FormatError: the text has several such places.
    """
    found = _entries(text)
    if not found or (len(found) == 1 and found[0][1] != PENDING.encode()):
        return text
    if len(found) > 1:
        raise FormatError("the metadata hold the text of another file's digests", where=where)
    start = found[0][0]
    return text[:start] + hashlib.sha256(text).hexdigest().encode() + text[start + len(PENDING) :]


def unsealed(text: str) -> str:
    """Take the digest out of a document's text, so that a copy can be sealed again."""
    return _ENTRY.sub(lambda match: match[0].replace(match[1], PENDING.encode()), text.encode("utf-8")).decode("utf-8")


def check(text: bytes, document: dict[str, Any] | None, names: Sequence[str], *, where: str) -> Integrity | None:
    """Compare a text with its digest, and take the entry out of the document.

    Args:
        text: all of it, byte by byte as it is in the file.
        document: of loraio, as parsed from the text; None where it has none.
        names: of the tensors, in the order in which the text lists them.
        where: the file, for errors.

    Returns:
        what the entry says; None where there is none, as in files of format version 1 and of other tools.

    Raises:
        FormatError: the text has another digest, or the entry is missing or malformed.
    """
    entry = document.pop(KEY, None) if document is not None else None
    found = _entries(text)
    if entry is None:
        version = document.get("format_version") if document is not None else None
        if found or version == SEALED:
            raise _damaged("its metadata have lost their digests", where)
        return None
    if len(found) != 1 or not isinstance(entry, dict) or entry.get("file") != found[0][1].decode("ascii"):
        raise _damaged("the entry with its digests is not what loraio writes", where)
    start = found[0][0]
    digest = hashlib.sha256(memoryview(text)[:start])
    digest.update(PENDING.encode())
    digest.update(memoryview(text)[start + len(PENDING) :])
    if digest.hexdigest() != entry["file"]:
        raise _damaged("its header is not what was written", where)
    shards = entry.get("parts", {})
    if not isinstance(shards, dict) or not all(is_sha256(digest) for digest in shards.values()):
        raise _damaged("the digests of its shards are malformed", where)
    return Integrity(tensors=_by_name(entry.get("tensors"), names, where), shards=shards)


def is_sha256(value: Any) -> bool:
    """Return True if a value is a string of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def damaged_tensors(names: Sequence[str], *, of: int, where: str) -> FormatError:
    """Make the error for tensors that do not match their digests."""
    return FormatError(
        f"the file is damaged: {len(names)} of {of} tensors are not what was written",
        problems=[f"{name!r} has another SHA-256" for name in names[:20]]
        + ([f"and {len(names) - 20} more"] if len(names) > 20 else []),
        where=where,
        hint=_HINT,
    )


def damaged_shards(files: Sequence[str], *, where: str) -> FormatError:
    """Make the error for shards with headers that do not match the index."""
    return FormatError(
        "the checkpoint is damaged, or its shards are of several checkpoints",
        problems=[f"the header of {file!r} is not what was written" for file in files],
        where=where,
        hint=_HINT,
    )


def state_digest(rows: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """Return one digest for a whole state dict, for any order of its tensors.

    SHA-256 over one line for each tensor, lines sorted by the name's code points: the JSON array
    ``["name","F32",[32,1,3,3],"<SHA-256 of its bytes>"]`` without spaces, non-ASCII characters escaped, and a newline.

    Args:
        rows: name, dtype code, shape and digest of each tensor.
    """
    whole = hashlib.sha256()
    for name, dtype, shape, digest in sorted(rows):
        whole.update(_line([name, dtype, list(shape), digest]).encode("ascii") + b"\n")
    return whole.hexdigest()


_line = json.JSONEncoder(separators=(",", ":")).encode


def _entries(text: bytes) -> list[tuple[int, bytes]]:
    """Find the digests of entries in the text, each with its offset."""
    found, place = [], text.find(_NAME)
    while place >= 0:
        match = _ENTRY.match(text, place)
        if match:
            found.append((match.start(1), match[1]))
        place = text.find(_NAME, place + 1)
    return found


def _by_name(encoded: Any, names: Sequence[str], where: str) -> dict[str, str] | None:
    if encoded is None:
        return None
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raw = b""
    if not isinstance(encoded, str) or len(raw) != _DIGEST_BYTES * len(names):
        raise _damaged(f"the digests of its {len(names)} tensors are malformed", where)
    places = range(0, len(raw), _DIGEST_BYTES)
    return {name: raw[at : at + _DIGEST_BYTES].hex() for name, at in zip(names, places, strict=True)}


def _damaged(what: str, where: str) -> FormatError:
    return FormatError(f"the file is damaged: {what}", where=where, hint=_HINT)
