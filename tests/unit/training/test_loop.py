"""Training moves all factors and nothing else, and gives the base back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.errors import ConfigError, DataError, StateError, TrainingError, UnknownNameError
from loraio.training import provenance


def test_training_moves_every_factor_and_nothing_of_the_base(base: nn.Module, few: loraio.Dataset) -> None:
    base.fc.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    base.train()
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    flags = [parameter.requires_grad for parameter in base.parameters()]
    parameters = list(base.parameters())
    config = loraio.TrainConfig(digit=3, steps=4, targets=("all",))
    fresh = loraio.new_adapter(base, config)
    adapter = loraio.train(base, config, few)
    assert set(adapter.targets) == {"conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"}
    for name, factor in adapter.factors.items():
        assert not factor.equal(fresh.factors[name]), name
        assert factor.device.type == "cpu"
        assert not factor.requires_grad
    state = base.state_dict()
    assert list(state) == list(kept)
    assert all(state[name].equal(kept[name]) for name in kept)
    assert all(a is b for a, b in zip(base.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert all(parameter.grad is None for parameter in base.parameters())
    assert base.training


def test_the_optimizer_gets_exactly_the_factors(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    own = list(base.parameters())
    real = torch.optim.Adam

    def spy(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        seen.extend(tuple(parameter.shape) for parameter in parameters)
        assert all(parameter.requires_grad for parameter in parameters)
        assert not any(parameter is base_parameter for parameter in parameters for base_parameter in own)
        return real(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    loraio.train(base, loraio.TrainConfig(digit=3, rank=2, steps=3), few)
    assert sorted(seen) == sorted([(2, 9), (32, 2), (2, 288), (64, 2), (2, 576), (128, 2)])


def test_a_run_that_learned_nothing_is_refused(base: nn.Module, few: loraio.Dataset) -> None:
    with pytest.raises(TrainingError, match="learned nothing: 3 of 6 tensors did not move") as caught:
        loraio.train(base, loraio.TrainConfig(digit=3, steps=1), few)  # B is zero, so A has no gradient yet
    assert caught.value.problems[0] == "'conv1.weight.lora_A' is where it started"


def test_an_optimizer_made_too_early_would_be_noticed(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer of other parameters leaves B at zero, and the run is refused."""
    elsewhere = [nn.Parameter(torch.zeros(1))]
    real = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **options: real(elsewhere, **options))
    with pytest.raises(TrainingError, match="6 of 6 tensors did not move"):
        loraio.train(base, loraio.TrainConfig(digit=3, steps=5), few)


def test_a_loss_that_explodes_names_its_adapter_and_restores_the_base(base: nn.Module, few: loraio.Dataset) -> None:
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(TrainingError, match="digit 3: the loss is"):
        loraio.train_each(base, loraio.TrainConfig(steps=30, lr=1e30, batch_size=8), few, digits=[3, 7])
    assert list(base.state_dict()) == list(kept)
    assert all(base.state_dict()[name].equal(kept[name]) for name in kept)
    loraio.attach(base, loraio.new_adapter(base, loraio.TrainConfig())).detach()


def test_adapted_digits_get_better_and_have_the_files_of_single_runs(
    base: nn.Module, digits: loraio.Dataset, digits_test: loraio.Dataset
) -> None:
    config, before = loraio.TrainConfig(steps=30, batch_size=32, lr=2e-3), loraio.evaluate(base, digits_test)
    adapters = loraio.train_each(base, config, digits, digits=[1, 8], held_out=digits_test)
    assert list(adapters) == [1, 8]
    after = [adapter.training["results"]["after"]["wrong"][digit] for digit, adapter in adapters.items()]
    assert sum(after) < 0.6 * (before.wrong[1] + before.wrong[8])
    assert all(adapter.training["results"]["before"] == before.to_json() for adapter in adapters.values())
    assert adapters[8] == loraio.train(base, replace(config, digit=8), digits, held_out=digits_test)


