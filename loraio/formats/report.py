"""Report the fate of every tensor and every setting in a conversion, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

FATES = ("carried", "changed", "lost")
"""Carried as it is; carried in another form; without a place in the other dialect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One tensor or setting.

    Attributes:
        what: "tensor" or "setting".
        name: in its file.
        fate: one of `FATES`.
        how: the change, or the reason why it has no place.
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
    """All lines of one step: tensors first, then settings, each by name."""

    lines: tuple[Line, ...] = ()

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Report:
        """Sort lines into a report."""
        return cls(lines=tuple(sorted(lines, key=lambda line: (line.what != "tensor", line.name))))

    def of_fate(self, fate: str) -> tuple[Line, ...]:
        """Return the lines of one fate."""
        return tuple(line for line in self.lines if line.fate == fate)

    @property
    def lost(self) -> tuple[Line, ...]:
        """The lines on things without a place in the other dialect."""
        return self.of_fate("lost")

    def to_json(self) -> list[dict[str, str]]:
        """Return a list of objects with ``what``, ``name``, ``fate`` and ``how``."""
        return [asdict(line) for line in self.lines]


def tensors(names: Iterable[str], fate: str, how: str = "") -> list[Line]:
    """Return a line of the same fate for each tensor."""
    return [Line(what="tensor", name=name, fate=fate, how=how) for name in names]


def settings(values: Mapping[str, Any] | Iterable[str], fate: str, how: str = "") -> list[Line]:
    """Return a line of the same fate for each setting."""
    return [Line(what="setting", name=name, fate=fate, how=how) for name in values]
