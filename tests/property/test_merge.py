"""A merged weight is the exact sum, rounded once; everything else is left alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import exact_fold, nearest_float, states_and_adapters
from torch import Tensor

import loraio
from loraio.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.rounding import round_once
from loraio.bases.models import write_base

ROUNDED = (torch.float32, torch.float16, torch.bfloat16)  # float64 has no wider dtype to sum in

MERGES = settings(max_examples=60, deadline=None)
strengths = st.floats(-4, 4, width=32) | st.sampled_from([1.0, 0.0, -1.0, 0.5])


def unsure(adapter: Adapter, name: str, weight: Tensor, strength: float) -> list[Fraction]:
    """How far a float64 sum may be from the exact one: about 2**-50 of its terms, the kind's own bound."""
    target = adapter.targets[name]
    matrix = LAYER_TYPES[target.layer].to_matrix(weight.double(), target.groups).numpy()
    factors = {short: factor.double().numpy() for short, factor in adapter.factors_of(name).items()}
    _, bound = KINDS[target.kind].reference(matrix, factors, scale=target.scale, strength=strength)
    return [Fraction(float(value)) for value in bound.ravel()]


@MERGES
@given(states_and_adapters(kinds=("lora",)), strengths)
def test_every_folded_weight_is_the_exact_sum_rounded_to_nearest(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float
) -> None:
    state, adapter = drawn
    merged = loraio.merge(state, adapter, strength)
    for name, target in adapter.targets.items():
        weight, found = state[name], merged[name]
        assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
        factors = adapter.factors_of(name)
        layer = LAYER_TYPES[target.layer]
        matrix, found = (layer.to_matrix(tensor, target.groups) for tensor in (weight, found))
        exact = exact_fold(matrix, factors["lora_A"], factors["lora_B"], target.scale * strength)
        slack = unsure(adapter, name, weight, strength)
        for value, sum_, doubt in zip(found.double().flatten().tolist(), exact, slack, strict=True):
            if weight.dtype == torch.float64:
                assert abs(Fraction(value) - sum_) <= doubt
            else:  # a float64 sum within its doubt of a tie may fall on either side: one weight in 10**8
                assert nearest_float(sum_ - doubt, weight.dtype) <= value <= nearest_float(sum_ + doubt, weight.dtype)


@MERGES
@given(states_and_adapters(), strengths, st.integers(1, 3))
def test_a_merge_of_files_writes_what_a_merge_in_memory_gives(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float, workers: int
) -> None:
    state, adapter = drawn
    with TemporaryDirectory() as name:
        base, path, output = (Path(name, f"{word}.safetensors") for word in ("base", "adapter", "merged"))
        write_base(state, base, network=None)
        loraio.save(adapter, path)
        loraio.merge_file(base, path, output, strength=strength, workers=workers, allow_noop=True)
        receipt = loraio.read_base(output).document["merged"]
        merged = loraio.merge(state, adapter, strength)
        write_base(merged, path, network=adapter.base.network, merged=receipt, overwrite=True)
        assert output.read_bytes() == path.read_bytes()


@MERGES
@given(states_and_adapters(), strengths)
def test_a_merge_of_any_kind_is_verified_and_an_unmerged_state_is_not(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float
) -> None:
    state, adapter = drawn
    merged = loraio.merge(state, adapter, strength)
    assert loraio.verify_weights(state, adapter, merged, strength).ok
    changed = [state[name].dtype for name in adapter.targets if not merged[name].equal(state[name])]
    if not changed:
        assert loraio.verify_weights(state, adapter, state, strength).ok
    elif any(dtype != torch.float64 for dtype in changed):  # a change of float64 can be within the reference's doubt
        assert not loraio.verify_weights(state, adapter, state, strength).ok


@MERGES
@given(states_and_adapters(), strengths)
def test_what_is_no_target_is_the_same_object_and_the_base_is_not_written_to(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float
) -> None:
    state, adapter = drawn
    before = {name: tensor.clone() for name, tensor in state.items()}
    merged = loraio.merge(state, adapter, strength)
    assert list(merged) == list(state)
    for name, tensor in state.items():
        assert tensor.equal(before[name])
        assert (merged[name] is tensor) == (name not in adapter.targets)


@MERGES
@given(states_and_adapters())
def test_a_strength_of_zero_gives_the_bits_of_the_base(drawn: tuple[dict[str, Tensor], Adapter]) -> None:
    state, adapter = drawn
    merged = loraio.merge(state, adapter, 0.0)
    for name in adapter.targets:
        assert merged[name].view(torch.uint8).equal(state[name].view(torch.uint8))


doubles = st.floats(allow_nan=False) | st.floats(-(2.0**-120), 2.0**-120) | st.floats(-70000, 70000)


@settings(max_examples=300, deadline=None)
@given(doubles, st.sampled_from(ROUNDED))
def test_rounding_gives_the_nearest_number(value: float, dtype: torch.dtype) -> None:
    found = round_once(torch.tensor([value], dtype=torch.float64), dtype).item()
    if value in (float("inf"), float("-inf")):
        assert found == value
    else:
        assert found == nearest_float(Fraction(value), dtype)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**16 - 1), st.sampled_from([-1, 0, 1]), st.integers(20, 40), st.sampled_from(ROUNDED[1:]))
def test_rounding_is_right_at_and_beside_every_tie(bits: int, side: int, hair: int, dtype: torch.dtype) -> None:
    pair = torch.tensor([bits, bits + 1], dtype=torch.int32).to(torch.int16).view(dtype).double()
    if pair.isfinite().all():
        low, high = pair.tolist()
        value = (low + high) / 2 * (1 + side * 2.0**-hair)
        found = round_once(torch.tensor([value], dtype=torch.float64), dtype).item()
        assert found == nearest_float(Fraction(value), dtype)
