"""Networks of the user's own code, as ``package.module:callable``: imported only if the user names them."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from loraio.bases.network_libraries import LIBRARIES
from loraio.errors import ConfigError, UnknownNameError, first_line
from loraio.registry import known, nearest


def is_own_code(name: str) -> bool:
    """Return True if a network's name means a callable to import: ``package.module:callable``."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme not in LIBRARIES


def refuse_own_code(name: str, *, where: str) -> str:
    """Return a network's name that a file states, unless it would run code.

    Raises:
        ConfigError: it is ``package.module:callable``.
    """
    if is_own_code(name):
        raise ConfigError(
            f"the file says that its network is the code {name!r}, which a file alone does not get to run",
            where=where,
            hint=f"--model {name} (model= in Python), if you trust that code",
        )
    return name


def import_callable(name: str, *, unknown: Callable[[str], UnknownNameError]) -> Callable[..., nn.Module]:
    """Import ``package.module:callable``.

    ``unknown`` makes the error for a name of no module, with a reason that may be empty.

    Raises:
        UnknownNameError: no such module or callable; the error says the nearest.
        ConfigError: importing the module failed, or the name is not that of a callable.
    """
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in path.split(".")):
        raise unknown("")
    module = _import(path, unknown)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [word for word in dir(found) if not word.startswith("_")]
            raise UnknownNameError(
                f"{path!r} has no {attribute!r}{nearest(part, names)}",
                where=f"{getattr(module, '__file__', None) or path!r}",
                hint=f"one of: {known(names)}",
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{name!r} is {type(found).__name__}, not a callable", where=getattr(module, "__file__", None)
        )
    built: Callable[..., nn.Module] = found
    return built


def _import(path: str, unknown: Callable[[str], UnknownNameError]) -> ModuleType:
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{path}.".startswith(f"{missing}."):
            raise unknown(f": there is no module {path!r}") from None
        raise ConfigError(f"{path!r} cannot be imported: {first_line(error)}", where=place_of(error)) from error


def place_of(error: BaseException) -> str | None:
    """Return file and line that raised an error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None
