"""Share the skeleton of dialects that are state dicts: files of tensors alone, without alpha and without metadata.

They are written for ``model.load_state_dict(.., strict=False)`` in the other tool.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraio.adapter import Adapter, Target
from loraio.bases.targets import TargetModule
from loraio.formats.foreign import Context, Encoded, Factors, Foreign
from loraio.formats.products import alpha_for
from loraio.formats.reading import Reading
from loraio.formats.report import Report, settings, tensors
from loraio.formats.sources import Source
from loraio.formats.writing import Writing
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor


class StateDictDialect:
    """The skeleton of a dialect; each one fills in its names and its layers.

    Attributes:
        name: as ``--to`` takes it.
        tool: the name of the tool in messages.
        own_alpha: the tool's usual alpha, for an error.
        keys: the expression for a key of a layer, with the groups "path" and "slot".
        telling: the expression for a key that only this dialect has.
    """

    name: str
    tool: str
    own_alpha: str
    keys: re.Pattern[str]
    telling: re.Pattern[str]
    container = "pickle"
    takes: tuple[str, ...] = ()

    def recognise(self, source: Source) -> str | None:
        return next((f"the key {key!r}" for key in source.tensors if self.telling.fullmatch(key)), None)

    def take(self, key: str, reading: Reading) -> bool:
        """Note a key of a layer; False for a tensor of the base's own."""
        match = self.keys.fullmatch(key)
        if match:
            reading.take(match["path"], match["slot"], key)
        return match is not None

    def take_whole(self, key: str, reading: Reading) -> None:
        """Note a key that is a tensor of the base's own, which it replaces."""
        reading.whole[key] = key

    def read_settings(self, reading: Reading) -> None:
        """Note the settings of a configuration; there are none for most tools."""

    def read_layer(self, name: str, slots: dict[str, str], reading: Reading) -> None:
        """Add a layer of these slots to the reading, or a refusal."""
        raise NotImplementedError

    def spell(self, place: TargetModule) -> Sequence[str]:
        return (place.path,) if place.parameter == "weight" else ()

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        raise NotImplementedError

    def write_layer(self, name: str, target: Target, export: Export) -> None:
        """Add the tensors of one weight to the export, or a problem."""
        raise NotImplementedError

    def read(self, source: Source) -> Foreign:
        reading = Reading(source=source)
        others = [key for key in source.tensors if not self.take(key, reading)]
        for key in others:
            self.take_whole(key, reading)
        self.read_settings(reading)
        for name, slots in reading.slots.items():
            self.read_layer(name, slots, reading)
        return reading.foreign(biases=lone_biases(reading.whole), own_alpha=self.own_alpha)

    def check(self, export: Export) -> None:
        """Note problems of the adapter as a whole; most tools have none."""

    def encode(self, adapter: Adapter, context: Context) -> Encoded:
        export = Export(tool=self.tool, adapter=adapter, context=context)
        for name, target in adapter.targets.items():
            reason = self.refusal(target.layer, target.kind, grouped=target.groups > 1)
            if reason is None:
                self.write_layer(name, target, export)
            else:
                export.problems.append(f"{name!r}: {reason}")
        self.check(export)
        export.add_whole()
        return export.encoded()


@dataclass(kw_only=True)
class Export(Writing):
    """A state dict in the making.

    Attributes:
        alphas: of each weight, under the rule alpha / r.
        spelled: other names of replaced tensors in the file; without an entry it is their own name.
    """

    alphas: dict[str, int | float] = field(default_factory=dict)
    spelled: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, name: str, target: Target, slots: Mapping[str, Tensor], note: str = "") -> None:
        """Add the tensors of one weight, by their names in the file."""
        self._add_alpha(name, target)
        self.tensors |= slots
        factors = [f"{name}.{short}" for short in self.adapter.factors_of(name)]
        self.lines += tensors(factors, "changed" if note else "carried", note)

    def add_whole(self) -> None:
        """Add the tensors that replace one of the base's."""
        for name in self.adapter.whole:
            self.carry_whole(name, *self.spelled.get(name, (name,)))

    def encoded(self) -> Encoded:
        """Return the state dict, with the fate of every setting.

        Raises:
            AdapterError: the tool cannot hold the adapter; all reasons are listed.
        """
        self.check()
        self.lines += settings(["rank"], "carried", "by the shapes")
        self.lines += settings(["kind"], "carried", f"all that {self.tool} has")
        self.lines += settings(
            ["alpha"], "lost", f"{self.tool} keeps it in the code that makes the layers: {self._alphas()}"
        )
        nowhere = f"a file of {self.tool} holds tensors alone"
        self.lines += settings(["base", "training", *self.adapter.extra], "lost", nowhere)
        return Encoded(tensors=dict(sorted(self.tensors.items())), report=Report.of(self.lines))

    def _add_alpha(self, name: str, target: Target) -> None:
        """Note the alpha that the tool's own layer needs, with its scale of alpha / r."""
        if target.scale_rule == "alpha/r":
            self.alphas[name] = target.alpha
            return
        alpha = alpha_for(target.scale, target.rank)
        if alpha is None:
            self.problems.append(f"{name!r}: {self.tool}'s scale is alpha / r, and no alpha gives {target.scale!r}")
            return
        self.alphas[name] = alpha
        self.lines += settings([f"{name}.scale_rule"], "changed", f"alpha {alpha!r} for alpha / r")

    def _alphas(self) -> str:
        values = set(self.alphas.values())
        if len(values) == 1:
            return f"{values.pop()!r}"
        return known((f"{alpha!r} of {name!r}" for name, alpha in self.alphas.items()), limit=len(self.alphas))


def joined(path: str, *rest: str) -> str:
    """Join a name to its module's path; the model itself has the empty path."""
    return ".".join((path, *rest) if path else rest)


def lone_biases(names: Iterable[str]) -> frozenset[str]:
    """Return the biases that come without the weight of their module."""
    known_names = set(names)
    return frozenset(
        name
        for name in known_names
        if name.rpartition(".")[2] == "bias" and joined(name.rpartition(".")[0], "weight") not in known_names
    )


def at_other_rank(lora_A: Tensor, lora_B: Tensor, *, alpha: int | float, rank: int, note: str) -> Factors:
    """Return a pair of another rank than the one that alpha was divided by, at the same scale to the bit.

    If no alpha gives that scale at the pair's rank, the pair is padded with zeros to ``rank`` times a power of two.

    Args:
        lora_A: (r, fan_in).
        lora_B: (out, r).
        alpha: of the file.
        rank: of the file: the scale is alpha / rank.
        note: the change of the pair, for the report.
    """
    from torch.nn.functional import pad

    size = len(lora_A)
    if isinstance(alpha, int) and alpha * size % rank == 0:
        return Factors(values={"lora_A": lora_A, "lora_B": lora_B}, rank=size, alpha=alpha * size // rank, note=note)
    own = alpha_for(alpha / rank, size)
    if own is None:
        doublings = math.ceil(math.log2(max(size / rank, 1)))
        size, own = rank * 2**doublings, alpha * 2.0**doublings
        lora_A = pad(lora_A, (0, 0, 0, size - len(lora_A)))
        lora_B = pad(lora_B, (0, size - lora_B.shape[1]))
    return Factors(values={"lora_A": lora_A, "lora_B": lora_B}, rank=size, alpha=own, note=note)
