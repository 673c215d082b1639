"""Adapters that are trained together are those of separate runs, to the bit, with the same logs and side files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.errors import DataError, OutputExistsError, TrainingError
from loraio.training import loop
from loraio.training.optimizing import Moment, Optimization
from loraio.training.resuming import SideFile
from loraio.training.together import reason_to_part

DIGITS: list[int | None] = [3, 7, None]

CPU = torch.device("cpu")

Adapters = dict[int | None, loraio.Adapter]


class Killed(Exception):  # noqa: N818  # no error of the program
    """What stands for the kill."""


class Wide(nn.Module):
    """Of all sorts: a residual, normalisation, dropout, groups, pooling, one-point kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = F.max_pool2d(self.same(x).relu(), 2)
        y = self.deep(y)
        y += F.avg_pool2d(x, 2)
        y = torch.relu(self.last(F.gelu(self.point(y))))
        return self.fc(self.drop(y.mean((2, 3))).view(x.size(0), -1))  # type: ignore[no-any-return]


class Choosing(nn.Module):
    """A network whose forward method looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=4)
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            x = -x
        return self.fc(F.relu(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


class Reading(nn.Module):
    """A network that reads the weight of a layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=4)
        self.fc = nn.Linear(4 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(F.conv2d(x, self.conv.weight, stride=4)).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture
def apart_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of runs that went through `optimize`, one after another."""
    found: list[str] = []
    real = loop.optimize

    def look(model: Any, parameters: Any, batches: Any, dataset: Any, plan: Any, **options: Any) -> Any:
        found.append(plan.label)
        return real(model, parameters, batches, dataset, plan, **options)

    monkeypatch.setattr(loop, "optimize", look)
    return found


def apart(model: nn.Module, config: loraio.TrainConfig, digits: loraio.Dataset, **options: Any) -> Adapters:
    return {digit: loraio.train(model, replace(config, digit=digit), digits, **options) for digit in DIGITS}


def together(model: nn.Module, config: loraio.TrainConfig, digits: loraio.Dataset, **options: Any) -> Adapters:
    said: list[str] = []
    found = loraio.train_each(model, config, digits, digits=DIGITS, on_apart=said.append, **options)
    assert said == []
    return found


def assert_same_files(found: Adapters, expected: Adapters, folder: Path) -> None:
    assert list(found) == list(expected)
    for digit in found:
        for name, adapter in (("found", found[digit]), ("expected", expected[digit])):
            loraio.save(adapter, folder / name, overwrite=True)
        assert (folder / "found").read_bytes() == (folder / "expected").read_bytes(), digit


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 2, "alpha": 5, "scale_rule": "alpha/sqrt(r)", "targets": ("all",)},
        {"weight_decay": 0.1, "lora_plus": 4, "schedule": "cosine", "warmup": 2},
        {"clip_norm": 0.01, "accumulate": 3},
        {"heads": {"fc": 10}, "lr": 0.01},
        {"batch_size": 1, "focus": 1},
        {"targets": ("conv2",), "rank_pattern": {"conv2": 8}},
        {"val_share": 0.2, "val_every": 2, "patience": 1, "lr": 0.3},
    ],
)
def test_files_are_those_of_separate_runs_to_the_byte(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = loraio.TrainConfig(**{"steps": 7, "batch_size": 16, **settings})
    assert_same_files(together(base, config, digits), apart(base, config, digits), tmp_path)


def test_networks_of_all_sorts_and_those_that_draw_random_numbers_give_the_same_bytes(
    digits: loraio.Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Wide()
    config = loraio.TrainConfig(steps=5, batch_size=16, rank=2, targets=("all",), clamp_rank=True)
    assert_same_files(together(model, config, digits), apart(model, config, digits), tmp_path)


def test_a_base_in_double_precision_and_channels_last_trains_together_too(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path
) -> None:
    config = loraio.TrainConfig(steps=3, batch_size=16)
    for model in (copy.deepcopy(base).double(), base.to(memory_format=torch.channels_last)):  # type: ignore[call-overload]
        assert_same_files(together(model, config, digits), apart(model, config, digits), tmp_path)


def test_every_hook_of_a_network_is_called_for_each_adapter(base: nn.Module, digits: loraio.Dataset) -> None:
    called = []
    base.get_submodule("conv2").register_forward_hook(
        lambda module, given, output: called.append(torch.is_grad_enabled())
    )
    together(base, loraio.TrainConfig(steps=3, batch_size=16), digits)
    assert called.count(True) == 3 * len(DIGITS)


def test_runs_that_stop_early_leave_the_others_as_they_are(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path
) -> None:
    config = loraio.TrainConfig(steps=40, batch_size=16, val_share=0.2, val_every=2, patience=1, lr=0.003)
    found = together(base, config, digits)
    stops = {digit: adapter.training["validation"].get("stopped") for digit, adapter in found.items()}
    assert len(set(stops.values())) > 1, stops
    assert_same_files(found, apart(base, config, digits), tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_logs_and_side_files_say_what_those_of_separate_runs_say(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path, suffix: str
) -> None:
    config = loraio.TrainConfig(steps=5, batch_size=16, val_share=0.2, val_every=2)
    files = loraio.RunFiles(log=tmp_path / f"log{suffix}", checkpoint=tmp_path / "side.pt", checkpoint_every=2)
    reports: list[loraio.Progress] = []
    together(base, config, digits, files=files, on_progress=reports.append)
    for digit in DIGITS:
        alone = loraio.RunFiles(log=tmp_path / f"alone{suffix}", checkpoint=tmp_path / "alone.pt", overwrite=True)
        own: list[loraio.Progress] = []
        loraio.train(base, replace(config, digit=digit), digits, files=alone, on_progress=own.append)
        assert [report for report in reports if report.label == own[0].label] == own
        log, side = (tmp_path / f"{name}-digit-{digit}" for name in ("log", "side"))
        assert log.with_suffix(suffix).read_bytes() == (tmp_path / f"alone{suffix}").read_bytes()
        mine, other = (torch.load(path) for path in (side.with_suffix(".pt"), tmp_path / "alone.pt"))
        assert _flat(mine) == _flat(other)
    with pytest.raises(OutputExistsError):
        together(base, config, digits, files=files)


def _flat(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.dtype, state.tolist()
    if isinstance(state, dict):
        return {key: _flat(value) for key, value in state.items()}
    return [_flat(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize("killed_at", [1, 4, 5, 6, 7, 11])
def test_a_kill_between_any_two_side_files_and_a_resume_give_the_same_bytes(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    config = loraio.TrainConfig(steps=4, batch_size=16, schedule="cosine", lora_plus=2)
    files = loraio.RunFiles(log=tmp_path / "log.csv", checkpoint=tmp_path / "side.pt", checkpoint_every=1)
    whole = together(base, config, digits)
    real, writes = SideFile.__call__, []

    def die(self: SideFile, run: Any, moment: Any) -> bool:
        writes.append(moment.step)
        if len(writes) == killed_at:
            raise Killed
        return real(self, run, moment)

    monkeypatch.setattr(SideFile, "__call__", die)
    with pytest.raises(Killed):
        together(base, config, digits, files=files)
    monkeypatch.setattr(SideFile, "__call__", real)
    if killed_at == 1:  # nothing was written: the same command without --resume
        files = replace(files, overwrite=True)
    resumed = together(base, config, digits, files=replace(files, resume=killed_at > 1))
    assert_same_files(resumed, whole, tmp_path)
    lines = (tmp_path / "log-digit-3.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4"]


def test_a_run_that_was_begun_alone_goes_on_together(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loraio.TrainConfig(steps=6, batch_size=16)
    files = loraio.RunFiles(checkpoint=tmp_path / "side.pt", checkpoint_every=2)
    real = SideFile.__call__

    def die(self: SideFile, run: Any, moment: Any) -> bool:
        real(self, run, moment)
        if moment.step == 4:
            raise Killed
        return False

    monkeypatch.setattr(SideFile, "__call__", die)
    with pytest.raises(Killed):
        loraio.train(base, replace(config, digit=7), digits, files=files.of("digit-7"))
    monkeypatch.setattr(SideFile, "__call__", real)
    found = together(base, config, digits, files=replace(files, resume=True))
    assert_same_files(found, apart(base, config, digits), tmp_path)


@pytest.mark.parametrize("network", [Choosing, Reading])
def test_networks_that_look_at_values_or_weights_give_the_same_bytes(
    digits: loraio.Dataset, tmp_path: Path, network: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = network()
    config = loraio.TrainConfig(steps=3, batch_size=16)
    assert_same_files(together(model, config, digits), apart(model, config, digits), tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "dora"}, "kind dora"),
        ({"norm": "stats"}, "norm stats"),
        ({"amp": "bf16"}, "mixed precision"),
        ({"compile": True}, "torch.compile"),
        ({"steps": 2**21}, "all batches together are more than are drawn at once"),
    ],
)
def test_settings_that_have_no_place_in_one_loop_are_named(
    digits: loraio.Dataset, settings: dict[str, Any], reason: str
) -> None:
    config = loraio.TrainConfig(**{"steps": 4, **settings})
    assert reason_to_part(config, DIGITS, digits, CPU) == reason
    assert reason_to_part(loraio.TrainConfig(steps=4), DIGITS, digits, CPU) is None


def test_one_adapter_a_class_twice_and_other_devices_part_too(digits: loraio.Dataset) -> None:
    config = loraio.TrainConfig(steps=4)
    assert reason_to_part(config, [3], digits, CPU) == "there is only one"
    assert reason_to_part(config, [3, 3], digits, CPU) == "a class comes twice"
    assert reason_to_part(config, DIGITS, digits, torch.device("cuda")) == "device cuda"


def test_dora_is_trained_one_after_another_to_the_bytes_of_separate_runs(
    base: nn.Module, digits: loraio.Dataset, tmp_path: Path
) -> None:
    said: list[str] = []
    config = loraio.TrainConfig(steps=3, batch_size=16, kind="dora")
    found = loraio.train_each(base, config, digits, digits=DIGITS, on_apart=said.append)
    assert said == ["kind dora"]
    assert_same_files(found, apart(base, config, digits), tmp_path)


def test_a_class_that_is_not_there_stops_all_before_anything_is_trained(
    base: nn.Module, digits: loraio.Dataset, apart_only: list[str]
) -> None:
    with pytest.raises(DataError, match="no image of class 12"):
        loraio.train_each(base, loraio.TrainConfig(steps=2), digits, digits=[3, 12])
    assert apart_only == []


def test_a_loss_that_explodes_names_its_adapter_and_the_base_is_back(base: nn.Module, digits: loraio.Dataset) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(TrainingError, match="digit 3: the loss is"):
        loraio.train_each(base, loraio.TrainConfig(steps=30, lr=1e30), digits, digits=[3, 7])
    assert list(base.state_dict()) == list(before)
    assert all(value.equal(before[name]) for name, value in base.state_dict().items())


def test_one_that_learned_nothing_is_named_and_those_before_it_are_given(
    base: nn.Module, digits: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []
    real = Optimization.count

    def undone(self: Optimization, loss: Tensor, lr: float) -> Moment:
        if self.plan.label == "digit 7":
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.zero_() if name.endswith("lora_B") else None
        return real(self, loss, lr)

    monkeypatch.setattr(Optimization, "count", undone)
    config = loraio.TrainConfig(steps=3, batch_size=16)
    with pytest.raises(TrainingError, match="digit 7: the run learned nothing: 6 of 6 tensors did not move"):
        loraio.train_each(base, config, digits, digits=DIGITS, on_trained=lambda digit, adapter: given.append(digit))
    assert given == [3]
