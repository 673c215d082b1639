"""Marks of tensors and of models: every change is noticed, and use is no change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from loraio.bases.writes import SAMPLED, ModelMark, TensorMark, is_dense, sampled, version_of


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(inner, nn.Flatten(), nn.Linear(4 * 4, 3))


def mark(model: nn.Module) -> ModelMark:
    return ModelMark(model, lambda module: isinstance(module, nn.Dropout))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a write": lambda model: model[2].weight.data.mul_(2),
    "a counted write": lambda model: model[2].bias.detach().zero_(),
    "a write to a buffer": lambda model: model[0][1].running_mean.add_(1),
    "a write past the version counter": lambda model: model[2].weight.detach().numpy().fill(3),
    "an integer's": lambda model: model[0][1].num_batches_tracked.add_(1),
    "other memory": lambda model: setattr(model[2].weight, "data", model[2].weight.data.clone()),
    "other strides": lambda model: setattr(model[0][0].weight, "data", model[0][0].weight.data.transpose(2, 3)),
    "another parameter": lambda model: setattr(model[2], "weight", nn.Parameter(model[2].weight.detach())),
    "a parameter less": lambda model: setattr(model[2], "bias", None),
    "another module": lambda model: model.__setitem__(1, nn.Flatten()),
    "a module more": lambda model: model.append(nn.ReLU()),
    "a buffer more": lambda model: model[1].register_buffer("more", torch.zeros(1)),
    "a cast": lambda model: model.double(),
    "a loaded state": lambda model: model.load_state_dict(network().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_mark_notices_every_change(change: Callable[[nn.Sequential], object]) -> None:
    model = network()
    before = mark(model)
    assert before.unchanged()
    with torch.no_grad():
        change(model)
    assert not before.unchanged()
    assert mark(model).unchanged()


def test_use_is_no_change_and_modules_besides_may_come_and_go() -> None:
    model = network().append(nn.Dropout()).eval()
    before = mark(model)
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    model.train()[3] = nn.Dropout(0.3)
    assert before.unchanged()
    model[2].weight.detach().zero_()
    assert not before.unchanged()


def with_holes() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    return layer


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize("make", [with_holes, made_in_inference_mode, lambda: nn.Linear(2, 2, device="meta")])
def test_tensors_that_cannot_be_compared_never_count_as_unchanged(make: Callable[[], nn.Module]) -> None:
    model = make()
    tensors = [*model.parameters()]
    assert not mark(model).unchanged()
    assert not TensorMark(tensors).same(tensors)
    assert not TensorMark.each(tensors)[0].same(tensors[:1])


def test_a_tensor_mark_compares_other_objects_by_memory_and_form() -> None:
    weight, empty = torch.rand(4, 6), torch.rand(0, 3)
    both, (alone, none) = TensorMark([weight, empty]), TensorMark.each([weight, empty])
    assert both.same([weight.detach(), empty])
    assert none.same([empty])
    assert alone.same([weight.view(4, 6)])
    with torch.inference_mode():
        made_there = torch.rand(4, 6)
    assert (version_of(made_there), version_of(weight)) == (0, 0)
    for other in (weight.clone(), weight.view(6, 4), weight.T, weight.view(torch.int32), made_there):
        assert not alone.same([other])
    assert not both.same([weight])
    weight[3, 5] += 1
    assert not alone.same([weight])


@pytest.mark.parametrize("count", [0, 1, SAMPLED, SAMPLED + 1, 10 * SAMPLED + 3])
def test_a_sample_is_spread_over_all_of_a_tensor(count: int) -> None:
    found = sampled(torch.arange(count))
    assert len(found) <= SAMPLED
    assert found.tolist() == list(range(0, count, -(-count // SAMPLED) or 1))


def test_memory_without_holes_is_dense_in_any_order_of_dimensions() -> None:
    x = torch.rand(2, 3, 4, 5)
    assert all(map(is_dense, (x, x.permute(3, 0, 2, 1), x.contiguous(memory_format=torch.channels_last), x[:0], x[1])))
    assert not any(map(is_dense, (x[..., ::2], x[:, 1], x[:1].expand(3, 3, 4, 5), x.to_sparse())))
