"""How large what a file says may be before it is refused unread: bounds on memory and time, not on what is useful."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from loraio.errors import ConfigError

PREFIX = "LORAIO_MAX_"
"""How the environment variables start that set a limit; the rest is its name in capitals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the readers take. The defaults are about ten times what real files have.

    With them a file that is refused costs less than 64 MB of memory, however it is made.

    Attributes:
        header_bytes: of a safetensors header, or of a JSON file beside one.
        json_depth: objects and lists inside of each other.
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
    pattern_steps: int = 5_000_000


def limits() -> Limits:
    """The limits that hold: an environment variable ``LORAIO_MAX_<NAME>`` sets one, ``LORAIO_MAX_HEADER_BYTES`` say.

    Raises:
        ConfigError: one of the variables is not a number of at least 1.
    """
    given = {}
    for field in fields(Limits):
        text = os.environ.get(PREFIX + field.name.upper())
        if text is None:
            continue
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
            raise ConfigError(f"{PREFIX}{field.name.upper()} is {text!r}, not a number of at least 1")
        given[field.name] = int(text)
    return Limits(**given)


def raising(name: str) -> str:
    """The hint of an error about a limit."""
    return f"{PREFIX}{name.upper()}=N in the environment raises the limit, for a file that you trust"
