"""Collect the contents of another tool's file while its dialect reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraio.formats.foreign import Added, Foreign, ForeignLayer
from loraio.formats.report import Line
from loraio.formats.sources import Source

Shape = tuple[int, ...]


@dataclass(kw_only=True)
class Reading:
    """A `Foreign` in the making; the attributes that it has too mean the same.

    Attributes:
        source: the file.
        slots: for each layer its keys by slot.
    """

    source: Source
    slots: dict[str, dict[str, str]] = field(default_factory=dict)
    layers: list[ForeignLayer] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    not_used: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    added: list[Added] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def take(self, layer: str | None, slot: str, key: str) -> None:
        """Note a key of a layer; the model itself has the name None."""
        self.slots.setdefault(layer or "", {})[slot] = key

    def shape(self, key: str) -> Shape:
        """Return the shape of a tensor."""
        return tuple(self.source.tensors[key].shape)

    def pair(self, layer: str, slots: Mapping[str, str], A: str, B: str, *, of: str = "") -> tuple[Shape, Shape] | None:
        """Return the shapes of two slots if they are matrices; else None, and a refusal is noted."""
        missing = [slot for slot in (A, B) if slot not in slots]
        if missing:
            self.refusals.append(f"{layer!r}: {missing[0]}{of} is missing")
            return None
        down, up = self.shape(slots[A]), self.shape(slots[B])
        if len(down) != 2 or len(up) != 2:
            self.refuse_pair(layer, down, up)
            return None
        return down, up

    def refuse_pair(self, layer: str, down: Shape, up: Shape) -> None:
        """Note that the shapes of two factors do not go together."""
        self.refusals.append(f"{layer!r}: lora_A is {down} and lora_B is {up}, which is no pair")

    def foreign(
        self,
        *,
        biases: Iterable[str] = (),
        own_alpha: str = "",
        spelled: Callable[[str], Sequence[str]] | None = None,
    ) -> Foreign:
        """Return everything that was read."""
        if not self.layers and not self.refusals:
            self.refusals.append("it holds no layer's factors")
        return Foreign(
            layers=tuple(self.layers),
            whole=self.whole,
            biases=frozenset(biases),
            not_used=self.not_used,
            lost=self.lost,
            settings=self.settings,
            lines=tuple(self.lines),
            refusals=tuple(dict.fromkeys(self.refusals)),
            own_alpha=own_alpha,
            added=tuple(self.added),
            spelled=spelled,
        )
