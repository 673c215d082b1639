"""A run that was killed and resumed ends in the bytes of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.errors import BaseMismatchError, ConfigError, DataError, FormatError, MissingFileError, OutputExistsError
from loraio.training.resuming import SideFile
from loraio.training.run_files import MetricsLog
from loraio.training.validation import Validation

CONFIG = loraio.TrainConfig(digit=3, steps=12, batch_size=8, warmup=2, schedule="cosine")


class Killed(Exception):  # noqa: N818  # no error of the program
    """Stands for the kill."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a run die right after a step, when all of its files are written."""

    @contextmanager
    def killing(step: int) -> Iterator[None]:
        real = SideFile.__call__

        def look(self: SideFile, run: Any, moment: Any) -> bool:
            real(self, run, moment)
            if moment.step == step:
                raise Killed
            return False

        with monkeypatch.context() as patch:
            patch.setattr(SideFile, "__call__", look)
            yield

    return killing


@pytest.fixture
def model() -> nn.Module:
    """A network that trains fast."""
    torch.manual_seed(0)
    return WithDropout().eval()


def bytes_of(adapter: loraio.Adapter, folder: Path) -> bytes:
    loraio.save(adapter, folder / "saved.safetensors", overwrite=True)
    return (folder / "saved.safetensors").read_bytes()


