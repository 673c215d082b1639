"""Is a model still what it was?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from loraio.watching import SAMPLED, Watch, sampled


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(inner, nn.Flatten(), nn.Linear(4 * 4, 3))


def watch(model: nn.Module) -> Watch:
    return Watch(model, lambda module: isinstance(module, nn.Dropout))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a write": lambda model: model[2].weight.data.mul_(2),
    "a counted write": lambda model: model[2].bias.detach().zero_(),
    "a write to a buffer": lambda model: model[0][1].running_mean.add_(1),
    "a write past the count": lambda model: model[2].weight.detach().numpy().fill(3),
    "an integer's": lambda model: model[0][1].num_batches_tracked.add_(1),
    "another memory": lambda model: setattr(model[2].weight, "data", model[2].weight.data.clone()),
    "another parameter": lambda model: setattr(model[2], "weight", nn.Parameter(model[2].weight.detach())),
    "a parameter less": lambda model: setattr(model[2], "bias", None),
    "another module": lambda model: model.__setitem__(1, nn.Flatten()),
    "a module more": lambda model: model.append(nn.ReLU()),
    "a buffer more": lambda model: model[1].register_buffer("more", torch.zeros(1)),
    "a cast": lambda model: model.double(),
    "a loaded state": lambda model: model.load_state_dict(network().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(change: Callable[[nn.Sequential], object]) -> None:
    model = network()
    seen = watch(model)
    assert seen.same()
    with torch.no_grad():
        change(model)
    assert not seen.same()
    assert watch(model).same()


def test_use_is_no_change() -> None:
    model = network().eval()
    seen = watch(model)
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    model.train()
    assert seen.same()


def test_what_does_not_belong_to_it_may_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    seen = watch(model)
    model[1] = nn.Dropout(0.3)
    assert seen.same()
    model[0].weight.detach().zero_()
    assert not seen.same()


def test_what_cannot_be_told_is_not_the_same() -> None:
    with torch.inference_mode():
        made_there = nn.Linear(2, 2)
    assert not watch(made_there).same()
    assert not watch(nn.Linear(2, 2, device="meta")).same()
    with_holes = nn.Linear(4, 4)
    with_holes.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    assert not watch(with_holes).same()


@pytest.mark.parametrize("count", [0, 1, SAMPLED, SAMPLED + 1, 10 * SAMPLED + 3])
def test_a_sample_is_spread_over_all_of_a_tensor(count: int) -> None:
    found = sampled(torch.arange(count))
    assert len(found) <= SAMPLED
    assert found.tolist() == list(range(0, count, -(-count // SAMPLED) or 1))
