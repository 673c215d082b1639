"""Train, save, attach and merge tensors that an adapter replaces whole: heads and normalisation."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import Everything, compiled_once, outputs, same_bits
from torch import Tensor, nn

import loraio
from loraio.adapter import WholeTensor
from loraio.adapter.layers import STATISTICS
from loraio.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    DataError,
    ShapeError,
    StateError,
    UnknownNameError,
)

SHA = "0123456789abcdef" * 4

STEPS: dict[str, Any] = {"steps": 6, "batch_size": 16, "rank": 2}


def steady() -> bool:
    """Return False on torch 2.6, where a pass in eval mode rounds the statistics of InstanceNorm anew."""
    layer = nn.InstanceNorm2d(100, track_running_stats=True).eval()
    before = layer.running_mean.copy_(torch.linspace(0.1, 0.9, 100)).clone()
    layer(torch.ones(11, 100, 2, 2))
    return layer.running_mean.equal(before)


class Normed(nn.Module):
    """Convolutions, every kind of normalisation with statistics and one without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.norm2 = nn.InstanceNorm2d(8, track_running_stats=True) if steady() else nn.BatchNorm2d(8, affine=False)
        self.norm3 = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm3(self.norm2(self.conv2(x))).relu()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture
def network(digits: loraio.Dataset) -> nn.Module:
    """Make a `Normed` with statistics, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Normed()
    with torch.no_grad():
        for start in range(0, 320, 64):
            model(digits.images[start : start + 64])
        for parameter in model.norm1.parameters():
            parameter.add_(0.1)
    return model.eval()


def trained(network: nn.Module, data: loraio.Dataset, norm: str = "frozen", **settings: Any) -> loraio.Adapter:
    config = loraio.TrainConfig(**{**STEPS, "heads": {"fc": 10}, "norm": norm, **settings})
    return loraio.train(network, config, data)


@pytest.fixture
def adapters(network: nn.Module, digits: loraio.Dataset) -> dict[str, loraio.Adapter]:
    """Train an adapter with a ten-class head for each setting of ``norm``, and one without a head."""
    made = {norm: trained(network, digits, norm) for norm in ("frozen", "stats", "affine")}
    seven = replace(digits, images=digits.images[digits.labels < 7], labels=digits.labels[digits.labels < 7], classes=7)
    return made | {"headless": trained(network, replace(seven, class_names=()), "stats", heads={})}


# what training makes


@pytest.mark.parametrize("norm", ["frozen", "stats", "affine"])
def test_training_gives_the_base_back_and_moves_what_it_was_told_to(
    network: nn.Module, digits: loraio.Dataset, norm: str
) -> None:
    network.train()
    before = Everything(network)
    base = network.state_dict()
    adapter = trained(network, digits, norm)
    before.assert_same()
    names = ["fc.weight", "fc.bias"]
    if norm != "frozen":
        for layer in ("norm1", "norm2"):
            own = ("weight", "bias") if norm == "affine" and layer == "norm1" else ()
            names += [f"{layer}.{name}" for name in (*own, *STATISTICS)]
    names += ["norm3.weight", "norm3.bias"] if norm == "affine" else []
    assert list(adapter.whole) == names
    assert adapter.heads == {"fc": 10}
    for name in names:
        if name == "norm2.num_batches_tracked":  # torch's instance normalisation never counts
            continue
        assert not (adapter.tensors[name].shape == base[name].shape and adapter.tensors[name].equal(base[name])), name
    if norm != "frozen":
        steps = adapter.tensors["norm1.num_batches_tracked"] - base["norm1.num_batches_tracked"]
        assert int(steps) == STEPS["steps"]
    assert adapter.training["hyperparameters"].get("norm", "frozen") == norm
    assert "before" not in adapter.training["results"]


def test_statistics_are_the_ones_that_a_network_without_adapter_would_gather(
    network: nn.Module, digits: loraio.Dataset
) -> None:
    adapter = loraio.new_adapter(network, loraio.TrainConfig(norm="stats", rank=2))
    twin = copy.deepcopy(network).train()
    with loraio.attach(network, adapter, trainable=True) as live:
        network.train()
        for start in (0, 32, 64):
            outputs(network, digits.images[start : start + 32])
            outputs(twin, digits.images[start : start + 32])
        tensors = live.adapter.tensors
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_training_is_deterministic_and_its_head_starts_from_the_seed(
    network: nn.Module, digits: loraio.Dataset
) -> None:
    assert trained(network, digits, "affine") == trained(network, digits, "affine")
    config = loraio.TrainConfig(heads={"fc": 10}, rank=2)
    one, same, other = (loraio.new_adapter(network, replace(config, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert not one.tensors["fc.weight"].equal(other.tensors["fc.weight"])
    assert float(one.tensors["fc.weight"].abs().max()) <= 8**-0.5  # as torch starts a linear layer


def test_a_base_of_as_many_classes_has_results_before(network: nn.Module, digits: loraio.Dataset) -> None:
    model = copy.deepcopy(network)
    model.fc = nn.Linear(8, 10)
    assert "before" in trained(model, digits).training["results"]


def test_a_replaced_head_is_no_target(network: nn.Module) -> None:
    config = loraio.TrainConfig(heads={"fc": 10}, targets=("all",), rank=1)
    assert list(loraio.plan_targets(network, config)) == ["conv1.weight", "conv2.weight"]
    whole = loraio.plan_whole(network, config)
    assert {name: (entry.shape, entry.base_shape) for name, entry in whole.items()} == {
        "fc.weight": ((10, 8), (7, 8)),
        "fc.bias": ((10,), (7,)),
    }
    with pytest.raises(ConfigError, match="nothing is left to adapt"):
        loraio.plan_targets(network, replace(config, targets=("fc",)))


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"heads": {"fc1": 10}}, UnknownNameError, "no layer 'fc1'; did you mean 'fc'"),
        ({"heads": {"norm1": 10}}, UnknownNameError, "'norm1' cannot be a head"),
        ({"heads": {"fc": 0}}, ConfigError, "heads\\['fc'\\] is 0"),
        ({"norm": "froze"}, UnknownNameError, "did you mean 'frozen'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    network: nn.Module, settings: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        loraio.new_adapter(network, loraio.TrainConfig(rank=2, **settings))


def test_a_network_without_normalisation_cannot_adapt_it(base: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no running statistics"):
        loraio.new_adapter(base, loraio.TrainConfig(norm="stats"))
    with pytest.raises(ConfigError, match="no normalisation layers"):
        loraio.new_adapter(base, loraio.TrainConfig(norm="affine"))


def test_a_head_for_another_number_of_classes_than_the_data_have_is_refused(
    network: nn.Module, digits: loraio.Dataset
) -> None:
    before = Everything(network)
    with pytest.raises(DataError, match=r"gives \(9,\) numbers for an image, the data need \(10,\)"):
        trained(network, digits, heads={"fc": 9})
    before.assert_same()


# the file


def test_a_file_gives_back_every_tensor(
    network: nn.Module, adapters: dict[str, loraio.Adapter], tmp_path: Path
) -> None:
    for name, adapter in adapters.items():
        loraio.save(adapter, tmp_path / name)
        found = loraio.load(tmp_path / name)
        assert found == adapter == pickle.loads(pickle.dumps(adapter)) == copy.deepcopy(adapter)
        assert dict(found.whole) == dict(adapter.whole)
        assert loraio.save(found, tmp_path / f"{name}-again") is None
        assert (tmp_path / f"{name}-again").read_bytes() == (tmp_path / name).read_bytes()


def test_metadata_that_contradict_themselves_are_refused() -> None:
    good: dict[str, Any] = {"role": "head", "shape": (3, 4), "dtype": "F32", "base_sha256": SHA, "base_shape": (2, 4)}
    assert WholeTensor(**good).parameters == 12
    for wrong in (
        {"role": "foot"},
        {"shape": (3, 0)},
        {"shape": [3, 4]},
        {"dtype": "U8"},
        {"base_sha256": "f"},
        {"base_shape": (2, 5)},
        {"base_shape": (2,)},
        {"role": "norm"},
    ):
        with pytest.raises(AdapterError):
            WholeTensor(**{**good, **wrong})


def test_tensors_that_do_not_fit_their_metadata_are_refused(adapters: dict[str, loraio.Adapter]) -> None:
    adapter = adapters["stats"]
    for name, change, error in (
        ("fc.bias", lambda t: t[:9], ShapeError),
        ("fc.bias", lambda t: t.double(), AdapterError),
        ("fc.bias", lambda t: t * float("nan"), AdapterError),
        ("norm1.num_batches_tracked", lambda t: t.float(), AdapterError),
    ):
        with pytest.raises(error, match=name):
            replace(adapter, tensors={**adapter.tensors, name: change(adapter.tensors[name])})
    with pytest.raises(AdapterError, match=r"'fc\.bias' is missing"):
        replace(adapter, tensors={name: t for name, t in adapter.tensors.items() if name != "fc.bias"})
    with pytest.raises(AdapterError, match="belongs to no target"):
        replace(adapter, tensors={**adapter.tensors, "more": torch.zeros(1)})
    entry = replace(adapter.whole["fc.bias"], shape=(8, 1, 3, 3), base_shape=(8, 1, 3, 3))
    whole = {**adapter.whole, "conv1.weight": entry}
    with pytest.raises(AdapterError, match="a target and a whole tensor"):
        replace(adapter, whole=whole, tensors={**adapter.tensors, "conv1.weight": torch.zeros(8, 1, 3, 3)})


# attached


def test_attach_swap_disable_and_detach_leave_no_trace(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits_test: loraio.Dataset
) -> None:
    images = digits_test.images[:16]
    plain = outputs(network, images)
    before = Everything(network)
    expected = {}
    for name, adapter in adapters.items():
        with loraio.attach(network, adapter):
            expected[name] = outputs(network, images)
            assert network.fc.out_features == (7 if name == "headless" else 10)  # type: ignore[union-attr]
        before.assert_same()
    live = loraio.attach(network, adapters["affine"])
    for name in ("frozen", "stats", "headless", "affine", "headless", "frozen"):
        live.swap(adapters[name])
        assert same_bits(outputs(network, images), expected[name])
        assert live.adapter is adapters[name]
        live.disable()
        assert same_bits(outputs(network, images), plain)
        assert network.fc.out_features == 7  # type: ignore[union-attr]
        assert list(loraio.base_state_dict(network)) == list(before.state)
        live.enable()
    live.detach()
    before.assert_same()


def test_attached_computes_what_merged_computes_and_verify_says_so(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits_test: loraio.Dataset
) -> None:
    images = digits_test.images[:64]
    for name, adapter in adapters.items():
        for strength in (1.0, -0.5):
            merged = loraio.merge(network.state_dict(), adapter, strength)
            report = loraio.verify(network.state_dict(), adapter, merged, strength, model=network, inputs=images)
            assert report.ok, name
            assert report.weights.replaced == len(adapter.whole)
            touched = len(adapter.targets) + len(adapter.whole)
            assert report.weights.untouched == len(network.state_dict()) - touched
            assert report.outputs is not None
            assert report.outputs.max_abs == 0
            assert report.outputs.effect > 0
        effect = loraio.merge_effect(network.state_dict(), merged, adapter)
        still = sum(same_bits(network.state_dict()[name], tensor) for name, tensor in adapter.tensors.items())
        assert effect.replaced == len(adapter.whole) - still > 1
        assert str(effect).endswith(f"; {effect.replaced} tensors replaced whole")


@pytest.mark.parametrize("name", ["fc.weight", "norm1.running_mean", "norm1.num_batches_tracked"])
def test_a_merge_that_lost_a_whole_tensor_is_caught(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits_test: loraio.Dataset, name: str
) -> None:
    adapter, state = adapters["stats"], network.state_dict()
    merged = loraio.merge(state, adapter)
    for wrong in (state[name], torch.zeros_like(merged[name]), merged[name].double()):
        report = loraio.verify(state, adapter, {**merged, name: wrong}, model=network, inputs=digits_test.images[:4])
        assert not report.ok
        told = r"must be" if wrong.dtype != merged[name].dtype or wrong.shape != merged[name].shape else "the adapter's"
        assert any(name in problem and told in problem for problem in report.weights.problems)


def test_statistics_do_not_drift_whatever_mode_the_model_is_set_to(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits: loraio.Dataset
) -> None:
    before = Everything(network)
    images = digits.images[:32]
    for adapter in adapters.values():
        for trainable in (False, True):
            with loraio.attach(network, adapter, trainable=trainable) as live:
                network.eval()
                expected = outputs(network, images)
                network.train()
                follows = trainable and adapter.training["hyperparameters"].get("norm", "frozen") != "frozen"
                assert same_bits(outputs(network, images), expected) != follows
                assert network.training
                live.disable()
                outputs(network, images)
                live.enable()
                loraio.evaluate(copy.deepcopy(network), digits) if adapter.heads else None
                assert network.training
                assert (live.adapter == adapter) != follows
            assert [module.training for module in network.modules()] == [True] * 7
            network.eval()
            before.assert_same()


def test_copies_and_casts_take_the_whole_tensors_along(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits_test: loraio.Dataset
) -> None:
    images = digits_test.images[:8]
    before = Everything(network)
    adapter = adapters["stats"]
    with loraio.attach(network, adapter) as live:
        expected = outputs(network, images)
        twin = copy.deepcopy(network)
        own = loraio.attachment_of(twin)
        own.detach()
        assert type(twin.norm1) is nn.BatchNorm2d  # type: ignore[union-attr]
        assert same_bits(outputs(network, images), expected)
        assert live.attached
    before.assert_same()
    other = loraio.attach(twin, adapter)
    twin.double()
    torch.testing.assert_close(outputs(twin, images.double()), expected.double(), rtol=1e-4, atol=1e-5)
    assert other.adapter == adapter
    other.detach()
    assert {tensor.dtype for tensor in twin.state_dict().values()} == {torch.float64, torch.int64}


def test_an_attached_model_is_not_pickled_wherever_pickling_begins(
    network: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    with loraio.attach(network, adapters["headless"]):
        for part in (network, network.norm1, network.conv1):
            with pytest.raises(StateError, match="adapter on it cannot be pickled"):
                pickle.dumps(part)
    pickle.dumps(network)


def test_a_compiled_model_has_no_graph_break(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits: loraio.Dataset
) -> None:
    torch._dynamo.reset()
    images = digits.images[:8]
    for name in ("frozen", "stats"):
        with loraio.attach(network, adapters[name]):
            compiled, counter = compiled_once(network)
            network.train()
            torch.testing.assert_close(outputs(compiled, images), outputs(network, images))
            network.eval()
        assert counter.frame_count >= 1


def test_saving_is_refused_when_something_outside_of_the_file_was_trained(
    network: nn.Module, adapters: dict[str, loraio.Adapter], digits: loraio.Dataset
) -> None:
    images, labels = digits.images[:32], digits.labels[:32]
    for adapter, fused in ((adapters["affine"], False), (adapters["frozen"], True)):
        for own in (True, False):
            model = copy.deepcopy(network)
            live = loraio.attach(model, adapter, trainable=True)
            optimizer = torch.optim.SGD(live.parameters() if own else model.parameters(), lr=0.01, fused=fused)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if own:
                assert live.adapter != adapter
                live.detach()
                assert live.adapter != adapter
            else:
                for _ in range(2):
                    with pytest.raises(StateError, match="of the base changed") as caught:
                        _ = live.adapter
                    assert "'conv1.weight' would be lost: it is outside of the adapter" in caught.value.problems
                    if live.attached:
                        live.detach()


# the wrong base


def test_another_base_is_refused_with_every_tensor_named(
    network: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    adapter = adapters["stats"]
    with torch.no_grad():
        network.norm1.running_mean.add_(1)  # type: ignore[operator,union-attr]
        network.fc.bias.add_(1)  # type: ignore[operator,union-attr]
    before = Everything(network)
    with pytest.raises(BaseMismatchError, match="2 of 10 targets and whole tensors differ") as caught:
        loraio.attach(network, adapter)
    assert caught.value.problems == ("'fc.bias': other values", "'norm1.running_mean': other values")
    before.assert_same()
    with loraio.attach(network, adapter, allow_base_mismatch=True):
        assert network.fc.out_features == 10  # type: ignore[union-attr]
    before.assert_same()


def test_roles_that_the_network_does_not_bear_out_are_refused(
    network: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    adapter, state = adapters["headless"], network.state_dict()
    entry = adapter.whole["norm1.running_mean"]
    for role, name, told in (
        ("norm", "conv1.bias", "'conv1.bias' is no tensor of a normalisation layer"),
        ("head", "norm3.weight", "'norm3' cannot be a head"),
    ):
        wrong = replace(
            entry, role=role, base_sha256=loraio.bases.identity.tensor_sha256(state[name]), shape=(8,), base_shape=(8,)
        )
        bad = replace(
            adapter, whole={**adapter.whole, name: wrong}, tensors={**adapter.tensors, name: state[name].detach()}
        )
        with pytest.raises(BaseMismatchError) as caught:
            loraio.attach(network, bad)
        assert told in str(caught.value)
    parametrized = copy.deepcopy(network)
    nn.utils.parametrizations.weight_norm(parametrized.get_submodule("fc"))
    with pytest.raises((BaseMismatchError, StateError)):
        loraio.attach(parametrized, adapters["frozen"])
