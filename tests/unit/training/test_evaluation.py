"""Counting right and wrong answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.errors import BaseMismatchError, DataError, StateError
from loraio.training import evaluation


class Says(nn.Module):
    """A network that answers with the class number in the first pixel, times 10."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(classes))

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.table[(images[:, 0, 0, 0] * 10).round().long()]
        return answers


def shown(pairs: list[tuple[int, int]], classes: int = 10) -> loraio.Dataset:
    """Return a data set in which `Says` gives these answers: (label, answer)."""
    images = torch.zeros(len(pairs), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([answer for _, answer in pairs]) / 10
    labels = torch.tensor([label for label, _ in pairs])
    return loraio.Dataset(name="shown", split="test", images=images, labels=labels, classes=classes)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(now[name].equal(tensor) for name, tensor in before.items())


def test_the_counts_are_those_done_by_hand() -> None:
    found = loraio.evaluate(Says(), shown([(0, 0), (0, 1), (0, 1), (1, 1), (2, 0), (3, 9), (9, 9), (9, 3)]))
    assert found.images == 8
    assert found.wrong == (2, 0, 1, 1, 0, 0, 0, 0, 0, 1)
    assert found.false_alarms == (1, 2, 0, 1, 0, 0, 0, 0, 0, 1)
    assert found.accuracy == 3 / 8
    assert found.to_json() == {"accuracy": 0.375, "wrong": list(found.wrong), "false_alarms": list(found.false_alarms)}


def test_the_batches_do_not_show_in_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shown([(n % 10, (n * n) % 10) for n in range(57)])
    whole = loraio.evaluate(Says(), dataset)
    monkeypatch.setattr(evaluation, "BATCH", 8)
    assert loraio.evaluate(Says(), dataset) == whole


def test_every_module_keeps_its_mode(base: nn.Module, few: loraio.Dataset) -> None:
    base.train()
    base.get_submodule("conv2").eval()
    before = {name: module.training for name, module in base.named_modules()}
    loraio.evaluate(base, few)
    assert {name: module.training for name, module in base.named_modules()} == before
    with pytest.raises(DataError):
        loraio.predict(base, torch.zeros(1, 3, 28, 28))
    assert {name: module.training for name, module in base.named_modules()} == before


def test_the_model_is_shown_in_eval_mode_without_gradients() -> None:
    class Watching(Says):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(images)

    model = Watching().train()
    assert loraio.evaluate(model, shown([(1, 1)])).accuracy == 1
    assert model.training


def test_wrong_outputs_and_images_are_refused(base: nn.Module) -> None:
    with pytest.raises(DataError, match=r"gives \(7,\) numbers .* need \(10,\)"):
        loraio.evaluate(Says(classes=7), shown([(1, 1)]))
    with pytest.raises(DataError, match=r"does not take images of shape \(3, 28, 28\)"):
        loraio.predict(base, torch.zeros(2, 3, 28, 28))


def test_outputs_have_the_dtype_of_the_network_which_may_lack_parameters(base: nn.Module, few: loraio.Dataset) -> None:
    assert loraio.predict(base.double(), few.images[:3]).dtype == torch.float64
    assert loraio.predict(nn.Flatten(), torch.zeros(3, 1, 2, 2)).shape == (3, 4)


def test_each_adapter_is_counted_as_if_it_were_alone(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, few: loraio.Dataset
) -> None:
    before = state(base)
    alone, results = loraio.evaluate_each(base, {"a": seven, "b": three}, few, strength=0.5)
    assert same(base, before)
    assert alone == loraio.evaluate(base, few)
    assert list(results) == ["a", "b"]
    for name, adapter in (("a", seven), ("b", three)):
        with loraio.attach(base, adapter, 0.5):
            assert results[name] == loraio.evaluate(base, few)
    assert len({alone, *results.values()}) == 3
    assert loraio.evaluate_each(base, {}, few) == (alone, {})


@pytest.mark.parametrize("place", ["first", "second"])
def test_an_adapter_that_does_not_fit_is_named_and_the_model_given_back(
    base: nn.Module, three: loraio.Adapter, few: loraio.Dataset, place: str
) -> None:
    foreign = loraio.new_adapter(loraio.build_network("digit-cnn", seed=8), loraio.TrainConfig(rank=1))
    before = state(base)
    adapters = {"foreign": foreign} if place == "first" else {"three": three, "foreign": foreign}
    with pytest.raises(BaseMismatchError, match="'foreign': ") as caught:
        loraio.evaluate_each(base, adapters, few)
    assert len(caught.value.problems) == 3
    assert same(base, before)


def test_an_error_with_an_adapter_on_gives_the_model_back(
    base: nn.Module, three: loraio.Adapter, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, answers = state(base), iter([loraio.evaluate(base, few)])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda model, dataset: next(answers))
        with pytest.raises(StopIteration):
            loraio.evaluate_each(base, {"three": three}, few)
    assert same(base, before)
    with loraio.attach(base, three), pytest.raises(StateError):
        loraio.evaluate_each(base, {"three": three}, few)
