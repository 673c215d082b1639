"""The metrics log, TensorBoard, and refusals before a run."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
from torch import nn

import loraio
from loraio.errors import ConfigError, OutputError, OutputExistsError
from loraio.training.run_files import COLUMNS

CONFIG = loraio.TrainConfig(digit=3, steps=5, batch_size=8, val_share=0.1, val_every=2, warmup=2)


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def test_the_log_has_a_line_for_every_step_and_the_same_figures_in_both_forms(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path
) -> None:
    names = ("LOG.CSV", "log.jsonl")
    adapters = [loraio.train(base, CONFIG, few, files=loraio.RunFiles(log=tmp_path / name)) for name in names]
    found, other = (rows(tmp_path / name) for name in names)
    assert found == other
    assert [tuple(row) for row in found] == [COLUMNS] * 5
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in found] == [0.0005, 0.001, 0.001, 0.001, 0.001]
    assert all(0 < row["loss"] < 20 for row in found)
    assert [row["val_loss"] is None for row in found] == [True, False, True, False, False]
    last = adapters[0].training["validation"]
    assert (found[-1]["val_loss"], found[-1]["val_accuracy"]) == (last["loss"], last["accuracy"])
    assert adapters == [loraio.train(base, CONFIG, few)] * 2


def test_files_that_cannot_be_written_are_refused_before_the_run(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.csv or \.jsonl"):
        loraio.RunFiles(log="log.txt")
    with pytest.raises(ConfigError, match="nothing to resume from"):
        loraio.RunFiles(resume=True)
    with pytest.raises(ConfigError, match="checkpoint_every is 0"):
        loraio.RunFiles(checkpoint="a.pt", checkpoint_every=0)
    monkeypatch.setattr("loraio.training.loop.optimize", None)
    (tmp_path / "log.csv").write_text("mine")
    with pytest.raises(OutputExistsError):
        loraio.train(base, CONFIG, few, files=loraio.RunFiles(log=tmp_path / "log.csv"))
    with pytest.raises(OutputError, match="does not exist"):
        loraio.train(base, CONFIG, few, files=loraio.RunFiles(log=tmp_path / "no/log.csv"))
    assert (tmp_path / "log.csv").read_text() == "mine"


def test_a_full_disk_is_an_output_error(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loraio.training.run_files.json", types.SimpleNamespace(dumps=full))
    with pytest.raises(OutputError, match=r"log.jsonl' cannot be written: No space left on device"):
        loraio.train(base, CONFIG, few, files=loraio.RunFiles(log=tmp_path / "log.jsonl"))
    loraio.attach(base, loraio.new_adapter(base, CONFIG)).detach()


def test_tensorboard_gets_the_same_figures(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Mock()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    files = loraio.RunFiles(log=tmp_path / "log.csv", tensorboard=tmp_path / "board")
    loraio.train(base, CONFIG, few, files=files)
    found = rows(tmp_path / "log.csv")
    figures = [call().add_scalar(n, row[n], row["step"]) for row in found for n in COLUMNS[1:] if row[n] is not None]
    opened = call(log_dir=str(tmp_path / "board"), purge_step=1)
    assert module.SummaryWriter.mock_calls == [opened, *figures, call().close()]


def test_without_tensorboard_the_error_says_what_to_install(
    base: nn.Module, few: loraio.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard cannot be imported") as caught:
        loraio.train(base, CONFIG, few, files=loraio.RunFiles(tensorboard=tmp_path))
    assert "pip install tensorboard" in str(caught.value)
