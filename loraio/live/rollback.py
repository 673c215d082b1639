"""Take back the steps of a change that could not be made to its end."""

from __future__ import annotations

from typing import Any

from torch import nn

_ABSENT = object()


class Rollback:
    """Makes the steps of a change and remembers what was there before each.

    A forward pass in another thread may run between any two steps, and between any two steps that are taken back.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Any, Any, Any]] = []

    def set(self, held: dict[Any, Any], key: Any, value: Any) -> None:
        """Set a value in a dict."""
        self._steps.append((held, key, held.get(key, _ABSENT)))
        held[key] = value

    def remove(self, held: dict[Any, Any], key: Any) -> None:
        """Remove a key from a dict if it is there."""
        self._steps.append((held, key, held.get(key, _ABSENT)))
        held.pop(key, None)

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Give a module another class."""
        self._steps.append((module, None, type(module)))
        module.__class__ = cls

    def run(self) -> None:
        """Take back all steps, the last one first."""
        for held, key, before in reversed(self._steps):
            if isinstance(held, nn.Module):
                held.__class__ = before
            elif before is _ABSENT:
                held.pop(key, None)
            else:
                held[key] = before