class WithDropout(nn.Module):
    """A small network that draws from the global generator while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.4)
        self.fc = nn.Linear(392, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.drop(self.norm(self.conv(x)).relu().flatten(1)))
        return logits


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "weight_decay": 0.1, "lora_plus": 4, "clip_norm": 0.5, "accumulate": 2, "val_share": 0.1, "val_every": 2,
        "patience": 50, "amp": "bf16", "targets": ("all",), "digit": None,
    },
    "dora": {"kind": "dora"},
    "head and statistics": {
        "heads": {"fc": 10}, "norm": "affine", "val_share": 0.1, "val_every": 2, "patience": 50, "digit": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("step", [5, 7])
def test_a_run_that_died_and_resumed_ends_in_the_same_bytes(
    model: nn.Module, few: loraio.Dataset, tmp_path: Path, killed_at: Any, settings: Any, step: int
) -> None:
    config = replace(CONFIG, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = bytes_of(loraio.train(model, config, few), tmp_path)
    files = loraio.RunFiles(checkpoint=tmp_path / "side.pt", checkpoint_every=5)
    with killed_at(step), pytest.raises(Killed):
        loraio.train(model, config, few, files=files)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())
    for _ in range(2):  # the second time from the end of the run, with other random numbers around it
        resumed = loraio.train(model, config, few, files=replace(files, resume=True))
        assert bytes_of(resumed, tmp_path) == whole
        torch.rand(5)


def test_a_run_that_stopped_early_does_not_continue(
    model: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "_measure", lambda self, step: (1.0 + abs(step - 5), 0.5))
    config = replace(CONFIG, steps=200, warmup=0, val_share=0.1, val_every=1, patience=2)
    files = loraio.RunFiles(checkpoint=tmp_path / "side.pt", log=tmp_path / "log.jsonl")
    whole = loraio.train(model, config, few, files=files)
    assert whole.training["validation"]["stopped"] == 7
    log = (tmp_path / "log.jsonl").read_bytes()
    assert loraio.train(model, config, few, files=replace(files, resume=True)) == whole
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_side_files_are_written_in_time_and_whole(
    model: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: (steps.append(state["run"]["done"]), real(state, path)))
    files = loraio.RunFiles(checkpoint=tmp_path / "side.pt", checkpoint_every=5)
    adapter = loraio.train(model, CONFIG, few, files=files)
    assert steps == [5, 10, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["side.pt"]
    assert adapter == loraio.train(model, CONFIG, few)  # and nothing of it is in the adapter


@pytest.fixture
def others(digits_test: loraio.Dataset) -> loraio.Dataset:
    """A few of the embedded digits that test."""
    return replace(digits_test, images=digits_test.images[:120], labels=digits_test.labels[:120])


@pytest.fixture
def side(model: nn.Module, few: loraio.Dataset, tmp_path: Path) -> loraio.RunFiles:
    """The side file of a finished run."""
    loraio.train(model, CONFIG, few, files=loraio.RunFiles(checkpoint=tmp_path / "side.pt"))
    return loraio.RunFiles(checkpoint=tmp_path / "side.pt", resume=True)


def test_a_side_file_of_another_run_is_refused_by_name(
    model: nn.Module, few: loraio.Dataset, others: loraio.Dataset, side: loraio.RunFiles
) -> None:
    changed = replace(few, images=few.images.roll(1, 0))
    settings = ("steps is 13, there it was 12", "lr is 0.5, there it was 0.001")
    data = ("the data set is 'digits', test; there it was 'digits', train",)
    both = ("seed is 2, there it was 1", *data)
    for base, config, dataset, error, message, problems in (
        (model, replace(CONFIG, lr=0.5, steps=13), few, ConfigError, "other settings", settings),
        (model, CONFIG, others, DataError, "other data", data),
        (model, CONFIG, changed, DataError, "other data", ("the data set is other images or labels",)),
        (WithDropout(), CONFIG, few, BaseMismatchError, "the base model's digest is", None),
        (model, replace(CONFIG, seed=2), others, ConfigError, "other settings and data", both),
    ):
        with pytest.raises(error, match=message) as caught:
            loraio.train(base, config, dataset, files=side)
        assert problems in (None, caught.value.problems)
        assert "side.pt" in str(caught.value)
    loraio.attach(model, loraio.new_adapter(model, CONFIG)).detach()


def test_other_files_are_no_side_files(
    model: nn.Module, few: loraio.Dataset, side: loraio.RunFiles, tmp_path: Path
) -> None:
    path = tmp_path / "side.pt"
    whole = torch.load(path, weights_only=True)
    broken: dict[str, Any] = {
        "not a side file": {"conv1.weight": torch.zeros(1)},
        "version 2": {**whole, "loraio_run": 2},
        "to which run": {**whole, "identity": 3},
        "is incomplete": {**whole, "run": {"done": 3}},
    }
    for message, state in broken.items():
        torch.save(state, path)
        with pytest.raises(FormatError, match=message) as caught:
            loraio.train(model, CONFIG, few, files=side)
        assert "side.pt" in str(caught.value)
    path.write_bytes(b"other bytes")
    with pytest.raises(FormatError, match="not a side file"):
        loraio.train(model, CONFIG, few, files=side)
    path.unlink()
    with pytest.raises(MissingFileError, match="does not exist"):
        loraio.train(model, CONFIG, few, files=side)


def test_an_existing_side_file_is_kept_unless_told_otherwise(
    model: nn.Module, few: loraio.Dataset, tmp_path: Path
) -> None:
    (tmp_path / "side.pt").write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        loraio.train(model, CONFIG, few, files=loraio.RunFiles(checkpoint=tmp_path / "side.pt"))
    assert (tmp_path / "side.pt").read_bytes() == b"mine"
    loraio.train(model, CONFIG, few, files=loraio.RunFiles(checkpoint=tmp_path / "side.pt", overwrite=True))


def test_several_runs_resume_each_from_its_own_side_file(
    model: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loraio.train_each(model, CONFIG, few, digits=[3, 4])
    files = loraio.RunFiles(checkpoint=tmp_path / "side.pt", log=tmp_path / "log.csv", checkpoint_every=5)
    real = MetricsLog.__call__
    deaths = iter([False] * 18 + [True] + [False] * 99)

    def look(self: MetricsLog, run: Any, moment: Any) -> bool:
        if next(deaths):
            raise Killed
        return real(self, run, moment)

    monkeypatch.setattr(MetricsLog, "__call__", look)
    with pytest.raises(Killed):
        loraio.train_each(model, CONFIG, few, digits=[3, 4], files=files)
    assert loraio.train_each(model, CONFIG, few, digits=[3, 4], files=replace(files, resume=True)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log-digit-3.csv", "log-digit-4.csv", "side-digit-3.pt", "side-digit-4.pt",
    ]  # fmt: skip
    for digit in (3, 4):
        lines = (tmp_path / f"log-digit-{digit}.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 13))]
    missing = loraio.RunFiles(checkpoint=tmp_path / "no.pt", resume=True)
    with pytest.raises(MissingFileError):
        loraio.train_each(model, CONFIG, few, digits=[3, 4], files=missing)


@pytest.mark.slow
def test_a_process_that_was_killed_resumes_to_the_same_bytes(
    base: nn.Module, digits: loraio.Dataset, digits_test: loraio.Dataset, files: Path, tmp_path: Path
) -> None:
    side, log, output = (tmp_path / name for name in ("side.pt", "log.jsonl", "killed.safetensors"))
    words = [sys.executable, "-m", "loraio", "train", files / "base.safetensors", "--digit", "3", "--json"]
    words += ["--dataset", "digits", "--steps", "120", "--batch-size", "8", "--checkpoint-every", "10"]
    words += ["-o", output, "--checkpoint", side, "--log", log]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert 20 <= torch.load(side, weights_only=True)["run"]["done"] < 120
    config = loraio.TrainConfig(digit=3, steps=120, batch_size=8)
    run_files = loraio.RunFiles(checkpoint=side, log=log, resume=True)
    resumed = loraio.train(base, config, digits, held_out=digits_test, files=run_files)
    assert log.read_bytes().count(b"\n") == 120
    whole = loraio.train(base, config, digits, held_out=digits_test)
    assert bytes_of(resumed, tmp_path) == bytes_of(whole, tmp_path)
