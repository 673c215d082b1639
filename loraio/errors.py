"""Every error that loraio raises on purpose.

    LoraioError
    ├── FormatError (ValueError)             the bytes of a file are not what their format says
    ├── MissingFileError (FileNotFoundError) a file or folder to read is not there
    ├── OutputExistsError (FileExistsError)  a file to write is there already, or is one of the inputs
    ├── OutputError (OSError)                the system refused to write
    ├── AdapterError (ValueError)            an adapter contradicts itself
    │   └── ShapeError                       a tensor has another shape than its place needs
    ├── BaseMismatchError (ValueError)       an adapter does not belong to this base model
    │   └── AlreadyMergedError               the base has an adapter in it that it should not have
    ├── ConfigError (ValueError)             a setting is outside its range, or two settings exclude each other
    ├── UnknownNameError (LookupError)       no such network, data set, adapter kind, target ...
    ├── StateError (RuntimeError)            calls in an order that has no meaning, such as attaching twice
    ├── DataError (RuntimeError)             a data set or an image cannot be had
    ├── TrainingError (RuntimeError)         training went wrong and its result is not worth keeping
    └── VerificationError (RuntimeError)     a check that guards an output said no; nothing was written

A class inherits the fitting builtin too, so that a plain ``except FileNotFoundError`` works. The text of an error is
built from its parts: what, with both numbers; where; and what to try.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

LONGEST_LINE, MOST_LINES = 2_000, 1_000
"""Characters of a line of an error, and its lines; what a file says may be more."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlong = 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8
_REPR.maxlevel = 3


def quoted(value: Any) -> str:
    """Its ``repr``, cut short where it is long: errors quote what files say.

    >>> quoted([1, 2, 3])
    '[1, 2, 3]'
    """
    return _REPR.repr(value)


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}... ({len(line):,} characters)"


class LoraioError(Exception):
    """The root of all errors that loraio raises on purpose.

    Args:
        message: what was wrong, with the value found and the value needed.
        problems: when several things were wrong at once, one line for each; they follow the message.
        where: the file, module or option in which it was found.
        hint: what the reader can do about it.
    """

    def __init__(
        self, message: str, *, problems: Sequence[str] = (), where: str | None = None, hint: str | None = None
    ) -> None:
        self.message = _cut(message)
        more = [f"and {len(problems) - MOST_LINES:,} more"] if len(problems) > MOST_LINES else []
        self.problems = (*map(_cut, problems[:MOST_LINES]), *more)
        self.where = where
        self.hint = hint
        lines = [self.message, *(f"  {problem}" for problem in self.problems)]
        if where:
            lines.append(f"  in {where}")
        if hint:
            lines.append(f"  try: {hint}")
        self.text = "\n".join(lines)
        super().__init__(self.text)

    def at(self, where: str) -> LoraioError:
        """The same error, in that place if it has none yet."""
        return type(self)(self.message, problems=self.problems, where=self.where or where, hint=self.hint)

    def __str__(self) -> str:
        return self.text


class FormatError(LoraioError, ValueError):
    """The bytes of a file are not what their format says."""


class MissingFileError(LoraioError, FileNotFoundError):
    """A file or folder to read is not there."""


class OutputExistsError(LoraioError, FileExistsError):
    """A file to write is there already, or is one of the inputs."""


class OutputError(LoraioError, OSError):
    """The system refused to write: no such folder, no room, no permission."""


class AdapterError(LoraioError, ValueError):
    """An adapter contradicts itself."""


class ShapeError(AdapterError):
    """A tensor has another shape than its place needs."""


class BaseMismatchError(LoraioError, ValueError):
    """An adapter does not belong to this base model; ``problems`` has a line for each target that differs."""


class AlreadyMergedError(BaseMismatchError):
    """The base holds merged adapters: this one, or others that came after the base that it was made for."""


class ConfigError(LoraioError, ValueError):
    """A setting is outside its range, or two settings exclude each other."""


class UnknownNameError(LoraioError, LookupError):
    """A name that no registry, network or file knows."""


class StateError(LoraioError, RuntimeError):
    """Calls in an order that has no meaning, such as attaching twice."""


class DataError(LoraioError, RuntimeError):
    """A data set or an image cannot be had, or is not what it should be."""


class TrainingError(LoraioError, RuntimeError):
    """Training went wrong and its result is not worth keeping."""


class VerificationError(LoraioError, RuntimeError):
    """A check that guards an output said no; nothing was written."""
