"""Make random moves on a live model: illegal ones raise and change nothing, legal ones have their effect.

The environment variable ``MOVES`` sets the number of moves, 400 by default; with it a series has up to 100 moves.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small import Small, given, outputs, small_adapter, small_adapters, small_base
from torch import Tensor

import loraio
from loraio.errors import AdapterError, BaseMismatchError, ConfigError, StateError
from loraio.files.tensors import tensor_bytes

MOVES = int(os.environ.get("MOVES", "400"))
IN_A_ROW = 100 if "MOVES" in os.environ else 25

NAMES = st.sampled_from(["lora", "other", "dora", "head"])
STRENGTHS = st.sampled_from([0.0, 0.5, 1.0, -2.0, 3])


def reference(base: dict[str, Tensor], adapter: loraio.Adapter, strength: float) -> dict[str, Tensor]:
    """Return the adapted state dict, computed by NumPy in float64 and rounded at the end."""
    state = dict(base)
    for name, target in adapter.targets.items():
        weight = base[name].double().numpy().reshape(len(base[name]), -1)
        factors = {short: factor.double().numpy() for short, factor in adapter.factors_of(name).items()}
        new = weight + target.alpha / target.rank * (factors["lora_B"] @ factors["lora_A"])
        if target.kind == "dora":
            new *= (factors["magnitude"] / np.sqrt((new**2).sum(1)))[:, None]
        new = weight + strength * (new - weight)
        state[name] = torch.from_numpy(new).float().reshape(base[name].shape)
    return state | adapter.tensors


class LiveModel(RuleBasedStateMachine):
    """A model, its handle, and the expected state of both."""

    @initialize()
    def build(self) -> None:
        """Make a base and adapters for it."""
        self.model = small_base()
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.base = dict(self.original)
        self.adapters = small_adapters(self.model)
        stranger = Small().eval()
        self.adapters["foreign"] = small_adapter(stranger, 5, "conv", rank=1)
        self.live: loraio.Attachment | None = None
        self.adapter: loraio.Adapter | None = None
        self.strength = 1.0
        self.enabled = True

    @property
    def attached(self) -> bool:
        """True while an adapter is on the model."""
        return self.adapter is not None

    @property
    def fits(self) -> bool:
        """True while the base is the one that the adapters were made for."""
        return all(self.base[name].equal(tensor) for name, tensor in self.original.items())

    def refused(self, error: type[Exception], move: Any, *arguments: Any, **options: Any) -> None:
        """Make an illegal move; the invariants check that it changed nothing."""
        with pytest.raises(error):
            move(*arguments, **options)

    @rule(name=NAMES | st.just("foreign"), strength=STRENGTHS, trainable=st.booleans(), bad=st.booleans())
    def attach(self, name: str, strength: float, trainable: bool, bad: bool) -> None:
        """Attach to a base that fits or not, or that carries an adapter already."""
        adapter = self.adapters[name]
        options: dict[str, Any] = {"trainable": trainable}
        if bad:
            self.refused(ConfigError, loraio.attach, self.model, adapter, float("nan"), **options)
        elif self.attached:
            self.refused(StateError, loraio.attach, self.model, adapter, strength, **options)
        elif name == "foreign" or not self.fits:
            self.refused(BaseMismatchError, loraio.attach, self.model, adapter, strength, **options)
        else:
            self.live = loraio.attach(self.model, adapter, strength, **options)
            self.adapter, self.strength, self.enabled = adapter, float(strength), True

    @precondition(lambda self: self.live is not None)
    @rule(name=NAMES | st.just("foreign"))
    def swap(self, name: str) -> None:
        """Swap to an adapter that fits or not, by a handle that is attached, detached or training."""
        assert self.live is not None
        adapter = self.adapters[name]
        if not self.attached or self.live.trainable:
            self.refused(StateError, self.live.swap, adapter)
        elif name == "foreign" or not self.fits:
            self.refused(BaseMismatchError, self.live.swap, adapter)
        else:
            self.live.swap(adapter)
            self.adapter = adapter

    @precondition(lambda self: self.live is not None)
    @rule(value=STRENGTHS | st.sampled_from([float("inf"), "1", None, True, 1e60, -1e60]))
    def set_strength(self, value: Any) -> None:
        """Set a number, one at which weights overflow, or something else."""
        if not isinstance(value, int | float) or value is True or value == float("inf"):
            self.refused(ConfigError, setattr, self.live, "strength", value)
        elif not self.attached:
            self.refused(StateError, setattr, self.live, "strength", value)
        elif abs(value) > 1e38:
            self.refused(AdapterError, setattr, self.live, "strength", value)
        else:
            self.live.strength = value  # type: ignore[union-attr]
            self.strength = float(value)

    @precondition(lambda self: self.live is not None)
    @rule(enabled=st.booleans())
    def switch(self, enabled: bool) -> None:
        """Enable or disable, in either state."""
        move = self.live.enable if enabled else self.live.disable  # type: ignore[union-attr]
        if not self.attached:
            self.refused(StateError, move)
        else:
            move()
            self.enabled = enabled

    @precondition(lambda self: self.live is not None)
    @rule()
    def refresh(self) -> None:
        """Compute everything anew."""
        assert self.live is not None
        if self.attached:
            self.live.refresh()
        else:
            self.refused(StateError, self.live.refresh)

    @precondition(lambda self: self.live is not None)
    @rule()
    def detach(self) -> None:
        """Detach, also when detached already."""
        assert self.live is not None
        if self.attached:
            self.live.detach()
            self.adapter = None
        else:
            self.refused(StateError, self.live.detach)

    @rule(name=NAMES, strength=STRENGTHS | st.just(1e60))
    def merge(self, name: str, strength: float) -> None:
        """Merge the base below, and leave it alone."""
        state, adapter = loraio.base_state_dict(self.model), self.adapters[name]
        if not self.fits:
            self.refused(BaseMismatchError, loraio.merge, state, adapter, strength)
        elif strength > 1e38:
            self.refused(AdapterError, loraio.merge, state, adapter, strength)
        else:
            merged = loraio.merge(state, adapter, strength)
            for key, tensor in reference(self.base, adapter, strength).items():
                torch.testing.assert_close(merged[key], tensor)

    @rule()
    def deep_copy(self) -> None:
        """Go on with a copy, and take the adapter off the model that it was copied from."""
        model, self.model = self.model, copy.deepcopy(self.model)
        if self.attached:
            before = outputs(model)
            loraio.attachment_of(model).detach()
            assert outputs(self.model).equal(before)
            self.live = loraio.attachment_of(self.model)

    @precondition(lambda self: self.attached and self.live.trainable and self.enabled)
    @rule(fused=st.booleans())
    def train_step(self, fused: bool) -> None:
        """Train everything that the adapter lets train."""
        assert self.live is not None
        parameters = list(self.live.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01, fused=fused)
        self.model(torch.ones(1, 1, 5, 5)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if self.fits:
            self.learned()

    def learned(self) -> None:
        """Take the trained adapter from the handle; its metadata have not changed."""
        assert self.live is not None
        found = self.live.adapter
        assert found.targets == self.adapter.targets  # type: ignore[union-attr]
        self.adapter = found

    @rule(name=st.sampled_from(["conv.weight", "conv.bias", "fc.weight", "norm.running_mean"]))
    def write(self, name: str) -> None:
        """Write in place to a tensor of the base."""
        if self.attached and self.live.trainable:  # type: ignore[union-attr]
            return  # what was learned on another base has no place in the adapter
        with torch.no_grad():
            loraio.base_state_dict(self.model)[name].add_(0.25)
        self.base = self.base | {name: self.base[name] + 0.25}

    @rule()
    def load(self) -> None:
        """Load the original base into the model as it is."""
        state = self.model.state_dict()
        places = {tensor.data_ptr(): name for name, tensor in state.items()}
        for name, tensor in loraio.base_state_dict(self.model).items():
            state[places[tensor.data_ptr()]] = self.original[name]
        self.model.load_state_dict(state)
        self.base = dict(self.original)

    @invariant()
    def model_and_handle_are_what_they_should_be(self) -> None:
        """Compare outputs, bits of the base, and properties of the handle."""
        state = loraio.base_state_dict(self.model)
        assert list(state) == list(self.base)
        assert all(tensor_bytes(tensor).equal(tensor_bytes(self.base[name])) for name, tensor in state.items())
        if not self.attached:
            assert list(self.model.state_dict()) == list(self.base)
            assert type(self.model) is Small
            assert self.live is None or not self.live.attached
        else:
            assert self.live is not None
            assert self.live.attached
            assert (self.live.strength, self.live.enabled) == (self.strength, self.enabled)
            assert self.live.adapter == self.adapter
        found = outputs(self.model)
        if not self.attached or not self.enabled:
            assert found.equal(given(self.base))
            return
        assert self.adapter is not None
        merged = loraio.merge(self.base, self.adapter, self.strength, allow_base_mismatch=True)
        assert found.equal(given(merged))
        torch.testing.assert_close(
            found, given(reference(self.base, self.adapter, self.strength)), rtol=1e-4, atol=1e-4
        )


LiveModel.TestCase.settings = settings(
    max_examples=MOVES // IN_A_ROW,
    stateful_step_count=IN_A_ROW,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLiveModel = LiveModel.TestCase
