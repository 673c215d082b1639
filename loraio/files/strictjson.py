"""JSON as files of strangers must have it: bounded before it is parsed, no key twice, no NaN, no half a character."""

from __future__ import annotations

import json
import math
import re
from array import array
from itertools import accumulate
from typing import Any, NoReturn

from loraio.errors import FormatError, quoted
from loraio.files.limits import Limits, limits, raising

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a character

_LONE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""A half without its other one, in a text whose escaped backslashes are spaces."""

_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one level down, one up

_OTHERS = bytes(set(range(256)) - set(b"[]{},"))

_CHUNK = 1 << 16


def parse_json(text: str, *, where: str) -> Any:
    """What a JSON text says; no key may occur twice, and there is no NaN.

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
