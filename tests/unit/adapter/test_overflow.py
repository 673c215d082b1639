"""Weights that would overflow are refused by attach, swap and strength as by merge, before anything is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import Small, outputs, small_adapter, small_adapters, small_base
from torch import nn

import loraio
from loraio.adapter import overflow
from loraio.adapter.kinds import KINDS
from loraio.adapter.overflow import refuse_overflow
from loraio.errors import AdapterError


@pytest.fixture
def model() -> Small:
    return small_base()


@pytest.fixture
def adapters(model: nn.Module) -> dict[str, loraio.Adapter]:
    return small_adapters(model)


def enlarged(adapter: loraio.Adapter, by: float) -> loraio.Adapter:
    """With an A of the last target that many times as large."""
    name = f"{list(adapter.targets)[-1]}.lora_A"
    return replace(adapter, factors={**adapter.factors, name: adapter.factors[name] * by})


def message_of(merge: Any) -> str:
    with pytest.raises(AdapterError, match="the sum overflows") as found:
        merge()
    return str(found.value)


def test_attach_swap_and_strength_refuse_what_merge_refuses(
    model: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    good, bad = adapters["lora"], enlarged(adapters["other"], 1e38)
    bad = replace(bad, targets={name: replace(target, alpha=100) for name, target in bad.targets.items()})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    expected = message_of(lambda: loraio.merge(state, bad, 2.0))
    assert all(tensor.equal(before[name]) for name, tensor in state.items())
    assert message_of(lambda: loraio.attach(model, bad, 2.0)) == expected
    assert type(model) is Small
    live = loraio.attach(model, good, 2.0)
    found = outputs(model)
    assert message_of(lambda: live.swap(bad)) == expected
    too_much = message_of(lambda: loraio.merge(state, good, 1e60))
    assert message_of(lambda: setattr(live, "strength", 1e60)) == too_much
    assert (live.adapter, live.strength) == (good, 2.0)
    assert outputs(model).equal(found)
    live.detach()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_strength_looks_at_the_factors_as_they_are_now(model: nn.Module, adapters: dict[str, loraio.Adapter]) -> None:
    live = loraio.attach(model, adapters["lora"], trainable=True)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1e18)
    with pytest.raises(AdapterError, match="overflows"):
        live.strength = 1e3
    live.strength = 0.5
    live.detach()


def test_an_adapter_that_was_fine_at_another_strength_is_looked_at_again(
    model: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    large = enlarged(adapters["other"], 1e36)
    live = loraio.attach(model, large)
    live.swap(adapters["lora"])
    live.strength = 1e6
    with pytest.raises(AdapterError, match="overflows"):
        live.swap(large)
    live.strength = 0.5
    live.swap(large)
    assert live.adapter is large


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_fold_is_spared_only_where_no_weight_can_overflow(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, at_the_end: bool
) -> None:
    """Factors from tiny to huge, on weights of all magnitudes up to the dtype's end."""
    folded: list[str] = []

    def fold(name: str, *arguments: Any, **options: Any) -> Any:
        folded.append(name)
        return real(name, *arguments, **options)

    real = overflow.fold_finite
    monkeypatch.setattr(overflow, "fold_finite", fold)
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 12).reshape(3, 4))
        made = small_adapter(model, 1, "all", rank=2, kind=kind)
        if at_the_end:
            model[0].weight.mul_(torch.finfo(dtype).max)
    weights = {"0.weight": model[0].weight.detach()}
    refused, spared = 0, 0
    for exponent in range(-40, 320, 20):
        for strength in (0.0, 1.0, -3.0, 1e10):
            factors = {name: factor.double() for name, factor in made.factors.items()}
            name = f"0.weight.{list(made.targets['0.weight'].factor_shapes)[-1 if kind == 'dora' else 0]}"
            factors[name] = factors[name] * 10.0 ** min(exponent, 300)
            adapter = replace(made, factors=factors)
            folded.clear()
            try:
                refuse_overflow(adapter.targets, adapter.factors, weights, strength=strength)
            except AdapterError:
                refused += 1
                with pytest.raises(AdapterError, match="overflows"):
                    adapter.fold("0.weight", weights["0.weight"], strength=strength)
            else:
                spared += not folded
                assert adapter.fold("0.weight", weights["0.weight"], strength=strength).isfinite().all()
    assert spared > 0
    assert refused > 0


def test_usual_adapters_are_never_folded_to_find_out(
    model: nn.Module, adapters: dict[str, loraio.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(overflow, "fold_finite")
    live = loraio.attach(model, adapters["lora"])
    for name in ("other", "dora", "head", "lora"):
        live.swap(adapters[name])
    live.strength = -2
    live.detach()
