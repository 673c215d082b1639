"""Check names from files before they become paths, and escape them before they reach a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from loraio.errors import OutputError

MAX_NAME_BYTES = 200
"""The longest name in UTF-8: with an ending, and what a temporary file adds, it must make a file name."""

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that no name may hold: control, format, surrogate, line and paragraph separators."""

_PUNCTUATION = frozenset('/\\:*?"<>|')

_JOINERS = frozenset("\u200c\u200d")  # invisible, and needed to write Persian, Hindi and many emoji

_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{number}" for port in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"]
)


def name_problem(name: str) -> str | None:
    """Explain why a name cannot be the same file name on every system; None if it can.

    >>> name_problem("digit-7"), name_problem("a/b")
    (None, "it holds '/'")
    """
    if not name or name != name.strip() or name[0] in ".-" or name.endswith("."):
        return "it is empty, begins with a dot or hyphen, ends with a dot, or has a space at an end"
    bad = next((c for c in name if c in _PUNCTUATION or is_hidden(c)), None)
    if bad is not None:
        return f"it holds {bad!r}"
    if is_device(name):
        return "it is that of a device on Windows"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it has {len(name.encode())} bytes, at most {MAX_NAME_BYTES} make a file name everywhere"
    if normal_form(name) != name:
        return "it is not in Unicode normal form C"
    return None


def is_device(name: str) -> bool:
    """Return True if Windows takes a file of this name, with any ending, for a device such as the console.

    >>> is_device("NUL.safetensors"), is_device("null")
    (True, False)

    Microsoft, "Naming Files, Paths, and Namespaces", section "Naming Conventions".
    """
    return name.partition(".")[0].rstrip(" ").casefold() in _DEVICES


def normal_form(name: str) -> str:
    """Return the name in Unicode normal form C: some filesystems change the form."""
    return unicodedata.normalize("NFC", name)


def name_key(name: str) -> str:
    """Return a key that is equal for names that some systems take for one.

    Such names differ in case, in their normal form or by invisible characters.

    >>> name_key("Digit-7") == name_key("digit-7")
    True
    """
    seen = "".join(c for c in normal_form(name) if unicodedata.category(c) != "Cf")
    return normal_form(normal_form(seen).casefold())


def name_clashes(names: Iterable[str]) -> dict[str, str]:
    """Return the names that share their `name_key` with others, each with the reason."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_key(name), []).append(name)
    clashes = [group for group in groups.values() if len(group) > 1]
    said = [f"{' and '.join(map(repr, sorted(group)))} are one name to some systems" for group in clashes]
    return {name: text for group, text in zip(clashes, said, strict=True) for name in group}


def refuse_link(path: Path) -> None:
    """Refuse to write where a symbolic link stands, since it leads elsewhere.

    Raises:
        OutputError: it is a symbolic link.
    """
    if path.is_symlink():
        raise OutputError(f"{str(path)!r} is a link, and would be written elsewhere", hint="remove the link")


def shown(text: str) -> str:
    r"""Escape characters that are not printable, as Python's ``repr`` does, for one line of a terminal.

    Names out of files may hold sequences that move the cursor, name the window or turn the line's direction around.

    >>> shown("conv1\x1b[2J\u202e"), shown("größe")
    ('conv1\\x1b[2J\\u202e', 'größe')

    Boucher and Anderson 2021, Trojan Source, arXiv:2111.00169.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_hidden(character: str) -> bool:
    """Return True if a character is invisible, or changes how its neighbours look."""
    return unicodedata.category(character) in HIDDEN and character not in _JOINERS
