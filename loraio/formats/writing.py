"""Collect the tensors of an adapter, and the fate of each, while a dialect writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraio.adapter import Adapter, Target
from loraio.bases.targets import TargetModule, target_modules
from loraio.errors import AdapterError
from loraio.formats.exported import carried_lines, exported_document
from loraio.formats.foreign import Context, Encoded
from loraio.formats.report import Line, Report, tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(kw_only=True)
class Writing:
    """An adapter on its way into the file of another tool.

    Attributes:
        tool: the name of the tool in messages.
        adapter: to be written.
        context: the base, as far as it is known, and the user's options.
        tensors: by their names in the file.
        lines: of the report.
        problems: reasons why the tool cannot hold the adapter.
        needs: the reason why the tool needs the network; empty if it does not.
    """

    tool: str
    adapter: Adapter
    context: Context = field(default_factory=Context)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    needs: str = ""

    @cached_property
    def net(self) -> nn.Module:
        """The network.

        Raises:
            AdapterError: it is not known.
        """
        if self.context.network is None:
            raise AdapterError(f"{self.needs}, which only the network says", hint="--base BASE, or --model NAME")
        return self.context.network

    @cached_property
    def places(self) -> dict[str, TargetModule]:
        """The weights of the network that an adapter may have."""
        return target_modules(self.net)

    def place(self, name: str, target: Target) -> TargetModule | None:
        """Return the weight of a target; None if the network has no such layer, which is a problem."""
        place = self.places.get(name)
        if place is None or (place.layer.name, place.groups) != (target.layer, target.groups):
            self.problems.append(f"{name!r} is no {target.layer} with groups={target.groups} of the network")
            return None
        return place

    def carry_whole(self, name: str, *keys: str) -> None:
        """Add a tensor that replaces one of the base's, under these keys."""
        whole = self.adapter.whole[name]
        self.tensors |= dict.fromkeys(keys, self.adapter.tensors[name])
        resized = whole.shape != whole.base_shape
        self.lines += tensors(
            [name], "carried", f"the base for {self.tool} needs its shape {whole.shape}" if resized else ""
        )

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
