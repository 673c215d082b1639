"""Test that every command refuses wrong command lines, wrong files and existing outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import Run, RunJson, words

import loraio

TRAIN = "train BASE -o OUT --dataset digits --steps 3 --batch-size 16"
PRETRAIN = "pretrain -o OUT --dataset digits --batch-size 300"


@pytest.fixture
def places(files: Path, tmp_path: Path) -> dict[str, Path]:
    """Write files, and return them by the words that stand for them in a command line."""
    found = {name: files / f"{name}.safetensors" for name in ("base", "three", "seven", "merged")}
    found |= {"out": tmp_path / "out.pt2", "folder": tmp_path, "other": tmp_path / "other.safetensors"}
    found |= {"image": tmp_path / "image.png", "plain": tmp_path / "plain.pt"}
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), found["other"])
    torch.save(dict(loraio.read_base(found["base"]).state), found["plain"])
    Image.radial_gradient("L").save(found["image"])
    return found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("predict BASE", "IMAGE"),
        ("evaluate BASE --dataset digits --split tset", "--split"),
        ("unmerge MERGED -o OUT", "one of the two"),
        ("unmerge MERGED THREE --base BASE -o OUT", "one of the two"),
        ("verify PLAIN THREE MERGED --model-args {}", "--model-args needs --model"),
        ("verify BASE THREE MERGED --random 7 --dataset digits", "exclude each other"),
        (f"{TRAIN} --digit 3 --class 3", "exclude each other"),
        (f"{TRAIN} --head 4=x", "'4=x' is not NAME=CLASSES"),
        *((f"merge BASE THREE -o OUT --strength {text}", "--strength") for text in ("nan", "inf", "x")),
        *((f"{PRETRAIN} {option}", option.split("=")[0]) for option in (
            "--lr=0", "--lr=nan", "--epochs=0", "--batch-size=x", "--seed=-1", f"--seed={2**32}",
        )),
        *((f"targets BASE {option}", option[:6]) for option in (
            "--rank=0", "--rank=conv1=0", "--rank==3", "--rank=conv1=x", "--alpha=conv1=nan",
        )),
        *((f"{TRAIN} {option}", option.split("=")[0]) for option in (
            "--rank=0", "--alpha=0", "--alpha=nan", "--focus=0", "--focus=1.1", "--focus=nan", "--steps=0", "--lr=-1",
            "--targets=,", "--digit=-1", "--digit=three", "--digit=3.5", "--digit=", f"--digit={'9' * 5000}",
        )),
        *((f"export MERGED -o OUT --input-shape={shape}", "is not sizes with commas") for shape in (
            "3,0,224", "3,224,", "3x224x224", "",
        )),
        *((f"{command} --model-args '{text}'", "is not a JSON object") for command, text in (
            ("pretrain -o OUT", "{"), ("evaluate BASE", "[1]"), ("predict BASE IMAGE", "3"),
            ("verify BASE THREE MERGED", '{"a": 1, "a": 2}'), ("targets BASE", '{"a": NaN}'), (TRAIN, "num_classes=10"),
        )),
        *((f"convert THREE -o OUT --to native --base BASE --enable-lora '{text}'", "is no list of flags") for text in (
            "0,0", "1,2", "yes", "1,", "",
        )),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_a_wrong_command_line_exits_2(
    line: str, says: str, run: Run, run_json: RunJson, places: dict[str, Path]
) -> None:
    assert says in run(*words(line, **places), code=2).stderr
    assert says in run_json(*words(line, **places), code=2)["message"]
    assert not places["out"].exists()


NOT_A_BASE = "is an adapter, not a base model"
NOT_AN_ADAPTER = "is not an adapter but a base model"


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("merge THREE BASE -o OUT", "FormatError", NOT_A_BASE),
        ("merge BASE BASE -o OUT", "FormatError", NOT_AN_ADAPTER),
        ("verify THREE BASE MERGED", "FormatError", NOT_A_BASE),
        ("verify BASE BASE MERGED", "FormatError", NOT_AN_ADAPTER),
        ("evaluate THREE --dataset digits", "FormatError", NOT_A_BASE),
        ("evaluate BASE --adapter BASE --dataset digits", "FormatError", NOT_AN_ADAPTER),
        ("predict THREE IMAGE --adapter THREE", "FormatError", NOT_A_BASE),
        (TRAIN.replace("BASE", "THREE"), "FormatError", NOT_A_BASE),
        ("inspect no.safetensors", "MissingFileError", "'no.safetensors' does not exist"),
        ("evaluate no.safetensors", "MissingFileError", "'no.safetensors' does not exist"),
        ("evaluate BASE --adapter no.safetensors", "MissingFileError", "'no.safetensors' does not exist"),
        ("predict BASE no.png", "MissingFileError", "'no.png' does not exist"),
        ("predict BASE THREE", "DataError", "no image"),
        ("merge OTHER THREE -o OUT", "BaseMismatchError", "'conv1.weight'"),
        ("verify OTHER THREE MERGED", "BaseMismatchError", "'conv1.weight'"),
        ("evaluate OTHER --adapter THREE --adapter SEVEN --dataset digits", "BaseMismatchError", "'three': "),
        ("unmerge BASE --base BASE -o OUT", "", "has no receipts"),
        ("unmerge PLAIN --base BASE -o OUT", "FormatError", "a pickle"),
        ("convert THREE --to kohya --rank 4 -o OUT", "", "--approximate"),
        ("convert THREE --to kohya --as-full-delta -o OUT", "", "kohya has no form for the whole change"),
        ("convert THREE --to peft --prefix unet -o OUT", "", "peft has no prefix to choose"),
        ("convert THREE --to pefft -o OUT", "UnknownNameError", "did you mean 'peft'"),
        ("export MERGED -o m.pb", "", "Known: .onnx, .pt2"),
        ("targets BASE --targets convo2", "UnknownNameError", "did you mean 'conv"),
        ("targets BASE --rank 20", "", "--clamp-rank"),
        (f"{PRETRAIN} --model digit-cn", "UnknownNameError", "did you mean 'digit-cnn'?"),
        (f"{PRETRAIN} --dataset minst", "UnknownNameError", "did you mean 'mnist'?"),
        (f"{PRETRAIN} --model resnet18", "UnknownNameError", "did you mean 'torchvision:resnet18'"),
        (f"{PRETRAIN} --model torchvision:resnet18 --model-args '{{\"weights\": \"DEFAULT\"}}'", "ConfigError",
         "networks are built without weights"),
        (f"{PRETRAIN} --model torchvision:squeezenet1_1 --model-args '{{\"num_classes\": 10}}'", "DataError",
         "the network does not take images of shape (1, 28, 28)"),
        (PRETRAIN.replace("OUT", "no/base.safetensors"), "OutputError", "does not exist"),
        (f"{TRAIN} --init kaimin", "UnknownNameError", "did you mean 'kaiming"),
        (f"{TRAIN} --schedule cosin", "UnknownNameError", "did you mean 'cosine"),
        (f"{TRAIN} --dataset digitz", "UnknownNameError", "did you mean 'digits"),
        (f"{TRAIN} --model digitcnn", "UnknownNameError", "did you mean 'digit-cnn"),
        (f"{TRAIN} --targets conv1,conb2", "UnknownNameError", "did you mean 'conv2"),
        (f"{TRAIN} --class five", "UnknownNameError", "no class 'five'"),
        (f"{TRAIN} --digit 12", "DataError", "no image of class 12, only of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (f"{TRAIN} --digit 3 --steps 1", "TrainingError", "lora_A"),
        ("train BASE --digit 5 -o FOLDER", "OutputError", "is a folder"),
        ("train BASE --digit all -o PLAIN", "OutputError", "is a folder"),
        ("train BASE --digit all -o no/ten", "OutputError", "does not exist"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_a_wrong_input_exits_1_and_writes_nothing(
    line: str, error: str, says: str, run: Run, run_json: RunJson, places: dict[str, Path]
) -> None:
    before = sorted(places["folder"].iterdir())
    text, found = run(*words(line, **places), code=1).stderr, run_json(*words(line, **places), code=1)
    assert says in text
    assert f"{found['error']}: {found['message']}".split("\n")[0] in text
    assert error in ("", found["error"])
    assert sorted(places["folder"].iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        PRETRAIN,
        f"{TRAIN} --digit 5",
        "merge BASE THREE -o OUT",
        "unmerge MERGED --base BASE -o OUT",
        "export MERGED -o OUT",
        "pack THREE SEVEN -o OUT",
        "convert THREE -o OUT --to kohya",
    ],
)
def test_an_existing_output_needs_force(line: str, run: Run, run_json: RunJson, places: dict[str, Path]) -> None:
    places["out"].write_bytes(b"mine")
    assert "--force" in run(*words(line, **places), code=1).stderr
    assert run_json(*words(line, **places), code=1)["error"] == "OutputExistsError"
    assert places["out"].read_bytes() == b"mine"
    run(*words(line, **places), "--force")
    assert places["out"].read_bytes() != b"mine"


@pytest.mark.parametrize(
    "line",
    [
        "merge BASE THREE -o BASE",
        "merge BASE THREE -o THREE",
        "unmerge MERGED --base BASE -o MERGED",
        "unmerge MERGED --base BASE -o BASE",
        f"{TRAIN.replace('OUT', 'BASE')} --digit 5",
    ],
)
def test_an_input_is_never_the_output(line: str, run: Run, places: dict[str, Path]) -> None:
    names = ("base", "three", "merged")
    copies = {name: Path(shutil.copy(places[name], places["folder"])) for name in names}
    before = {path: path.read_bytes() for path in copies.values()}
    assert "is also an input" in run(*words(line, **copies), "--force", code=1).stderr
    assert {path: path.read_bytes() for path in before} == before
