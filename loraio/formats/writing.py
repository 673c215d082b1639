"""Collect the tensors of an adapter, and the fate of each, while a dialect writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter
from loraio.errors import AdapterError
from loraio.formats.exported import carried_lines, exported_document
from loraio.formats.foreign import Encoded, Options
from loraio.formats.report import Line, Report

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(kw_only=True)
class Writing:
    """An adapter on its way into the file of another tool.

    Attributes:
        tool: the name of the tool in messages.
        adapter: to be written.
        network: the base's network, if it is known.
        state: the base's own tensors, if they are known.
        options: given by the user.
        tensors: by their names in the file.
        lines: of the report.
        problems: reasons why the tool cannot hold the adapter.
    """

    tool: str
    adapter: Adapter
    network: nn.Module | None = None
    state: Mapping[str, Tensor] | None = None
    options: Options = field(default_factory=Options)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse the adapter if there are problems.

        Raises:
            AdapterError: with all of them.
        """
        if self.problems:
            raise AdapterError(
                f"{self.tool} cannot hold this adapter, or would use it wrongly",
                problems=self.problems,
                hint="loraio merge puts it into the base for good",
            )

    def in_safetensors(self, metadata: Mapping[str, str], *, config: Mapping[str, Any] | None = None) -> Encoded:
        """Return the contents of a safetensors file, with our own metadata in its header."""
        return Encoded(
            tensors=dict(sorted(self.tensors.items())),
            report=Report.of([*self.lines, *carried_lines(self.adapter)]),
            document=exported_document(self.adapter),
            metadata=metadata,
            config=config,
        )
