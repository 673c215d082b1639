"""Another device during a training. ``meta`` stands for a GPU: it takes a model and gives no values back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.errors import ConfigError
from loraio.training import placement


def test_devices_have_names_and_missing_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert placement.device_of("cpu") == torch.device("cpu")
    assert placement.device_of("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device 'cuda': torch sees no GPU"):
        placement.device_of("cuda")
    gpus = 2
    assert placement.device_of("auto") == torch.device("cuda", 0)
    assert placement.device_of("cuda") == torch.device("cuda", 0)
    assert placement.device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="no CUDA device 'cuda:2': there are 2 of them"):
        placement.device_of("cuda:2")


def test_the_model_has_its_own_tensors_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "device_of", torch.device)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False))
    model[0].bias = None
    kept = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    with placement.placed(model, "meta"):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    for name, tensor in model.state_dict().items():
        assert (tensor.data_ptr(), tensor.device.type) == (kept[name][0], "cpu")
        assert tensor.equal(kept[name][1])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_training_where_the_model_is_changes_no_bit(base: nn.Module, few: loraio.Dataset) -> None:
    adapters = [
        loraio.train(base, loraio.TrainConfig(digit=3, steps=3, batch_size=8, device=name), few)
        for name in (None, "cpu")
    ]
    assert all(adapters[1].factors[name].equal(factor) for name, factor in adapters[0].factors.items())
    assert "device" not in adapters[0].training["hyperparameters"]
    assert adapters[1].training["hyperparameters"]["device"] == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_training_on_a_gpu(base: nn.Module, few: loraio.Dataset, amp: str | None) -> None:
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapter = loraio.train(base, loraio.TrainConfig(digit=3, steps=20, device="cuda", amp=amp), few)
    assert all(base.state_dict()[name].equal(tensor) for name, tensor in kept.items())
    assert {factor.device.type for factor in adapter.factors.values()} == {"cpu"}


class Reading(nn.Module):
    """A network that demands an order of memory, perhaps in training mode only."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(1, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.how == "view" or (self.how == "view in training" and self.training):
            x = x.view(len(x), -1)
        elif self.how == "as memory":
            x = x.as_strided((len(x), 196), (196, 1))
        return self.fc(self.drop(x.flatten(1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "takes"), [("flatten", True), ("view", False), ("view in training", False), ("as memory", False)]
)
def test_a_network_that_demands_an_order_of_memory_is_found_out_and_not_changed(how: str, takes: bool) -> None:
    torch.manual_seed(0)
    model = Reading(how).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, random = torch.randn(2, 1, 28, 28), torch.get_rng_state()
    assert placement.takes_channels_last(model, images) is takes
    assert model.training
    assert model.drop.training
    assert torch.get_rng_state().equal(random)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_channels_come_last_on_a_cpu_only() -> None:
    assert not placement.takes_channels_last(Reading("flatten").to("meta"), torch.randn(2, 1, 28, 28))


def test_a_network_that_demands_an_order_of_memory_can_be_trained(few: loraio.Dataset) -> None:
    torch.manual_seed(0)
    found = loraio.train(Reading("view"), loraio.TrainConfig(steps=2, batch_size=8, targets=("all",)), few)
    assert found.factors
