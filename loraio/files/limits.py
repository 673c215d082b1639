"""Limits on the size of files' contents, beyond which they are refused unread: they bound memory and time."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import lru_cache

from loraio.errors import ConfigError

VARIABLE = "LORAIO_LIMITS"
"""The environment variable that sets limits, as NAME=NUMBER with commas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of the readers. The defaults are about ten times the size of real files.

    With them, refusing a file costs less than 64 MB of memory, however it is made.

    Attributes:
        header_bytes: of a safetensors header, or of a JSON file beside one.
        json_depth: levels of nested objects and lists.
        json_values: entries of all objects and lists of one JSON text together.
        tensors: in one file.
        name_bytes: of a tensor's name in UTF-8.
        dimensions: of a tensor.
        pattern_bytes: of a regular expression in a configuration.
        pattern_steps: of about a microsecond, for the patterns of one file; see `loraio.formats.patterns`.
    """

    header_bytes: int = 5_000_000
    json_depth: int = 64
    json_values: int = 300_000
    tensors: int = 30_000
    name_bytes: int = 512
    dimensions: int = 16
    pattern_bytes: int = 20_000
    pattern_steps: int = 1_000_000


_NAMES = tuple(field.name for field in fields(Limits))


def limits() -> Limits:
    """Return the limits. The environment variable `VARIABLE` changes some: ``tensors=200000,name_bytes=900``.

    Raises:
        ConfigError: it names no limit, or says no number of at least 1.
    """
    return _parsed(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=1)
def _parsed(text: str) -> Limits:
    given = {}
    for setting in text.split(",") if text else ():
        name, _, number = setting.partition("=")
        if name not in _NAMES:
            raise ConfigError(f"{VARIABLE} names the limit {name!r}", hint=f"one of {', '.join(_NAMES)}")
        if not (number.isascii() and number.isdigit() and len(number) < 19 and int(number)):
            raise ConfigError(f"{VARIABLE} says {setting!r}, which is not a number of at least 1")
        given[name] = int(number)
    return Limits(**given)


def raising(name: str) -> str:
    """Return the hint for an error about a limit."""
    return f"{VARIABLE}={name}=N in the environment raises the limit, for a file that you trust"
