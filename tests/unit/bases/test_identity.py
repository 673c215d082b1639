"""Digests of base models."""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

import loraio
from loraio.bases.identity import BaseIdentity, digests, identity_of, state_sha256
from loraio.bases.writes import SAMPLED
from loraio.errors import BaseMismatchError, StateError
from loraio.files.tensors import tensor_sha256

TURNED = torch.arange(6, dtype=torch.float32).reshape(2, 3).T


@pytest.mark.parametrize(
    ("tensor", "content"),
    [
        (TURNED, TURNED.numpy().tobytes()),
        (torch.tensor(7), (7).to_bytes(8, "little")),
        (torch.empty(0, 3), b""),
        (torch.ones(1, dtype=torch.bfloat16), b"\x80\x3f"),
    ],
)
def test_a_tensors_digest_is_that_of_its_bytes_in_c_order(tensor: torch.Tensor, content: bytes) -> None:
    assert tensor_sha256(tensor) == hashlib.sha256(content).hexdigest()


def test_the_digest_of_a_state_dict_follows_its_specification() -> None:
    state = {"b": torch.zeros(2), "a\u00e9\n": torch.tensor(1, dtype=torch.int64)}
    lines = (
        b'["a\\u00e9\\n","I64",[],"' + hashlib.sha256((1).to_bytes(8, "little")).hexdigest().encode() + b'"]\n'
        b'["b","F32",[2],"' + hashlib.sha256(bytes(8)).hexdigest().encode() + b'"]\n'
    )
    assert state_sha256(state) == hashlib.sha256(lines).hexdigest()
    assert state_sha256(dict(reversed(state.items()))) == state_sha256(state)
    assert state_sha256(state, digests(state)) == state_sha256(state)


def test_name_dtype_shape_and_every_bit_count() -> None:
    variants = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.tensor([0.0, -0.0])},
        {"a": torch.zeros(2), "c": torch.zeros(0)},
    ]
    assert len({state_sha256(state) for state in variants}) == len(variants)


def stepped(tensor: torch.Tensor) -> None:
    parameter = nn.Parameter(tensor)  # shares memory and version counter
    parameter.grad = torch.ones_like(tensor)
    torch.optim.AdamW([parameter], lr=0.1).step()


def written_unseen(tensor: torch.Tensor) -> None:
    with _unsafe_preserve_version_counter(tensor):
        tensor.mul_(2)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda tensor: tensor.add_(1),
    "a step of an optimizer": stepped,
    "other data": lambda tensor: setattr(tensor, "data", tensor.data + 1),
    "by NumPy": lambda tensor: tensor.numpy().__imul__(2),
    "through data": lambda tensor: tensor.data.mul_(2),
    "past the version counter": written_unseen,
    "one number": lambda tensor: tensor.view(-1)[123].add_(1),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_is_hashed_once_and_again_after_it_was_written_to(
    name: str, turned: bool, hashed: list[torch.Tensor]
) -> None:
    weight = torch.randn(64, 40)
    state = {"a": weight.T if turned else weight, "b": torch.randn(5), "c": torch.tensor(3)}
    known = BaseIdentity()
    assert known.digests(state) == known.digests(state) == digests(state)
    assert len(hashed) == 3 + 3
    hashed.clear()
    WRITES[name](weight)
    state["a"] = weight.T if turned else weight
    assert known.digests(state)["a"] == tensor_sha256(state["a"])
    assert len(hashed) == 1


def test_a_number_written_past_torch_may_go_unseen_until_it_is_forgotten(hashed: list[torch.Tensor]) -> None:
    """The limit that the documentation names."""
    state = {"a": torch.zeros(10 * SAMPLED), "small": torch.zeros(SAMPLED)}
    known = BaseIdentity()
    known.digests(state)
    hashed.clear()
    state["a"].data[5] = 1
    known.digests(state)
    assert hashed == []
    known.forget()
    assert known.digests(state) == digests(state)
    for place in range(SAMPLED):
        hashed.clear()
        state["small"].data[place] += 1
        known.digests(state)
        assert len(hashed) == 1
    state["a"].data[100 : 100 + 10] += 1  # a tenth of a percent of it, but as many neighbours as one of its samples has
    assert known.digests(state)["a"] == tensor_sha256(state["a"])


def test_memory_that_is_used_again_is_not_taken_for_the_old_tensor() -> None:
    known = BaseIdentity()
    for value in range(50):  # each dies before the next is made, and the allocator likes to give the same place
        state = {"a": torch.full((100, 100), float(value))}
        assert known.digests(state) == digests(state)
        del state


def test_names_come_and_go() -> None:
    known = BaseIdentity()
    a, b = torch.zeros(2), torch.ones(2)
    assert known.digests({"a": a, "b": b}) == digests({"a": a, "b": b})
    assert known.digests({"b": a}) == digests({"b": a})
    assert known.digests({"b": b, "a": a}) == digests({"a": a, "b": b})
    state = {"a": a, "b": b}
    assert known.state_sha256(state, known.digests(state)) == state_sha256(state)
    assert known.state_sha256({"a": a}, {"a": "0" * 64}) == state_sha256({"a": a}, {"a": "0" * 64})


def test_tensors_that_cannot_be_compared_are_hashed_every_time(hashed: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        made_there = torch.zeros(2)
    known = BaseIdentity()
    for tensor in (made_there, torch.rand(4, 4)[:, ::2]):
        hashed.clear()
        assert known.digests({"a": tensor}) == known.digests({"a": tensor})
        assert len(hashed) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [(torch.zeros(2, device="meta"), "meta device"), (3, "only tensors"), (torch.eye(2).to_sparse(), "only dense")],
)
def test_entries_without_an_identity_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        BaseIdentity().digests({"a": entry})


def test_a_model_has_one_identity_and_a_copy_its_own_and_they_go_with_it() -> None:
    model = nn.Linear(2, 2)
    known = identity_of(model)
    assert identity_of(model) is known
    assert identity_of(copy.deepcopy(model)) is not known
    assert vars(model).keys() == vars(nn.Linear(2, 2)).keys()
    gone = weakref.ref(known)
    del model, known
    gc.collect()
    assert gone() is None


def test_swap_hashes_nothing_while_the_base_stays_and_notices_when_it_changes(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, hashed: list[torch.Tensor]
) -> None:
    live = loraio.attach(base, three)
    assert len(hashed) == 8
    hashed.clear()
    for adapter in (seven, three, seven):
        live.swap(adapter)
    assert hashed == []
    with torch.no_grad():
        base.fc.bias += 1  # type: ignore[operator,union-attr]
    with pytest.raises(BaseMismatchError, match="other tensors of the network differ"):
        live.swap(three)
    assert len(hashed) == 1
    assert live.adapter == seven
    live.detach()
