"""Read JSON of strangers strictly: bounded before it is parsed, no duplicate keys, no NaN, no lone surrogates."""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from loraio.errors import FormatError, MissingFileError, quoted
from loraio.files.limits import Limits, limits, raising
from loraio.files.sniffing import FETCH_AGAIN, LOOKED_AT, open_file, reason, recognised

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a character

_LONE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""A lone surrogate, in a text with spaces in the place of escaped backslashes."""

_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one level down, one up

_OTHERS = bytes(set(range(256)) - set(b"[]{},"))

_CHUNK = 1 << 16


def parse_json(text: str, *, where: str) -> Any:
    """Parse a JSON text in which no key occurs twice and no number is NaN.

    Raises:
        FormatError: it is not such a text, or beyond the limits; ``where`` says whose.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"the key {quoted(key)} occurs twice", where=where)
            found[key] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{constant} is not a JSON number", where=where)

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise FormatError(f"{digits[:40]} is beyond the range of float64", where=where)
        return number

    _check_size(text, limits(), where)
    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise FormatError("the JSON is nested too deeply", where=where) from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error}", where=where) from error
    except FormatError:
        raise
    except ValueError as error:  # Python's bound on the digits of an integer
        raise FormatError("not JSON that can be read: an integer of thousands of digits", where=where) from error
    if _SURROGATE.search(text) and _LONE.search(text.replace("\\\\", "  ")):
        raise FormatError("half a surrogate pair is no character", where=where)
    return parsed


def _check_size(text: str, most: Limits, where: str) -> None:
    """Count entries and depth in the text itself: what is parsed takes up to a hundred times its memory.

    Strings are passed over: escaped backslashes and quotes go first, which leaves a string nothing that ends it but
    its end. Where fewer brackets stand anywhere, strings included, than may be inside of each other nothing is counted.
    """
    raw = text.encode("utf-8", "surrogatepass")
    opened = raw.count(b"[") + raw.count(b"{")
    if opened <= most.json_depth and raw.count(b",") + opened <= most.json_values:
        return
    bare = raw
    for escape in (b"\\\\", b'\\"'):
        bare = bare.replace(escape, b"") if escape in bare else bare
    del raw
    depth = values = inside = 0  # inside of a text?
    for start in range(0, len(bare), _CHUNK):
        parts = bare[start : start + _CHUNK].split(b'"')
        structure = b"".join(parts[inside::2]).translate(None, _OTHERS)
        inside ^= (len(parts) - 1) & 1
        values += structure.count(b",") + structure.count(b"[") + structure.count(b"{")
        levels = array("b", structure.translate(_STEPS, b","))
        deepest = max(accumulate(levels, initial=depth))
        depth += sum(levels)
        if deepest > most.json_depth:
            raise FormatError(
                f"the JSON is nested more than {most.json_depth} deep", where=where, hint=raising("json_depth")
            )
        if values > most.json_values:
            raise FormatError(
                f"the JSON has more than {most.json_values:,} entries", where=where, hint=raising("json_values")
            )


def canonical_json(document: Mapping[str, Any]) -> str:
    """Write a JSON document in its canonical form: keys sorted, no spaces, NaN and infinities refused.

    >>> canonical_json({"b": 1, "a": [0.5]})
    '{"a":[0.5],"b":1}'
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a small JSON file as strictly as a header.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        FormatError: it is not JSON, or beyond `loraio.files.limits`.
    """
    return read_json_text(path)[1]


def read_json_text(path: str | os.PathLike[str]) -> tuple[bytes, Any]:
    """Read a JSON file as `read_json` does; return its bytes too."""
    where, most = f"{os.fspath(path)!r}", limits().header_bytes
    with open_file(Path(path)) as file:
        try:
            raw = file.read(most + 1)
        except OSError as error:
            raise MissingFileError(f"{where} cannot be read: {reason(error)}") from error
    if len(raw) > most:
        raise FormatError(f"longer than {most:,} bytes", where=where, hint=raising("header_bytes"))
    if not raw:
        raise FormatError("the file is empty", where=where, hint=FETCH_AGAIN)
    found = None if re.match(rb"\s*[{\[]", raw) else recognised(raw[:LOOKED_AT])
    if found is not None:
        raise FormatError(f"not JSON but {found[0]}", where=where, hint=found[1])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: {error}", where=where) from error
    return raw, parse_json(text, where=where)
