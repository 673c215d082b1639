"""What a conversion does to every tensor and every setting, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FATES = ("carried", "changed", "lost")
"""Carried as it is; carried in another form, or changed as said; without a place in the other dialect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One tensor or setting.

    Attributes:
        what: "tensor" or "setting".
        name: as its file has it.
        fate: one of `FATES`.
        how: what became of it, or why it has no place.
    """

    what: str
    name: str
    fate: str
    how: str = ""

    def __str__(self) -> str:
        fate = "has no place there" if self.fate == "lost" else self.fate
        return f"{self.what} {self.name}: {fate}{f', {self.how}' if self.how else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All lines of one step, tensors first and by name."""

    lines: tuple[Line, ...] = ()

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Report:
        """The lines in the one order they have."""
        return cls(lines=tuple(sorted(lines, key=lambda line: (line.what != "tensor", line.name))))

    def of_fate(self, fate: str) -> tuple[Line, ...]:
        """The lines of one fate."""
        return tuple(line for line in self.lines if line.fate == fate)

    @property
    def lost(self) -> tuple[Line, ...]:
        """What has no place in the other dialect."""
        return self.of_fate("lost")

    def to_json(self) -> list[dict[str, str]]:
        """A list of objects with ``what``, ``name``, ``fate`` and ``how``."""
        return [{"what": line.what, "name": line.name, "fate": line.fate, "how": line.how} for line in self.lines]


def tensors(names: Iterable[str], fate: str, how: str = "") -> list[Line]:
    """A line of the same fate for each tensor."""
    return [Line(what="tensor", name=name, fate=fate, how=how) for name in names]


def settings(values: Mapping[str, Any] | Iterable[str], fate: str, how: str = "") -> list[Line]:
    """A line of the same fate for each setting."""
    return [Line(what="setting", name=name, fate=fate, how=how) for name in values]
