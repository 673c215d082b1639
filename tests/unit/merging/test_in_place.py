"""A merge in place writes the bits of a merge into new tensors: all of them or none, after any exception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import outputs, small_adapter, small_adapters, small_base
from strategies import states_and_adapters
from torch import Tensor, nn

import loraio
from loraio.adapter import folding
from loraio.errors import AdapterError, BaseMismatchError, StateError
from loraio.files.tensors import tensor_bytes


def copied(state: State) -> State:
    """The same in other memory, strides kept."""
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in state.items()}


def same_bits(a: State, b: State) -> bool:
    return list(a) == list(b) and all(tensor_bytes(a[name]).equal(tensor_bytes(b[name])) for name in a)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices of small weights."""
    monkeypatch.setattr(folding, "BLOCK", 8)


@pytest.fixture
def model() -> nn.Module:
    return small_base()


@pytest.fixture
def adapter(model: nn.Module) -> loraio.Adapter:
    return small_adapters(model)["lora"]


@given(states_and_adapters(), st.booleans(), st.sampled_from([1.0, 0.0, -0.7, 2]), st.sampled_from([8, 2**18]))
def test_the_bits_are_those_of_a_merge_into_new_tensors(
    case: tuple[State, loraio.Adapter], exact: bool, strength: float, block: int
) -> None:
    state, adapter = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "BLOCK", block)
        expected = loraio.merge(state, adapter, strength, exact=exact)
        mine = copied(state)
        merged = loraio.merge(mine, adapter, strength, exact=exact, in_place=True)
    assert same_bits(merged, expected)
    assert all(merged[name] is mine[name] for name in state)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
def test_the_model_is_the_merged_one_with_its_own_parameters(model: nn.Module, kind: str, exact: bool) -> None:
    adapter = small_adapters(model)[kind]
    if kind == "head":  # of as many outputs as the base's
        whole = {name: replace(each, shape=each.base_shape) for name, each in adapter.whole.items()}
        tensors = {name: torch.full_like(model.state_dict()[name], 0.25) for name in whole}
        adapter = replace(adapter, whole=whole, tensors=tensors)
    parameters = dict(model.named_parameters())
    expected = loraio.merge(model.state_dict(), adapter, 0.5, exact=exact)
    merged = loraio.merge(model.state_dict(), adapter, 0.5, exact=exact, in_place=True)
    assert same_bits(dict(model.state_dict()), expected)
    assert same_bits(merged, expected)
    assert dict(model.named_parameters()).items() == parameters.items()
    with pytest.raises(BaseMismatchError):  # the second time it is no longer the base
        loraio.merge(model.state_dict(), adapter, 0.5, in_place=True)
    assert same_bits(dict(model.state_dict()), expected)


@pytest.mark.usefixtures("narrow")
def test_memory_in_another_order_and_modes_of_torch_change_nothing() -> None:
    model = small_base().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adapter = small_adapters(model)["lora"]
    expected = loraio.merge(model.state_dict(), adapter)
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        loraio.merge(model.state_dict(), adapter, in_place=True)
    assert same_bits(dict(model.state_dict()), expected)
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides


def test_an_adapter_that_is_attached_elsewhere_sees_that_its_base_changed(model: nn.Module) -> None:
    adapters = small_adapters(model)
    with loraio.attach(model, adapters["lora"]) as live:
        before = outputs(model)
        loraio.merge(loraio.base_state_dict(model), adapters["lora"], in_place=True)
        assert not outputs(model).equal(before)  # it is on top of itself
        with pytest.raises(BaseMismatchError):
            live.swap(adapters["other"])
    assert outputs(model).equal(before)


