"""Look up names in a registry, which is a plain dict literal from name to object."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from loraio.errors import UnknownNameError

Entry = TypeVar("Entry")


def lookup(registry: Mapping[str, Entry], name: str, *, what: str) -> Entry:
    """Return the entry of a name.

    Args:
        registry: name to object.
        name: the name asked for; case counts.
        what: a word for one entry, for the error: "data set".

    Raises:
        UnknownNameError: no such name; the error says the nearest one and lists all.

    >>> lookup({"lora": 1}, "lora", what="adapter kind")
    1
    """
    try:
        return registry[name]
    except KeyError:
        close = nearest(name, registry) or "."
        raise UnknownNameError(f"no {what} {name!r}{close} Known: {known(registry)}") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest the nearest of ``names`` in the form `; did you mean 'x'?`; empty if none is near.

    >>> nearest("lorra", ["dora", "lora"])
    "; did you mean 'lora'?"
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def known(names: Iterable[str], *, limit: int = 20) -> str:
    """Return the names in one line, sorted and cut at ``limit``.

    >>> known(["b", "a"])
    'a, b'
    """
    ordered = sorted(names)
    more = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more or "(none)"
