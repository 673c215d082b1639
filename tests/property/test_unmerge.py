"""A reversible merge of any adapter into any base can be taken back, bit for bit."""

from __future__ import annotations

import bz2
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import FLOATS, seeds, states_and_adapters
from torch import Tensor

import loraio
from loraio.adapter.adapter import Adapter, parts_of
from loraio.bases.models import write_base
from loraio.errors import AdapterError, FormatError
from loraio.files.tensors import tensor_bytes
from loraio.merging.residues import LENGTH, decode, encode, residue_of, restored

RUNS = settings(max_examples=50, deadline=None)
strengths = st.floats(-4, 4, width=32) | st.sampled_from([1.0, 0.0, -1.0, 0.5, 1e-30, 1e30])
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Floats of all kinds: NaN of every payload, infinities, subnormal numbers, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    raw[torch.rand(shape, generator=generator) < 0.2] = 0
    values = raw.view(dtype).squeeze(-1)
    info = torch.finfo(dtype)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, info.max, info.min, info.tiny], dtype=dtype)
    which = torch.rand(shape, generator=generator) < 0.2
    values[which] = odd[torch.randint(0, len(odd), (int(which.sum()),), generator=generator)]
    return values


@RUNS
@given(states_and_adapters(), strengths, seeds, st.sampled_from(["fold", "fast", "any"]))
def test_any_weight_comes_back_from_anything_and_its_residue(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float, seed: int, way: str
) -> None:
    state, adapter = drawn
    for name in adapter.targets:
        for at, part in parts_of(adapter, name):
            base = any_bits(tuple(state[name][at].shape), state[name].dtype, seed)
            if way == "any":
                folded = any_bits(tuple(base.shape), base.dtype, seed + 1)
            else:
                factors = part.factors_of(name)
                folded = part.targets[name].fold(base, factors, strength=strength, exact=way == "fold")
            block = residue_of(part, base, folded, strength)
            assert tensor_bytes(restored(part, folded, strength, block, where="x")).equal(tensor_bytes(base))


@RUNS
@given(st.sampled_from(FLOATS), st.integers(1, 3000), seeds, st.floats(0, 1))
@example(torch.float64, 3000, 1, 1.0)
def test_any_two_tensors_are_told_apart_and_together(dtype: torch.dtype, count: int, seed: int, share: float) -> None:
    base, guess = (any_bits((count,), dtype, seed + number) for number in (0, 1))
    same = torch.rand(count, generator=torch.Generator().manual_seed(seed)) >= share
    guess[same] = base[same]
    block = encode(base, guess)
    assert tensor_bytes(decode(block[LENGTH:], guess, where="x")).equal(tensor_bytes(base))


@RUNS
@given(states_and_adapters(), seeds, st.integers(0, 2**16), st.integers(0, 255))
def test_a_damaged_residue_gives_some_tensor_or_an_error_of_ours(
    drawn: tuple[dict[str, Tensor], Adapter], seed: int, where: int, byte: int
) -> None:
    state, adapter = drawn
    name = next(iter(adapter.targets))
    at, part = next(parts_of(adapter, name))
    base = state[name][at]
    folded = any_bits(tuple(base.shape), base.dtype, seed)
    block = bytearray(residue_of(part, base, folded, 1.0))
    block[where % len(block)] = byte
    for damaged in (bytes(block), bytes(block[: where % len(block)])):
        try:
            found = restored(part, folded, 1.0, damaged, where="x")
        except FormatError:
            continue
        assert (found.shape, found.dtype) == (base.shape, base.dtype)


@RUNS
@given(states_and_adapters(), strengths, st.integers(1, 3), st.booleans())
def test_a_merge_of_files_is_taken_back_to_the_byte(
    drawn: tuple[dict[str, Tensor], Adapter], strength: float, workers: int, exact: bool
) -> None:
    state, adapter = drawn
    with TemporaryDirectory() as name:
        base, path, merged, again = (Path(name, word) for word in ("base", "adapter", "merged", "again"))
        write_base(state, base, network="net")
        loraio.save(adapter, path)
        options = {"strength": strength, "workers": workers, "exact": exact, "allow_noop": True}
        try:
            loraio.merge_file(base, path, merged, reversible=True, **options)
        except AdapterError as error:
            assert "overflows" in str(error)  # noqa: PT017  # the one reason there can be
            return
        before = base.read_bytes()
        loraio.unmerge_file(merged, again, base=base, workers=workers)
        assert again.read_bytes() == before
        base.unlink()
        loraio.unmerge_file(merged, again, adapter=path, overwrite=True)
        assert again.read_bytes() == before


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_of_a_float_is_a_step(dtype: torch.dtype) -> None:
    """Also over zero, and from the largest number to infinity."""
    word = WORDS[dtype.itemsize]
    zero, largest = torch.zeros(1, dtype=dtype), torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    smallest = (zero.view(word) + 1).view(dtype)
    for below, above in [(-zero, zero), (zero, smallest), (largest, torch.full_like(largest, torch.inf))]:
        for base, guess, told in [(above, below, b"\2"), (below, above, b"\1")]:
            coded = encode(base, guess)[LENGTH:]
            assert bz2.decompress(coded) == told.ljust(dtype.itemsize, b"\0")
            assert decode(coded, guess, where="x").view(word).equal(base.view(word))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_differences_for_another_number_of_weights_are_refused(count: int) -> None:
    base = torch.ones(5)
    coded = bz2.compress(bytes(4 * count))
    with pytest.raises(FormatError, match="does not belong to a weight of this shape"):
        decode(coded, base, where="x")
