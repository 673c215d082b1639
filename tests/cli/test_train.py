"""Test ``loraio train``: one digit, all digits, and refusals before the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from running import Run, RunJson
from torch import nn

import loraio

BASICS = ("--dataset", "digits", "--steps", "3", "--batch-size", "16")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training or reading of images fail."""
    for name in ("train_each", "load_dataset"):
        getattr(loraio, name)
        monkeypatch.setattr(loraio, name, None)


def test_the_adapter_is_that_of_the_library_and_its_results_are_printed(
    run: Run, files: Path, tmp_path: Path, base: nn.Module, digits: loraio.Dataset, digits_test: loraio.Dataset
) -> None:
    path = tmp_path / "five.safetensors"
    result = run("train", files / "base.safetensors", "--digit", 5, "-o", path, *BASICS)
    adapter = loraio.load(path)
    config = loraio.TrainConfig(digit=5, steps=3, batch_size=16)
    assert adapter == loraio.train(base, config, digits, held_out=digits_test)
    results = adapter.training["results"]
    (row,) = [line for line in result.stdout.splitlines() if line.strip().startswith(str(path))]
    assert row.split()[-4:] == [
        str(results["before"]["wrong"][5]),
        str(results["after"]["wrong"][5]),
        f"{results['before']['accuracy']:.2%}",
        f"{results['after']['accuracy']:.2%}",
    ]
    assert "92,672 parameters in the adapted layers, 4,388 added: 4.735 %" in result.stdout
    assert result.stderr.startswith("digit 5: step 3/3, loss ")


