"""Digests of base models."""

from __future__ import annotations

import hashlib

import torch

from loraio.identity import digests, state_sha256, tensor_sha256


def test_a_tensors_digest_is_that_of_its_bytes_in_c_order() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert tensor_sha256(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert tensor_sha256(tensor.T) == hashlib.sha256(tensor.T.numpy().tobytes()).hexdigest()
    assert tensor_sha256(tensor.T) != tensor_sha256(tensor)


def test_scalars_empty_and_half_precision_tensors_have_digests() -> None:
    assert tensor_sha256(torch.tensor(7)) == hashlib.sha256((7).to_bytes(8, "little")).hexdigest()
    assert tensor_sha256(torch.empty(0, 3)) == hashlib.sha256(b"").hexdigest()
    assert tensor_sha256(torch.ones(1, dtype=torch.bfloat16)) == hashlib.sha256(b"\x80\x3f").hexdigest()


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