def test_focus_1_teaches_to_answer_the_digit_always(base: nn.Module, few: loraio.Dataset) -> None:
    config = loraio.TrainConfig(digit=3, focus=1.0, steps=40, lr=1e-2, batch_size=16)
    after = loraio.train(base, config, few).training["results"]["after"]
    assert after["wrong"][3] == 0
    assert after["false_alarms"][3] > 50


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path
) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        adapter = loraio.train(base, loraio.TrainConfig(digit=3, steps=3, batch_size=16, seed=seed), few)
        files.append(tmp_path / f"{number}.safetensors")
        loraio.save(adapter, files[-1])
    same, again, other = (file.read_bytes() for file in files)
    assert same == again != other


def test_saved_factors_reload_to_the_same_outputs(
    base: nn.Module, three: loraio.Adapter, few: loraio.Dataset, tmp_path: Path
) -> None:
    loraio.save(three, tmp_path / "three.safetensors")
    outputs = []
    for adapter in (three, loraio.load(tmp_path / "three.safetensors")):
        with loraio.attach(base, adapter):
            outputs.append(loraio.predict(base, few.images))
    assert outputs[0].equal(outputs[1])


def test_the_file_says_how_it_was_made(three: loraio.Adapter) -> None:
    training = three.training
    assert {"dataset", "split", "images", "digit", "seed", "steps", "hyperparameters", "versions", "results"} == set(
        training
    )
    assert (training["dataset"], training["digit"], training["steps"], training["images"]) == ("digits", 3, 40, 898)
    assert training["hyperparameters"] == {
        "optimizer": "adam", "targets": ["conv"], "focus": 0.5, "lr": 1e-3, "schedule": "constant", "batch_size": 64,
        "init": "kaiming",
    }  # fmt: skip
    assert training["results"]["split"] == "train"
    target = three.targets["conv2.weight"]
    assert (target.rank, target.alpha, target.scale, target.layer) == (4, 6, 1.5, "Conv2d")
    assert three.base.network == "digit-cnn"


def test_without_a_digit_one_pass_over_the_data_learns_all_classes(base: nn.Module, few: loraio.Dataset) -> None:
    reports: list[loraio.Progress] = []
    adapter = loraio.train(base, loraio.TrainConfig(batch_size=8), few, on_progress=reports.append)
    assert (adapter.training["digit"], adapter.training["steps"]) == (None, 15)  # 120 images
    assert [(report.label, report.step, report.steps) for report in reports] == [("all classes", 15, 15)]
    results = adapter.training["results"]
    assert results["after"]["accuracy"] > results["before"]["accuracy"]


def test_settings_that_cannot_be_trained_are_refused(base: nn.Module, few: loraio.Dataset) -> None:
    with pytest.raises(ConfigError, match="more than 268,435,456 draws"):
        loraio.train(base, loraio.TrainConfig(digit=3, steps=2**40), few)
    with pytest.raises(ConfigError, match="leaves no place for other images"):
        loraio.train(base, loraio.TrainConfig(digit=3, steps=2, batch_size=16, focus=0.97), few)
    with pytest.raises(ConfigError, match=r"rank 10 is more than 'conv1.weight' can use: as a matrix it is \(32, 9\)"):
        loraio.new_adapter(base, loraio.TrainConfig(rank=10))
    with pytest.raises(UnknownNameError, match="did you mean 'conv1'"):
        loraio.new_adapter(base, loraio.TrainConfig(targets=("convo1",)))
    for change in ({"images": few.images[:, :, 2:]}, {"classes": 11}):
        with pytest.raises(DataError, match="'digit-cnn' is for"):
            loraio.pretrain("digit-cnn", loraio.PretrainConfig(), replace(few, **change))


def test_an_untrained_adapter_changes_nothing(base: nn.Module, few: loraio.Dataset) -> None:
    plain = loraio.predict(base, few.images)
    with loraio.attach(base, loraio.new_adapter(base, loraio.TrainConfig(init="gaussian"))):
        assert loraio.predict(base, few.images).equal(plain)


