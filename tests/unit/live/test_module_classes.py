"""Share classes among adapted modules, while each module is parametrized by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import small_adapter
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraio
from loraio.live.places import parametrization_list


class Twice(nn.Module):
    """A parametrization of another library."""

    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval().requires_grad_(False)


@pytest.fixture
def live(model: nn.Sequential) -> Iterator[loraio.Attachment]:
    with loraio.attach(model, small_adapter(model, 1, "all", rank=2)) as live:
        yield live


def folded(live: loraio.Attachment, number: int) -> Tensor:
    name = f"{number}.weight"
    return live.adapter.fold(name, loraio.base_state_dict(live.model)[name])


def test_a_list_of_parametrizations_is_as_torch_makes_it(model: nn.Sequential) -> None:
    adapter, weight = small_adapter(model, 1, "0", rank=2), model[0].weight
    with loraio.attach(model, adapter):
        ours: Any = model[0].parametrizations.weight
        for tensor in (weight, weight.detach().clone()):
            own = parametrization_list(ours[0], tensor)
            theirs = parametrize.ParametrizationList([ours[0]], tensor, unsafe=True)
            assert vars(own).keys() == vars(theirs).keys()
            for name, value in vars(theirs).items():
                assert type(vars(own)[name]) is type(value)
                assert name.startswith("_") or vars(own)[name] == value
            for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                assert list(vars(own)[kind]) == list(vars(theirs)[kind])
            assert own.original is theirs.original is tensor
            assert own().equal(theirs())
            assert own.state_dict().keys() == theirs.state_dict().keys()


def test_modules_of_a_class_share_one(model: nn.Sequential, live: loraio.Attachment) -> None:
    assert type(model[0]) is type(model[1]) is type(model[2])
    assert type(model[0]).__bases__ == (nn.Linear,)
    live.detach()
    assert {type(module) for module in model} == {nn.Linear}


@pytest.mark.usefixtures("live")
def test_somebody_elses_parametrization_of_one_module_leaves_the_others_alone(model: nn.Sequential) -> None:
    biases = [module.bias.clone() for module in model]
    x = torch.rand(2, 4)
    parametrize.register_parametrization(model[1], "bias", Twice())
    assert model[1].bias.equal(2 * biases[1])
    assert model[0].bias.equal(biases[0])
    assert model[2](x).equal(nn.functional.linear(x, model[2].weight, biases[2]))
    model[2].bias = nn.Parameter(biases[2] + 1)
    assert model[2].bias.equal(biases[2] + 1)
    assert "bias" in model[2]._parameters
    parametrize.register_parametrization(model[2], "bias", Twice())
    parametrize.remove_parametrizations(model[1], "bias", leave_parametrized=False)
    assert model[1].bias.equal(biases[1])
    assert model[2].bias.equal(2 * (biases[2] + 1))
    model[0].register_parameter("bias", None)
    assert model[0].bias is None
    assert model[0](x).equal(nn.functional.linear(x, model[0].weight))


def test_taking_one_parametrization_off_by_torchs_own_function_leaves_the_others_on(
    model: nn.Sequential, live: loraio.Attachment
) -> None:
    expected = [folded(live, number) for number in range(3)]
    base = model[1].parametrizations.weight.original
    parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)
    assert model[1].weight is base
    assert type(model[1]) is nn.Linear
    assert model[0].weight.equal(expected[0])
    assert model[2].weight.equal(expected[2])


def test_a_weight_taken_off_a_module_that_is_parametrized_otherwise_too_is_its_own_again(
    model: nn.Sequential, live: loraio.Attachment
) -> None:
    parametrize.register_parametrization(model[1], "bias", Twice())
    base, bias = model[1].parametrizations.weight.original, model[1].bias.clone()
    parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)
    assert model[1].weight is base
    assert model[1].bias.equal(bias)
    assert model[0].weight.equal(folded(live, 0))


def test_an_adapter_goes_onto_a_module_that_torch_has_parametrized_and_off_again(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[1], "bias", Twice())
    twin = copy.deepcopy(model)  # whose module has the same class
    bias, weight = model[1].bias.clone(), model[1].weight
    live = loraio.attach(model, small_adapter(model, 1, "all", rank=2))
    assert model[1].weight.equal(folded(live, 1))
    assert model[1].bias.equal(bias)
    assert twin[1].weight.equal(weight)
    live.detach()
    assert model[1].weight is weight
    assert model[1].bias.equal(bias)
    assert twin[1].bias.equal(bias)


def test_torchs_cache_tells_the_modules_apart(model: nn.Sequential, live: loraio.Attachment) -> None:
    expected = [folded(live, number) for number in range(3)]
    with torch.no_grad(), parametrize.cached():
        assert all(module.weight.equal(weight) for module, weight in zip(model, expected, strict=True))
        assert model[0].weight is model[0].weight
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].parametrizations.weight.original.mul_(2)
        assert not twin[0].weight.equal(expected[0])
