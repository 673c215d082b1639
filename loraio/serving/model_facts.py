"""Facts that a bank remembers of a model, and the state of its base at the start of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraio.bases.identity import identity_of
from loraio.bases.targets import TargetModule, target_modules
from loraio.errors import StateError
from loraio.live.attachment import attach
from loraio.live.base_state import base_state_dict, refuse_attached
from loraio.serving.layer_route import LayerRoute
from loraio.serving.residents import Pick, Version


@dataclass(frozen=True, slots=True)
class BaseNow:
    """The base of a model now.

    Attributes:
        digest: of the state dict.
        targets: the weights that an adapter can change, by name.
    """

    digest: str
    targets: Mapping[str, TargetModule]

    @classmethod
    def of(cls, model: nn.Module) -> BaseNow:
        """Look at a model.

        Raises:
            StateError: it carries an adapter or is in training mode.
        """
        refuse_attached(model)
        if any(module.training for module in model.modules()):
            raise StateError("the model is in training mode", hint="model.eval()")
        identity, state = identity_of(model), base_state_dict(model)
        return cls(identity.state_sha256(state, identity.digests(state)), target_modules(model))

    @property
    def version(self) -> tuple[str, tuple[torch.device, ...]]:
        """Equal as long as folded weights hold."""
        return self.digest, tuple(target.weight.device for target in self.targets.values())


class ModelFacts:
    """The routes of a model's batches, and the adapters that were found to fit it.

    Nothing in it refers to the model, which that would keep alive.

    Attributes:
        routes: by the targets and the form of a batch; None where the layer route is not possible.
    """

    def __init__(self) -> None:
        self.routes: dict[tuple[Any, ...], LayerRoute | None] = {}
        self._fitting: dict[str, tuple[Version, str]] = {}

    def check_fit(self, model: nn.Module, pick: Pick, digest: str) -> None:
        """Refuse an adapter that does not belong to the model; once for each version of adapter and base."""
        if self._fitting.get(pick.name) != (pick.version, digest):
            attach(model, pick.adapter).detach()
            self._fitting[pick.name] = (pick.version, digest)
