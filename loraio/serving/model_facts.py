"""Facts that a bank remembers of a model for as long as the model is unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraio.bases.identity import BaseIdentity, identity_of
from loraio.bases.targets import TargetModule, target_modules
from loraio.bases.writes import WeakModelMark
from loraio.errors import StateError
from loraio.live.attachment import attach
from loraio.live.base_state import base_state_dict, refuse_attached
from loraio.serving.layer_route import LayerRoute
from loraio.serving.residents import Pick, Version


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base of a model. Nothing here refers to the model itself, which that would keep alive.

    Attributes:
        mark: of the model; the facts hold as long as it is unchanged.
        identity: of the model.
        forgotten: how often that had been made to forget.
        digest: of the state dict.
        devices: of each target.
        targets: the fields of each `TargetModule` except its module.
    """

    mark: WeakModelMark
    identity: BaseIdentity
    forgotten: int
    digest: str
    devices: tuple[torch.device, ...]
    targets: Mapping[str, Mapping[str, Any]]

    @property
    def version(self) -> tuple[str, tuple[torch.device, ...]]:
        """Equal as long as folded weights hold."""
        return self.digest, self.devices

    def target_modules(self, modules: Mapping[str, nn.Module]) -> dict[str, TargetModule]:
        """Return the targets of the model, given its modules by path."""
        return {name: TargetModule(module=modules[at["path"]], **at) for name, at in self.targets.items()}


class ModelFacts:
    """One model: its base, the adapters that were found to fit, and the route of each form of batch.

    Attributes:
        routes: by the targets and the form of a batch; None where the layer route is not possible.
    """

    def __init__(self) -> None:
        self.routes: dict[tuple[Any, ...], LayerRoute | None] = {}
        self._fitting: dict[str, tuple[Version, str]] = {}
        self._base: BaseFacts | None = None

    def base(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> BaseFacts:
        """Return the facts of the base, looked up again if the model may have changed.

        Args:
            model: the model.
            modules: its modules by path, under every path that they have.

        Raises:
            StateError: the model carries an adapter or is in training mode.
        """
        base = self._base
        if base is not None and (base.identity.forgotten != base.forgotten or not base.mark.unchanged(modules)):
            base = None
        if base is None:
            refuse_attached(model)
        if any(module.training for module in modules.values()):
            raise StateError("the model is in training mode", hint="model.eval()")
        if base is None:
            base = self._base = _look_up(model, modules)
        return base

    def check_fit(self, model: nn.Module, pick: Pick, digest: str) -> None:
        """Refuse an adapter that does not belong to the model; once for each version of adapter and base."""
        if self._fitting.get(pick.name) != (pick.version, digest):
            attach(model, pick.adapter).detach()
            self._fitting[pick.name] = (pick.version, digest)


def _look_up(model: nn.Module, modules: Mapping[str, nn.Module]) -> BaseFacts:
    identity, state = identity_of(model), base_state_dict(model)
    forgotten, mark = identity.forgotten, WeakModelMark(modules, state)  # before the numbers are read
    found = target_modules(model)
    return BaseFacts(
        mark=mark,
        identity=identity,
        forgotten=forgotten,
        digest=identity.state_sha256(state, identity.digests(state)),
        devices=tuple(at.weight.device for at in found.values()),
        targets={
            name: {"name": name, "path": at.path, "parameter": at.parameter, "layer": at.layer}
            for name, at in found.items()
        },
    )