class Interrupted(BaseException):
    """An exception of the test."""


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("after", [False, True], ids=["before the sum", "after the sum"])
def test_an_exception_leaves_all_of_it_or_nothing(
    model: nn.Module, kind: str, exact: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = small_adapter(model, 3, "conv", "fc", rank=2, kind=kind)
    base = copied(model.state_dict())
    expected = loraio.merge(base, adapter, exact=exact)
    real, calls, at = folding.SlicedFold._fold, 0, 0

    def fold(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise Interrupted
        real(self, *arguments)
        if calls == at and after:
            raise Interrupted

    monkeypatch.setattr(folding.SlicedFold, "_fold", fold)
    loraio.merge(copied(base), adapter, exact=exact, in_place=True)
    count, seen = calls, set()
    assert count > 5
    for at in range(1, count + 1):  # noqa: B007  # fold reads it
        calls, mine = 0, copied(base)
        with pytest.raises(Interrupted):
            loraio.merge(mine, adapter, exact=exact, in_place=True)
        done, untouched = same_bits(mine, expected), same_bits(mine, base)
        assert done != untouched
        seen.add(done)
    assert True in seen


def test_what_always_fails_is_raised_and_not_tried_forever(
    model: nn.Module, adapter: loraio.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calls = copied(model.state_dict()), 0
    real = folding.SlicedFold._fold

    def fold(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("no more")
        real(self, *arguments)

    monkeypatch.setattr(folding.SlicedFold, "_fold", fold)
    with pytest.raises(RuntimeError, match="no more"):
        loraio.merge(base, adapter, in_place=True)
    assert calls < 5


class Special(Tensor):
    """A subclass of a tensor."""


def part_of_another(old: Tensor) -> State:
    twice = torch.cat([old.flatten(), old.flatten()])
    return {"all": twice, "conv.weight": twice[: old.numel()].view(old.shape)}


UNWRITABLE: dict[str, Callable[[Tensor], State]] = {
    "'conv.weight' shares memory with 'twin'": lambda old: {"twin": old},
    "'conv.weight' shares memory with 'all'": part_of_another,
    "it was made in inference mode": lambda old: {"conv.weight": torch.inference_mode()(old.clone)()},
    "its memory has holes": lambda old: {"conv.weight": torch.stack([old, old], dim=-1)[..., 0]},
    "it is a Special": lambda old: {"conv.weight": old.as_subclass(Special)},
}
"""Tensors that cannot be written over, by the reason that is given."""


@pytest.mark.parametrize("words", UNWRITABLE)
def test_what_cannot_be_written_over_is_refused_by_name(model: nn.Module, adapter: loraio.Adapter, words: str) -> None:
    state = copied(model.state_dict())
    state |= UNWRITABLE[words](state["conv.weight"])
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(StateError) as error:
        loraio.merge(state, adapter, in_place=True, allow_base_mismatch=True)
    assert "'conv.weight'" in str(error.value)
    assert words in str(error.value)
    assert same_bits({name: tensor.clone() for name, tensor in state.items()}, before)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_sparse_tensor_has_no_place_in_a_base(model: nn.Module, adapter: loraio.Adapter, in_place: bool) -> None:
    state = copied(model.state_dict())
    before = copied(state)
    state["fc.weight"] = state["fc.weight"].to_sparse()
    with pytest.raises(StateError, match=r"'fc\.weight' is a tensor of layout torch\.sparse_coo"):
        loraio.merge(state, adapter, in_place=in_place, allow_base_mismatch=True)
    assert state["conv.weight"].equal(before["conv.weight"])
    assert state["fc.weight"].to_dense().equal(before["fc.weight"])


def test_what_safetensors_has_read_can_be_written_over(
    model: nn.Module, adapter: loraio.Adapter, tmp_path: Path
) -> None:
    expected = loraio.merge(model.state_dict(), adapter)
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    state = load_file(tmp_path / "base.safetensors")
    loraio.merge(state, adapter, in_place=True)
    assert all(state[name].equal(tensor) for name, tensor in expected.items())
    again = load_file(tmp_path / "base.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_a_head_of_another_size_and_an_overflow_are_refused_before_anything_is_written(model: nn.Module) -> None:
    adapters = small_adapters(model)
    state = copied(model.state_dict())
    before = copied(state)
    with pytest.raises(StateError, match="another shape") as error:
        loraio.merge(state, adapters["head"], in_place=True)
    assert "fc.weight" in str(error.value)
    with pytest.raises(AdapterError, match="overflows"):
        loraio.merge(state, adapters["lora"], 1e39, in_place=True)
    assert same_bits(state, before)
