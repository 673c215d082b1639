"""A network that gives two answers for one input is named, and the merge is not blamed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.merging.determinism import NondeterministicLayer, find_nondeterministic
from loraio.merging.weight_check import same_bits


class Flaky(nn.Identity):
    """A layer that answers differently in every call, as a kernel does that reads memory nobody wrote."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + max(self.calls - self.after, 0)


class OwnCode(nn.Module):
    """A network with a layer on each side of code that does not repeat itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(4, 4), nn.ReLU(inplace=True), 0

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        self.calls += 1
        return {"out": [self.last(self.first(x).abs() + self.calls)]}


def network(flaky: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.ReLU(inplace=True), flaky or nn.Identity())
    return nn.Sequential(nn.Conv2d(1, 4, 3), block, nn.Flatten(), nn.Linear(16, 3))


def merged_case(model: nn.Module) -> tuple[dict[str, Tensor], loraio.Adapter, dict[str, Tensor]]:
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=2, targets=("all",)))
    for factor in adapter.factors.values():
        factor.add_(0.1)
    state = model.state_dict()
    return state, adapter, loraio.merge(state, adapter)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (network(Flaky()), NondeterministicLayer(name="1.1", type="Flaky")),
        (nn.Sequential(network(), Flaky(), nn.ReLU(), Flaky()), NondeterministicLayer(name="1", type="Flaky")),
        (OwnCode(), NondeterministicLayer(name="", type="OwnCode")),
        (network(), NondeterministicLayer(name="", type="Sequential")),
    ],
    ids=["in a block", "the first of two", "own code", "none found"],
)
def test_the_first_layer_with_the_same_inputs_and_other_outputs_is_named(
    model: nn.Module, found: NondeterministicLayer
) -> None:
    x = torch.randn(2, 4) if isinstance(model, OwnCode) else torch.randn(2, 1, 4, 4)
    assert find_nondeterministic(model, lambda: model(x)) == found
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_answers_are_compared_bit_by_bit() -> None:
    nan, zero = torch.tensor([torch.nan]), torch.zeros(1)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, torch.zeros(2))


@pytest.mark.parametrize("after", [0, 3], ids=["from the start", "once the merged weights are loaded"])
@pytest.mark.parametrize("wrong", [False, True])
def test_verify_names_the_layer_and_lets_the_weights_decide(after: int, wrong: bool) -> None:
    model = network(Flaky(after))
    state, adapter, merged = merged_case(model)
    if wrong:
        merged = {**merged, "0.weight": state["0.weight"]}
    report = loraio.verify(state, adapter, merged, model=copy.deepcopy(model), inputs=torch.rand(2, 1, 4, 4))
    assert report.nondeterministic == NondeterministicLayer(name="1.1", type="Flaky")
    assert report.outputs is None
    assert report.weights.ok == report.ok == (not wrong)