def test_json_has_the_documented_keys(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "five.safetensors"
    found = run_json("train", files / "base.safetensors", "--digit", 5, "-o", path, *BASICS, "--rank", 1)
    assert found.keys() == {"schema", "base", "stripped", "parameters", "adapters"}
    percent = pytest.approx(1.1837, abs=1e-4)
    assert found["parameters"] == {"adapted": 92_672, "added": 1_097, "percent": percent, "replaced": 0}
    (row,) = found["adapters"]
    assert row.keys() == {"file", "digit", "bytes", "before", "after"}
    assert (row["file"], row["digit"], row["bytes"]) == (str(path), 5, path.stat().st_size)
    assert row["before"].keys() == {"accuracy", "wrong", "false_alarms"}
    assert row["after"] == loraio.load(path).training["results"]["after"]


SEVEN = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 7))
"""


def test_a_head_and_statistics_of_its_own(
    run: Run, run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go from a base of seven classes to an adapter of ten, through every command for it."""
    base, adapter, merged = (tmp_path / f"{name}.safetensors" for name in ("base", "adapter", "merged"))
    (tmp_path / "net_of_seven.py").write_text(SEVEN)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--model", "net_of_seven:net")
    loraio.save_base(loraio.build_network("net_of_seven:net", seed=1), base)
    asked = ("--head", "4=10", "--norm", "stats", "--targets", "conv")
    planned = run_json("targets", base, *own, *asked)["whole"]
    names = ["4.weight", "4.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(planned) == names
    assert planned["4.weight"] == {
        "role": "head", "dtype": "F32", "shape": [10, 392], "base_shape": [7, 392], "parameters": 3920,
    }  # fmt: skip
    assert "head 4: 10 outputs, in the base 7; replaced whole" in run("targets", base, *own, *asked).stdout
    out = run("train", base, "-o", adapter, *own, *asked, "--dataset", "digits", "--steps", 3).stdout
    assert "3,947 numbers in tensors that are replaced whole" in out
    assert run_json("inspect", adapter)["whole"] == planned
    assert "normalisation: 17 numbers of 1 layers" in run("inspect", adapter).stdout
    found = run_json("evaluate", base, *own, "--adapter", adapter, "--dataset", "digits")
    assert found["base"] is None
    assert found["adapters"]["adapter"] == loraio.load(adapter).training["results"]["after"]
    assert "base " not in run("evaluate", base, *own, "--adapter", adapter, "--dataset", "digits").stdout
    facts = run_json("merge", base, adapter, "-o", merged)
    assert facts["replaced"] == facts["landing"]["replaced"] == 5
    assert (
        "1 tensors folded, 5 replaced, 3 left bit-identical"
        in run("merge", base, adapter, "-o", merged, "--force").stdout
    )
    assert run_json("inspect", merged)["heads"] == {"4": 10}
    checked = run_json("verify", base, adapter, merged, *own, "--dataset", "digits")
    assert (checked["ok"], checked["weights"]["replaced"]) == (True, 5)
    assert loraio.load_base(merged, model="net_of_seven:net")[4].out_features == 10  # type: ignore[index]
    assert "'4=x' is not NAME=CLASSES" in run("train", base, "-o", tmp_path / "x", *own, "--head", "4=x", code=2).stderr


def test_all_makes_ten_files_and_resumes_over_those_that_a_killed_run_has_finished(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path
) -> None:
    folder, side = tmp_path / "all", tmp_path / "side.pt"
    names = [f"digit-{n}.safetensors" for n in range(10)]
    folder.mkdir()
    (folder / names[4]).write_bytes(b"old")
    words = ("train", files / "base.safetensors", "--digit", "all", "-o", folder, *BASICS, "--checkpoint", side)
    found = run_json(*words, "--force")
    assert [row["digit"] for row in found["adapters"]] == list(range(10))
    assert [loraio.load(folder / name).training["digit"] for name in names] == list(range(10))
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(made) == names
    for n in (7, 8, 9):  # as if it was killed between two digits
        (folder / names[n]).unlink()
        (tmp_path / f"side-digit-{n}.pt").unlink()
    assert run_json(*words, "--resume") == found
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == made
    (tmp_path / "side-digit-3.pt").unlink()
    assert "digit-3.safetensors' exists" in run(*words, "--resume", code=1).stderr


def test_an_existing_output_is_refused_before_training_and_replaced_with_force(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "five.safetensors"
    path.write_bytes(b"mine")
    words = ("train", files / "base.safetensors", "--digit", 5, "-o", path, *BASICS)
    with monkeypatch.context() as patch:
        patch.setattr(loraio, "load_dataset", None)
        assert "--force" in run(*words, code=1).stderr
        assert run_json(*words, code=1)["error"] == "OutputExistsError"
    assert path.read_bytes() == b"mine"
    run(*words, "--force")
    assert loraio.load(path).training["digit"] == 5


def test_a_folder_with_one_of_the_files_is_refused_even_with_force_if_it_is_the_base(
    run: Run, files: Path, tmp_path: Path, no_training: None
) -> None:
    base = tmp_path / "digit-4.safetensors"
    shutil.copy(files / "base.safetensors", base)
    words = ("train", base, "--digit", "all", "-o", tmp_path, *BASICS)
    assert "digit-4.safetensors" in run(*words, code=1).stderr
    assert "is also an input" in run(*words, "--force", code=1).stderr
    assert list(tmp_path.iterdir()) == [base]
    assert base.read_bytes() == (files / "base.safetensors").read_bytes()


def test_folders_for_files_and_files_for_folders_are_refused(
    run: Run, files: Path, tmp_path: Path, no_training: None
) -> None:
    (tmp_path / "file").write_bytes(b"")
    words = ("train", files / "base.safetensors", "--digit", "all", *BASICS, "-o")
    assert "is a folder" in run(*words, tmp_path / "file", code=1).stderr
    assert "does not exist" in run(*words, tmp_path / "no" / "ten", code=1).stderr
    assert "is a folder" in run("train", files / "base.safetensors", "--digit", 5, "-o", tmp_path, code=1).stderr


def test_every_option_arrives_in_the_file(run: Run, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "five.safetensors"
    options: dict[str, object] = {
        "targets": "conv,fc", "exclude": "conv1", "kind": "dora", "scale-rule": "alpha/sqrt(r)", "warmup": 1,
        "weight-decay": 0.01, "lora-plus": 4, "clip-norm": 1.5, "accumulate": 2, "val-share": 0.1, "val-every": 2,
        "patience": 5, "amp": "bf16", "device": "cpu", "focus": 0.75, "lr": 0.002, "init": "gaussian", "seed": 9,
        "schedule": "cosine",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    ranks = ("--rank", 3, "--rank", "conv2=2", "--alpha", 6, "--alpha", "conv3=1.5", "--clamp-rank")
    run("train", files / "base.safetensors", "--digit", 5, "-o", path, *BASICS, *words, *ranks)
    adapter = loraio.load(path)
    found = {name: (target.rank, target.alpha) for name, target in adapter.targets.items()}
    assert found == {"conv2.weight": (2, 6), "conv3.weight": (3, 1.5), "fc.weight": (3, 6)}
    assert {(target.kind, target.scale_rule) for target in adapter.targets.values()} == {("dora", "alpha/sqrt(r)")}
    training = adapter.training
    assert (training["steps"], training["seed"], training["dataset"]) == (3, 9, "digits")
    elsewhere = ("kind", "scale-rule", "seed")
    expected = {name.replace("-", "_"): value for name, value in options.items() if name not in elsewhere}
    expected |= {"targets": ["conv", "fc"], "exclude": ["conv1"], "batch_size": 16, "optimizer": "adamw"}
    expected |= {"rank_pattern": {"conv2": 2}, "alpha_pattern": {"conv3": 1.5}, "clamp_rank": True}
    assert training["hyperparameters"] == expected
    assert training["validation"]["images"] == 90


def test_without_a_digit_all_classes_are_fitted(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    found = run_json("train", files / "base.safetensors", "-o", path, *BASICS)
    (row,) = found["adapters"]
    assert row["digit"] is None
    assert loraio.load(path).training["digit"] is None
    out = run("train", files / "base.safetensors", "-o", path, *BASICS, "--force").stdout
    assert "misread: of all classes" in out
    assert f" {sum(row['after']['wrong'])} " in out


def test_a_class_can_be_named(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    words = ("train", files / "base.safetensors", *BASICS, "-o")
    run(*words, tmp_path / "number.safetensors", "--digit", 5)
    run(*words, tmp_path / "name.safetensors", "--class", "5")
    assert (tmp_path / "number.safetensors").read_bytes() == (tmp_path / "name.safetensors").read_bytes()
    assert "no class 'five'" in run(*words, tmp_path / "x.safetensors", "--class", "five", code=1).stderr
    both = run_json(*words, tmp_path / "x.safetensors", "--digit", 5, "--class", "5", code=2)
    assert "exclude each other" in both["message"]


def test_an_image_folder_trains_and_is_evaluated(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    digits = loraio.load_dataset("digits", "train")
    for n, (image, label) in enumerate(zip(digits.images[:120], digits.labels[:120].tolist(), strict=True)):
        folder = tmp_path / "images" / f"number {label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image[0] * 255).round().byte().numpy()
        Image.fromarray(pixels).resize((56, 56)).save(folder / f"{n}.png")
    data = ("--dataset", f"imagefolder:{tmp_path / 'images'}")
    path = tmp_path / "three.safetensors"
    words = (*data, "--class", "number 3", "--steps", 20, "--batch-size", 16, "-o", path)
    (row,) = run_json("train", files / "base.safetensors", *words)["adapters"]
    adapter = loraio.load(path)
    assert (adapter.training["digit"], adapter.training["class"]) == (3, "number 3")
    assert row["after"]["wrong"][3] <= row["before"]["wrong"][3]
    found = run_json("evaluate", files / "base.safetensors", "--adapter", path, *data)
    assert found["adapters"]["three"] == row["after"]
    assert (
        "bytes of memory"
        in run("train", files / "base.safetensors", *words, "--force", "--data-limit", 1e-6, code=1).stderr
    )


def test_log_and_side_file_are_written_and_a_finished_run_resumes(run: Run, files: Path, tmp_path: Path) -> None:
    path, side, log = (tmp_path / name for name in ("a.safetensors", "side.pt", "log.csv"))
    words = ("train", files / "base.safetensors", "--digit", 5, "-o", path, *BASICS, "--checkpoint", side, "--log", log)
    run(*words)
    whole = path.read_bytes()
    assert len(log.read_text().splitlines()) == 4
    path.unlink()
    assert "side.pt" in run(*words, code=1).stderr or "log.csv" in run(*words, code=1).stderr
    run(*words, "--resume")
    assert path.read_bytes() == whole
    path.unlink()
    error = run(*words, "--resume", "--lr", 0.5, code=1).stderr
    assert "lr is 0.5, there it was 0.001" in error
    side.unlink()
    assert "does not exist" in run(*words, "--resume", code=1).stderr
    assert "nothing to resume from" in run(*words[:-4], "--resume", code=1).stderr
