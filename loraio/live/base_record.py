"""Tell which tensors of a base were changed while an adapter was trained on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from loraio.bases.identity import digests, identity_of
from loraio.bases.writes import version_of
from loraio.live.base_state import base_state_dict


class _Mark(NamedTuple):
    """The version counter of a tensor, its dtype and its digest."""

    version: int
    dtype: torch.dtype
    sha256: str


class BaseRecord:
    """The tensors of a base as they are now.

    Args:
        model: the model; None records nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        state = {} if model is None else base_state_dict(model)
        known = {} if model is None else identity_of(model).digests(state)
        self._marks = {name: _Mark(version_of(tensor), tensor.dtype, known[name]) for name, tensor in state.items()}

    def changed(self) -> list[str]:
        """Return names of tensors that have other bytes now because of writes; a cast or a move alone is no write.

        The version counter does not tell everything: fused optimizers do not raise it.
        """
        state = {} if self._model is None else base_state_dict(self._model)
        suspects = {
            name: tensor
            for name, tensor in state.items()
            if not tensor.is_meta
            and (tensor.dtype == self._marks[name].dtype or version_of(tensor) != self._marks[name].version)
        }
        return [name for name, digest in digests(suspects).items() if digest != self._marks[name].sha256]
