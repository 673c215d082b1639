"""Every error that loraio raises on purpose.

    LoraioError
    ├── FormatError (ValueError)             a file breaks the rules of its format
    ├── MissingFileError (FileNotFoundError) a file or folder to read is not there
    ├── OutputExistsError (FileExistsError)  a file to write is there already, or is one of the inputs
    ├── OutputError (OSError)                the system refused to write
    ├── AdapterError (ValueError)            an adapter contradicts itself
    │   └── ShapeError                       a tensor has the wrong shape
    ├── BaseMismatchError (ValueError)       an adapter does not belong to this base model
    │   └── AlreadyMergedError               the base has adapters merged into it
    ├── ConfigError (ValueError)             a setting is outside its range, or two settings exclude each other
    ├── UnknownNameError (LookupError)       no such network, data set, adapter kind, target ...
    ├── StateError (RuntimeError)            calls in a wrong order, such as attaching twice
    ├── DataError (RuntimeError)             a data set or an image cannot be read
    ├── TrainingError (RuntimeError)         training failed, and its result is of no use
    └── VerificationError (RuntimeError)     a check of an output failed; nothing was written

Each class inherits the fitting builtin too, so that a plain ``except FileNotFoundError`` works. The text of an error
has three parts: the fault, with both values; its place; and a remedy to try.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

LONGEST_LINE, MOST_LINES = 2_000, 1_000
"""Bounds on the text of an error: characters a line, and lines. Files may say more."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlong = 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8
_REPR.maxlevel = 3


def quoted(value: Any) -> str:
    """Return the ``repr`` of a value from a file, cut short if it is long.

    >>> quoted([1, 2, 3])
    '[1, 2, 3]'
    """
    return _REPR.repr(value)


def first_line(error: BaseException) -> str:
    """Return class and first line of a foreign error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}... ({len(line):,} characters)"


class LoraioError(Exception):
    """The root of all errors that loraio raises on purpose.

    Args:
        message: the fault, with the value found and the value needed.
        problems: a line for each fault, if there were several at once; they follow the message.
        where: the file, module or option.
        hint: a remedy for the reader to try.
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
        """Return the same error with a place, if it has none yet."""
        return type(self)(self.message, problems=self.problems, where=self.where or where, hint=self.hint)

    def __str__(self) -> str:
        return self.text


class FormatError(LoraioError, ValueError):
    """A file breaks the rules of its format."""


class MissingFileError(LoraioError, FileNotFoundError):
    """A file or folder to read is not there."""


class OutputExistsError(LoraioError, FileExistsError):
    """A file to write is there already, or is one of the inputs."""


class OutputError(LoraioError, OSError):
    """The system refused to write: no such folder, no room, no permission."""


class AdapterError(LoraioError, ValueError):
    """An adapter contradicts itself."""


class ShapeError(AdapterError):
    """A tensor has the wrong shape."""


class BaseMismatchError(LoraioError, ValueError):
    """An adapter does not belong to this base model; ``problems`` has a line for each tensor that differs."""


class AlreadyMergedError(BaseMismatchError):
    """The base has adapters merged into it: this one, or others since the adapter was made."""


class ConfigError(LoraioError, ValueError):
    """A setting is outside its range, or two settings exclude each other."""


class UnknownNameError(LoraioError, LookupError):
    """No registry, network or file has this name."""


class StateError(LoraioError, RuntimeError):
    """Calls in a wrong order, such as attaching twice."""


class DataError(LoraioError, RuntimeError):
    """A data set or an image cannot be read, or is not as it should be."""


class TrainingError(LoraioError, RuntimeError):
    """Training failed, and its result is of no use."""


class VerificationError(LoraioError, RuntimeError):
    """A check of an output failed; nothing was written."""