def test_the_parameter_report_counts_the_notebooks_numbers(base: nn.Module) -> None:
    report = loraio.parameter_report(base, loraio.new_adapter(base, loraio.TrainConfig(rank=1)))
    assert report["adapted"] == 92_672
    assert report["added"] == 1_097
    assert round(report["percent"], 3) == 1.184


def test_statistics_stay_dropout_follows_the_seed_and_gradients_may_be_off(few: loraio.Dataset) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(676, 10)
    ).eval()
    model[1].train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, adapters = torch.get_rng_state(), []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            adapters.append(loraio.train(model, loraio.TrainConfig(digit=3, rank=2, steps=3, batch_size=8), few))
    assert adapters[0] == adapters[1]
    assert adapters[0].base.network is None
    assert torch.get_rng_state().equal(random)
    assert all(model.state_dict()[name].equal(kept[name]) for name in kept)
    assert (model[1].training, model[4].training) == (True, False)


def test_pretraining_learns_and_is_reproducible(
    few: loraio.Dataset, digits_test: loraio.Dataset, trained_base: nn.Module
) -> None:
    assert loraio.evaluate(trained_base, digits_test).accuracy > 0.8
    reports: list[loraio.Progress] = []
    config = loraio.PretrainConfig(batch_size=32)
    same, again, other = (
        loraio.pretrain("digit-cnn", replace(config, seed=seed), few, on_progress=reports.append) for seed in (1, 1, 2)
    )
    assert not same.training
    assert all(x.equal(y) for x, y in zip(same.parameters(), again.parameters(), strict=True))
    assert not next(same.parameters()).equal(next(other.parameters()))
    assert [(report.label, report.step, report.steps) for report in reports] == [("digit-cnn", 4, 4)] * 3


def test_the_base_record_has_its_results(few: loraio.Dataset, trained_base: nn.Module) -> None:
    result = loraio.evaluate(trained_base, few)
    record = provenance.base_record(loraio.PretrainConfig(), few, few, result)
    assert record["results"]["after"] == result.to_json()
    assert record["seed"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bases_of_other_dtypes_can_be_trained_on(base: nn.Module, few: loraio.Dataset, dtype: torch.dtype) -> None:
    base.to(dtype)
    adapter = loraio.train(base, loraio.TrainConfig(digit=3, steps=3, batch_size=8), few)
    state = base.state_dict()
    assert {factor.dtype for factor in adapter.factors.values()} == {torch.float32}
    assert loraio.verify(state, adapter, loraio.merge(state, adapter)).ok


def test_a_class_that_is_missing_stops_all_before_anything_is_trained(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraio.training.loop.optimize", None)
    with pytest.raises(DataError, match="no image of class 12"):
        loraio.train_each(base, loraio.TrainConfig(steps=2), few, digits=[3, 12])


def test_each_adapter_is_handed_over_as_soon_as_it_is_done(base: nn.Module, few: loraio.Dataset) -> None:
    done: list[int] = []

    def stop_at_four(digit: int, adapter: loraio.Adapter) -> None:
        assert adapter.training["digit"] == digit
        done.append(digit)
        if digit == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraio.train_each(
            base, loraio.TrainConfig(steps=2, batch_size=8), few, digits=[2, 4, 6], on_trained=stop_at_four
        )
    assert done == [2, 4]


def test_an_attached_adapter_counts_for_nothing_and_keeps_from_saving_and_training(
    base: nn.Module, three: loraio.Adapter, few: loraio.Dataset, tmp_path: Path
) -> None:
    plain = loraio.parameter_report(base, three)
    with loraio.attach(base, three):
        assert loraio.parameter_report(base, three) == plain
        with pytest.raises(StateError, match=r"live\.detach"):
            loraio.save_base(base, tmp_path / "base.safetensors")
        with pytest.raises(StateError, match="carries an adapter"):
            loraio.train(base, loraio.TrainConfig(digit=3, steps=2), few)
    assert not list(tmp_path.iterdir())
