"""Folds of slices are slices of folds, and the float32 look at them changes no result."""

from __future__ import annotations

import pytest
import torch
from checkpoints import adapter_of
from strategies import tensor

from loraio.adapter import folding
from loraio.adapter.adapter import parts_of
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.merging import weight_check
from loraio.merging.effect import Fold
from loraio.merging.weight_check import check_fold


def test_a_change_too_small_to_be_squared_is_a_change() -> None:
    base = torch.full((8,), 1e-30, dtype=torch.bfloat16)
    found = base.clone()
    found[3] = torch.nextafter(base[3], base[3] * 2)
    assert Fold.of(weight_check.FoldCheck(), base, found).change > 0
    assert Fold.of(weight_check.FoldCheck(), base, base).change == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slices_of_a_fold_are_the_folds_of_the_slices(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "BLOCK", 1000)
    for layer in LAYER_TYPES.values():
        shape = (203, 24, *(3,) * (layer.dims - 2))
        state = {"w": tensor(shape, dtype, 5)}
        adapter = adapter_of(state, {"w": layer.name}, kind=kind)
        whole = adapter.fold("w", state["w"], strength=0.7)
        parts = list(parts_of(adapter, "w"))
        apart = layer.slices == "rows" or (layer.slices == "columns" and KINDS[kind].columns_apart)
        assert (len(parts) > 1) == apart
        assert [at.start for at, _ in parts] == [0, *(at.stop for at, _ in parts[:-1])]
        assert parts[-1][0].stop == 203
        found = torch.cat([part.fold("w", state["w"][at], strength=0.7) for at, part in parts])
        assert found.equal(whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e4])
def test_the_first_look_in_float32_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, spread: float
) -> None:
    weight = tensor((64, 500), dtype, 1, spread)
    weight[:8] = torch.tensor([2.0**k for k in range(-10, 490)]).clamp(max=2.0**14).to(dtype)  # where the ulp changes
    adapter = adapter_of({"w": weight}, {"w": "Linear"}, kind=kind)
    right = adapter.fold("w", weight)
    up = torch.nextafter(right, torch.full_like(right, torch.inf))
    down = torch.nextafter(right, torch.full_like(right, -torch.inf))
    mixed = torch.where(torch.rand(right.shape, generator=torch.Generator().manual_seed(0)) < 0.01, up, right)
    broken = right.clone()
    broken[3, 7] = torch.nan
    infinite = weight.clone()
    infinite[5, 5] = torch.inf
    for base, found in [
        *((weight, found) for found in (right, up, down, mixed, broken, weight)),
        (infinite, torch.where(infinite.isinf(), infinite, right)),
        (weight[:1, :1], right[:1, :1]),
    ]:
        part = adapter_of({"w": base}, {"w": "Linear"}, kind=kind)
        if base.shape != weight.shape:
            found = part.fold("w", base)
        first = check_fold(part, base, found, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(weight_check, "_NARROW", ())
            full = check_fold(part, base, found, 1.0)
        assert (first.wrong, first.values) == (full.wrong, full.values)
        assert first.max_ulp == pytest.approx(full.max_ulp, rel=1e-6)  # float64 sums in another order
        told = check_fold(part, base, found, 1.0, told=0.4995)
        assert (told.wrong, told.values) == (full.wrong, full.values)
        assert told.max_ulp == first.max_ulp or max(told.max_ulp, full.max_ulp) <= 0.4995
