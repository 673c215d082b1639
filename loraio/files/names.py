"""Names that become files or are shown: which may be, which of them are one to some systems, and how a line shows them.

What a file says is called so by a stranger. A name is checked here before it becomes a part of a path, and escaped
before it reaches a terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from loraio.errors import OutputError

MAX_NAME_BYTES = 200
"""The longest name in UTF-8: with an ending, and what a temporary file adds, it must make a file name."""

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of what no name may hold: control, format, half a character, ends of lines and paragraphs."""

_PUNCTUATION = frozenset('/\\:*?"<>|')

_JOINERS = frozenset("\u200c\u200d")  # invisible, and needed to write Persian, Hindi and many emoji

_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{number}" for port in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"]
)


def name_problem(name: str) -> str | None:
    """What is wrong with a name, if anything: every name must make the same file name on every system.

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
    """Whether Windows takes a file of this name, with any ending, for a device such as the console.

    >>> is_device("NUL.safetensors"), is_device("null")
    (True, False)

    Microsoft, "Naming Files, Paths, and Namespaces", section "Naming Conventions".
    """
    return name.partition(".")[0].rstrip(" ").casefold() in _DEVICES


def normal_form(name: str) -> str:
    """The name in Unicode normal form C: filesystems give back either form, whatever the file was called."""
    return unicodedata.normalize("NFC", name)


def name_key(name: str) -> str:
    """The same for names that differ in nothing but case, normal form or invisible characters: one on some systems.

    >>> name_key("Digit-7") == name_key("digit-7")
    True
    """
    seen = "".join(c for c in normal_form(name) if unicodedata.category(c) != "Cf")
    return normal_form(normal_form(seen).casefold())


def name_clashes(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that share their `name_key` with others, and what is wrong with each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_key(name), []).append(name)
    clashes = [group for group in groups.values() if len(group) > 1]
    said = [f"{' and '.join(map(repr, sorted(group)))} are one name to some systems" for group in clashes]
    return {name: text for group, text in zip(clashes, said, strict=True) for name in group}


def refuse_link(path: Path) -> None:
    """Refuse to write a file of a folder's own where a link stands in its place, since that leads elsewhere.

    Raises:
        OutputError: it is a symbolic link.
    """
    if path.is_symlink():
        raise OutputError(f"{str(path)!r} is a link, and would be written elsewhere", hint="remove the link")


def shown(text: str) -> str:
    r"""Text for one line of a terminal: what is no printable character is escaped, as Python's ``repr`` does.

    Names out of files may hold sequences that move the cursor, name the window or turn the line's direction around.

    >>> shown("conv1\x1b[2J\u202e"), shown("größe")
    ('conv1\\x1b[2J\\u202e', 'größe')

    Boucher and Anderson 2021, Trojan Source, arXiv:2111.00169.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_hidden(character: str) -> bool:
    """Whether it is shown as nothing, or changes how its neighbours are shown."""
    return unicodedata.category(character) in HIDDEN and character not in _JOINERS
