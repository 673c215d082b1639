"""What was before a change, for the case that not all of it can be made."""

from __future__ import annotations

from typing import Any

from torch import nn


class Undo:
    """Dicts and classes as they were when they were noted; what is about to change is noted first."""

    def __init__(self) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []

    @property
    def noted(self) -> bool:
        """Whether anything was noted."""
        return bool(self._dicts)

    def note(self, *held: dict[Any, Any]) -> None:
        """Keep what is in dicts, in its order; the values themselves are not copied."""
        for each in held:
            self._dicts.append((each, dict(each)))

    def note_module(self, module: nn.Module) -> None:
        """Keep a module's class, attributes, parameters, buffers and submodules."""
        self._classes.append((module, type(module)))
        self.note(vars(module), module._parameters, module._buffers, module._modules)

    def run(self) -> None:
        """Let everything be as it was when it was noted first."""
        for module, cls in reversed(self._classes):
            module.__class__ = cls
        for held, before in reversed(self._dicts):
            held.clear()
            held.update(before)
