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

Values = Mapping[str, "Tensor"]
"""The tensors of one layer by slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings that the user gives because a file does not hold them.

    Attributes:
        alpha: of every layer without an alpha in the file.
        lossy: go on if something has no place on the other side.
        enable_lora: the flags of a MergedLinear of loralib.
        approximate: make plain pairs of layers that are none, and report the error.
        rank: of those pairs; None for the file's own.
        as_full_delta: write the whole change of each weight, if the tool has a form for it.
        prefix: in front of the names of modules, if the tool has one; None for its usual one.
        allow_base_mismatch: go on if the base is not the one that our own export names.
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
class Context:
    """Everything but the adapter that a dialect may need to write it.

    Attributes:
        network: the base's network; None if it is not known.
        state: the base's own tensors; None if they are not known.
        options: given by the user.
    """

    network: nn.Module | None = None
    state: Mapping[str, Tensor] | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLayer:
    """The tensors of one adapted weight, as their file has them.

    Attributes:
        name: of the weight's module, as the dialect spells it.
        slots: from the dialect's word for each tensor to its key in the file; "bias" for a bias beside the factors,
            "alpha" for a tensor that holds alpha.
        rank: r, from a shape.
        alpha: None if the file does not say it.
        kind: a name in `loraio.adapter.kinds.KINDS`.
        scale_rule: a name in `loraio.adapter.SCALE_RULES`.
        implied_alpha: the alpha that the tool takes if its file says none; None if that cannot be told.
        product: the method, if the layer is no plain pair and can only be approximated by one; else empty.
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
        """The factor on the product, as `loraio.adapter.Target.scale`; None without alpha."""
        return None if self.alpha is None else SCALE_RULES[self.scale_rule](self.alpha, self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A tensor that is added to one of the base that no factors change, such as a normalisation layer's weight.

    Attributes:
        module: the tensor's module, as the dialect spells it.
        parameter: the tensor's name in the module.
        key: in the file.
    """

    module: str
    parameter: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """The contents of another tool's file, from its header and configuration alone.

    Attributes:
        layers: in the file's order.
        whole: for each tensor that replaces one of the base, the base's name to the key in the file.
        biases: those names of `whole` that are biases stored apart from the rest of their module.
        not_used: keys of tensors that are no part of the adapter, and why.
        lost: keys of tensors that the tool itself ignores, and why.
        settings: everything besides tensors, as plain JSON values.
        lines: the fate of each setting.
        refusals: reasons why the adapter cannot be used.
        own_alpha: the tool's usual alpha, for an error; empty if it is not known.
        added: tensors that are added to the base's.
        spelled: the names that the dialect may give to a module, for the tensors in `added`.
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
    """The tensors of one layer as factors of a kind.

    Attributes:
        values: by short name: ``lora_A`` (r, fan_in), ``lora_B`` (out, r), ``magnitude`` (out,).
        rank: None for the file's own.
        alpha: None for the file's own.
        bias: float64, added to the layer's bias; None for no change.
        note: the change that was made, with the error if it is not exact.
    """

    values: Mapping[str, Tensor]
    rank: int | None = None
    alpha: int | float | None = None
    bias: Tensor | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An adapter in the layout of another tool, ready to be written.

    Attributes:
        tensors: by their names in the file.
        report: the fate of every tensor and setting of the adapter.
        document: of loraio, for a safetensors header; None if the tool's file has none.
        metadata: further strings for the header.
        config: for `loraio.formats.sources.CONFIG`; None if the tool has no such file.
    """

    tensors: Mapping[str, Tensor]
    report: Report
    document: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class Dialect(Protocol):
    """One tool's layout of adapter files. A dialect never opens a file: that is done before and after it."""

    name: str
    """The name that ``--to`` takes."""

    container: str
    """The output: "folder" (safetensors and a configuration), "safetensors" or "pickle"."""

    takes: tuple[str, ...]
    """The names of those `Options` that only some dialects take when they write."""

    def recognise(self, source: Source) -> str | None:
        """Return the reason why the file is of this dialect, by its content, never its name; None if it is not."""

    def read(self, source: Source) -> Foreign:
        """Return the contents of the file, without the values of its tensors and without torch."""

    def spell(self, place: TargetModule) -> Sequence[str]:
        """Return the names that the dialect may give to this weight's module; none if it cannot name the weight."""

    def refusal(self, layer: str, kind: str, *, grouped: bool = False) -> str | None:
        """Return the reason why the dialect cannot hold this kind on this layer type; None if it can."""

    def factors(self, layer: ForeignLayer, values: Values, place: TargetModule, options: Options) -> Factors:
        """Turn a layer's tensors, by slot, into factors of the weight; the layer has an alpha by now.

        Raises:
            AdapterError: they cannot be turned; the errors of all layers are listed.
        """

    def encode(self, adapter: Adapter, context: Context) -> Encoded:
        """Lay the adapter out as the tool does.

        Args:
            adapter: to be written.
            network: the base's network, if it is known; its weights mean nothing.
            state: the base's own tensors, if they are known.
            options: given by the user.

        Raises:
            AdapterError: the tool cannot hold the adapter, or would use it wrongly; all reasons are listed.
        """
