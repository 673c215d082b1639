"""JSON as files of strangers must have it: bounded before it is parsed, no key twice, no NaN, no half a character."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from loraio.errors import FormatError, shown
from loraio.limits import Limits, limits, raising

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a character

_LONE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""A half without its other one, in a text whose escaped backslashes are spaces."""

_BRACKETS = re.compile(rb'"[^"]*"?|[\[\]{}]')
_STRUCTURE = re.compile(rb'"[^"]*"?|[\[\]{},]')


def parse_json(text: str, *, where: str) -> Any:
    """What a JSON text says; no key may occur twice, and there is no NaN.

    Raises:
        FormatError: it is not such a text, or beyond the limits; ``where`` says whose.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"the key {shown(key)} occurs twice", where=where)
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
    many = raw.count(b",") + opened > most.json_values
    if opened <= most.json_depth and not many:
        return
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    del raw
    depth = deepest = values = 0
    for match in (_STRUCTURE if many else _BRACKETS).finditer(bare):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            values += 1
            deepest = max(deepest, depth)
        elif token in (b"]", b"}"):
            depth -= 1
        elif token == b",":
            values += 1
        if deepest > most.json_depth:
            raise FormatError(
                f"the JSON is nested more than {most.json_depth} deep", where=where, hint=raising("json_depth")
            )
        if values > most.json_values:
            raise FormatError(
                f"the JSON has more than {most.json_values:,} entries", where=where, hint=raising("json_values")
            )
