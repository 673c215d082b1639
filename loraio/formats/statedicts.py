"""What the dialects share that are state dicts, and say no more than tensors do: no alpha, and nothing in a header.

What is written is a state dict for ``model.load_state_dict(.., strict=False)`` in the other tool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraio.adapter import Adapter, Target
from loraio.errors import AdapterError
from loraio.formats.foreign import Encoded, Factors
from loraio.formats.report import Line, Report, settings, tensors
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor


def module_and_parameter(name: str) -> tuple[str, str]:
    """A weight's name in its two parts: "fc.weight" gives "fc" and "weight", "weight" gives "" and "weight"."""
    path, _, parameter = name.rpartition(".")
    return path, parameter


def joined(path: str, *rest: str) -> str:
    """A name inside a module; the model itself has the empty path."""
    return ".".join((path, *rest) if path else rest)


def lone_biases(names: Iterable[str]) -> frozenset[str]:
    """Biases whose module's weight is not among the names: they come apart from the rest of it."""
    known_names = set(names)
    return frozenset(
        name
        for name in known_names
        if name.rpartition(".")[2] == "bias" and joined(name.rpartition(".")[0], "weight") not in known_names
    )


def alpha_for(scale: float, rank: int) -> float | None:
    """The alpha with which alpha / rank is the scale to the bit; None where there is none."""
    guess = scale * rank
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), None)


def at_other_rank(lora_A: Tensor, lora_B: Tensor, *, alpha: int | float, rank: int, note: str) -> Factors:
    """A pair of another rank than the one that alpha was divided by, at the same scale to the bit.

    Where no alpha gives that scale at the pair's rank, it is padded with zeros to ``rank`` times a power of two.

    Args:
        lora_A: (r, fan_in).
        lora_B: (out, r).
        alpha: of the file.
        rank: of the file: the scale is alpha / rank.
        note: what was done to the pair.
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


@dataclass(kw_only=True)
class Export:
    """A state dict in the making, with its report.

    Attributes:
        tool: how the dialect's tool is called.
        adapter: what is written.
    """

    tool: str
    adapter: Adapter
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    alphas: dict[str, int | float] = field(default_factory=dict)

    def alpha(self, name: str, target: Target) -> None:
        """Notes the alpha that the tool's own layer needs, whose scale is alpha / r."""
        if target.scale_rule == "alpha/r":
            self.alphas[name] = target.alpha
            return
        alpha = alpha_for(target.scale, target.rank)
        if alpha is None:
            self.problems.append(f"{name!r}: {self.tool}'s scale is alpha / r, and no alpha gives {target.scale!r}")
            return
        self.alphas[name] = alpha
        self.lines += settings([f"{name}.scale_rule"], "changed", f"alpha {alpha!r} for alpha / r")

    def add(self, name: str, slots: Mapping[str, Tensor], note: str = "") -> None:
        """The tensors of one weight, by their names in the file."""
        self.tensors |= slots
        factors = [f"{name}.{short}" for short in self.adapter.factors_of(name)]
        self.lines += tensors(factors, "changed" if note else "carried", note)

    def add_whole(self, spelled: Mapping[str, Sequence[str]] | None = None) -> None:
        """The tensors that replace one of the base's, under its name, or under those given for it."""
        for name, whole in self.adapter.whole.items():
            for key in (spelled or {}).get(name, (name,)):
                self.tensors[key] = self.adapter.tensors[name]
            resized = whole.shape != whole.base_shape
            how = f"the base for {self.tool} needs its shape {whole.shape}" if resized else ""
            self.lines += tensors([name], "carried", how)

    def encoded(self) -> Encoded:
        """What was made, if nothing was wrong.

        Raises:
            AdapterError: all that was wrong.
        """
        if self.problems:
            raise AdapterError(
                f"{self.tool} cannot hold this adapter",
                problems=self.problems,
                hint="loraio merge puts it into the base for good",
            )
        self.lines += settings(["rank"], "carried", "by the shapes")
        self.lines += settings(["kind"], "carried", f"all that {self.tool} has")
        self.lines += settings(
            ["alpha"], "lost", f"{self.tool} keeps it in the code that makes the layers: {self._alphas()}"
        )
        nowhere = f"a file of {self.tool} holds tensors alone"
        self.lines += settings(["base", "training", *self.adapter.extra], "lost", nowhere)
        return Encoded(tensors=dict(sorted(self.tensors.items())), report=Report.of(self.lines))

    def _alphas(self) -> str:
        values = set(self.alphas.values())
        if len(values) == 1:
            return f"{values.pop()!r}"
        return known((f"{alpha!r} of {name!r}" for name, alpha in self.alphas.items()), limit=len(self.alphas))
