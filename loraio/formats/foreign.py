"""Describe the adapter file of another tool, and define the protocol of its dialect.

A foreign file has no shapes of weights, no layer classes, no groups and no digests of a base. `Foreign` holds what the
file does say, from names and shapes alone. `loraio.formats.binding` puts it on a base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import SCALE_RULES
from loraio.bases.targets import TargetModule
from loraio.formats.report import Line, Report
from loraio.formats.sources import Source

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user has to say where a file does not.

    Attributes:
        alpha: of every layer whose alpha is not in the file.
        lossy: go on where something has no place on the other side.
        enable_lora: which parts of the output a MergedLinear of loralib was made with.
        approximate: make plain pairs of layers that are none, and say the error.
        rank: of those pairs; None for the file's own.
        as_full_delta: write the whole change of each weight, where the tool has a form for it.
        prefix: in front of the names of modules, where the tool has one; None for its usual one.
        allow_base_mismatch: go on where the base is not the one that an export of ours says it was made for.
    """

    alpha: int | float | None = None
    lossy: bool = False
    enable_lora: Sequence[bool] | None = None
    approximate: bool = False
    rank: int | None = None
    as_full_delta: bool = False
    prefix: str | None = None
    allow_base_mismatch: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLayer:
    """The tensors of one adapted weight, as their file has them.

    Attributes:
        name: of the weight's module, as the dialect spells it.
        slots: the key in the file of each tensor, by the dialect's own word for it; "bias" for a bias beside the
            factors, "alpha" for a tensor that holds alpha.
        rank: r, from a shape.
        alpha: None where the file does not say it.
        kind: a name in `loraio.adapter.kinds.KINDS`.
        scale_rule: a name in `loraio.adapter.SCALE_RULES`.
        implied_alpha: what the tool itself takes where its file does not say alpha; None where that cannot be told.
        product: the method, where it is no plain pair and only an approximation is one; empty for plain pairs.
    """

    name: str
    slots: Mapping[str, str]
    rank: int
    alpha: int | float | None
    kind: str = "lora"
    scale_rule: str = "alpha/r"
    implied_alpha: int | float | None = None
    product: str = ""

    @property
    def scale(self) -> float | None:
        """As `loraio.adapter.Target.scale`; None without alpha."""
        return None if self.alpha is None else SCALE_RULES[self.scale_rule](self.alpha, self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A tensor that is added to one of the base that no factors change, such as a normalisation layer's weight.

    Attributes:
        module: whose tensor it is, as the dialect spells it.
        parameter: its name in the module.
        key: in the file.
    """

    module: str
    parameter: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """What the file of another tool says, from its header and configuration alone.

    Attributes:
        layers: in the file's order.
        whole: keys in the file of tensors that replace one of the base, by the base's name for it.
        biases: those names of them that are biases stored apart from the rest of their module.
        not_used: keys of tensors that are no part of the adapter, and why.
        lost: keys of tensors that the tool itself passes over, and why.
        settings: everything that is said besides tensors, as plain JSON values.
        lines: what becomes of each setting.
        refusals: why it cannot be used; empty for an adapter that can.
        own_alpha: what alpha is in the tool where nothing is said; empty where that is not known.
        added: tensors that are added to the base's.
        spelled: how the dialect may name a module, for them.
    """

    layers: tuple[ForeignLayer, ...]
    whole: Mapping[str, str] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    not_used: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    refusals: tuple[str, ...] = ()
    own_alpha: str = ""
    added: tuple[Added, ...] = ()
    spelled: Callable[[str], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One layer's tensors as factors of a kind, and what changed on the way.

    Attributes:
        values: by short name: ``lora_A`` (r, fan_in), ``lora_B`` (out, r), ``magnitude`` (out,).
        rank: where it is another than the file's.
        alpha: where it is another than the file's.
        bias: float64, what is added to the layer's bias; None where nothing is.
        note: what changed, with the error where it is not exact.
    """

    values: Mapping[str, Tensor]
    rank: int | None = None
    alpha: int | float | None = None
    bias: Tensor | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An adapter as another tool has it, ready to be written.

    Attributes:
        tensors: by their names in the file.
        report: what became of every tensor and setting of the adapter.
        document: of loraio, for a safetensors header; None where the tool's file has none.
        metadata: further strings for it.
        config: for `loraio.formats.sources.CONFIG`; None where the tool has no such file.
    """

    tensors: Mapping[str, Tensor]
    report: Report
    document: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class Dialect(Protocol):
    """One tool's way to lay an adapter out in files. It never opens one: that is done before and after it."""

    @property
    def name(self) -> str:
        """As ``--to`` takes it."""
        ...

    @property
    def container(self) -> str:
        """What is written: "folder" (safetensors and a configuration), "safetensors" or "pickle"."""
        ...

    def recognise(self, source: Source) -> str | None:
        """Why this is a file of the dialect, by its content and never by its name; None where it is not."""
        ...

    def read(self, source: Source) -> Foreign:
        """What the file says, without the values of its tensors and without torch."""
        ...

    def spell(self, place: TargetModule) -> Sequence[str]:
        """How the dialect may name the module of this weight; nothing where it cannot name the weight."""
        ...

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """Why the dialect cannot hold this kind on this layer type; None where it can."""
        ...

    def factors(
        self, layer: ForeignLayer, values: Mapping[str, Tensor], place: TargetModule, options: Options
    ) -> Factors:
        """A layer's tensors, by slot, as factors of the weight; the layer's alpha is known by now.

        Raises:
            AdapterError: they cannot be; the errors of all layers are listed.
        """
        ...

    def encode(
        self,
        adapter: Adapter,
        *,
        network: nn.Module | None,
        state: Mapping[str, Tensor] | None,
        options: Options,
    ) -> Encoded:
        """The adapter in this dialect.

        Args:
            adapter: to be written.
            network: the base's network where it is known; its weights mean nothing.
            state: the base's own tensors where they are known.
            options: what the user asks for.

        Raises:
            AdapterError: the tool cannot hold it, or would use it wrongly; all reasons are listed.
        """
        ...
