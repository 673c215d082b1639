"""Is a model still what it was?"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from loraio.bases.writes import SAMPLED, ModelMark, WeakModelMark, sampled


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(inner, nn.Flatten(), nn.Linear(4 * 4, 3))


def watch(model: nn.Module) -> ModelMark:
    return ModelMark(model, lambda module: isinstance(module, nn.Dropout))


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


def glance(model: nn.Module) -> Callable[[], bool]:
    """Whether a `WeakModelMark` of the model as it is now is the same when that is called."""
    seen = WeakModelMark(modules_of(model), model.state_dict())
    return lambda: seen.unchanged(modules_of(model))


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(change: Callable[[nn.Sequential], object]) -> None:
    model = network()
    seen = watch(model)
    assert seen.unchanged()
    with torch.no_grad():
        change(model)
    assert not seen.unchanged()
    assert watch(model).unchanged()


def test_use_is_no_change() -> None:
    model = network().eval()
    seen = watch(model)
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    model.train()
    assert seen.unchanged()


def test_what_does_not_belong_to_it_may_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    seen = watch(model)
    model[1] = nn.Dropout(0.3)
    assert seen.unchanged()
    model[0].weight.detach().zero_()
    assert not seen.unchanged()


def test_what_cannot_be_told_is_not_the_same() -> None:
    with torch.inference_mode():
        made_there = nn.Linear(2, 2)
    assert not watch(made_there).unchanged()
    assert not watch(nn.Linear(2, 2, device="meta")).unchanged()
    with_holes = nn.Linear(4, 4)
    with_holes.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    assert not watch(with_holes).unchanged()


@pytest.mark.parametrize("count", [0, 1, SAMPLED, SAMPLED + 1, 10 * SAMPLED + 3])
def test_a_sample_is_spread_over_all_of_a_tensor(count: int) -> None:
    found = sampled(torch.arange(count))
    assert len(found) <= SAMPLED
    assert found.tolist() == list(range(0, count, -(-count // SAMPLED) or 1))


class Other(nn.Linear):
    """A layer of another class."""


FORMS: dict[str, Callable[[nn.Sequential], object]] = {
    "other strides": lambda model: setattr(model[0][0].weight, "data", model[0][0].weight.data.transpose(2, 3)),
    "another class": lambda model: setattr(model[2], "__class__", Other),
    "another name": lambda model: model._modules.update(last=model._modules.pop("2")),
    "no numbers any more": lambda model: model.to("meta"),
    "made in inference mode": lambda model: setattr(model[2], "weight", inferred(model[2].weight)),
    "of a subclass": lambda model: setattr(model[2], "weight", Marked(model[2].weight.detach())),
}


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


def inferred(weight: torch.Tensor) -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(weight.clone(), requires_grad=False)


SAME_NUMBERS = ("another parameter", "another module")
"""These are noticed by a `ModelMark`, and do not count for a `WeakModelMark`: same memory under the same names."""


@pytest.mark.parametrize("name", sorted({*CHANGES, *FORMS} - {*SAME_NUMBERS}))
def test_a_glance_notices_every_change_of_numbers_names_and_forms(name: str) -> None:
    model = network()
    same = glance(model)
    assert same()
    {**CHANGES, **FORMS}[name](model)
    assert not same()


def test_a_glance_of_what_it_cannot_tell_is_never_the_same() -> None:
    strange = network()
    strange[2].weight = inferred(strange[2].weight)
    assert not glance(strange)()
    model = network()
    foreign = WeakModelMark(modules_of(model), {**model.state_dict(), "more": torch.ones(3)})
    assert not foreign.unchanged(modules_of(model))
    text = WeakModelMark(modules_of(model), {**model.state_dict(), "_extra_state": "text"})  # type: ignore[dict-item]
    assert not text.unchanged(modules_of(model))


def test_a_glance_keeps_no_module_alive() -> None:
    model = network()
    model[2].whole = [model]  # type: ignore[assignment]
    seen, gone = WeakModelMark(modules_of(model), model.state_dict()), weakref.ref(model)
    assert seen.unchanged(modules_of(model))
    del model
    gc.collect()
    assert gone() is None
