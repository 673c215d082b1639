"""Test ``loraio convert``, and the other commands with another tool's adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import Run, RunJson
from safetensors.torch import load_file, save_file

import loraio


@pytest.fixture
def exported(run: Run, files: Path, tmp_path: Path) -> Path:
    """Write the adapter three as a PEFT folder."""
    run("convert", files / "three.safetensors", "-o", tmp_path / "three", "--to", "peft")
    return tmp_path / "three"


def without_metadata(folder: Path) -> Path:
    """Remove the metadata of loraio, which another tool would not write."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    return folder


def test_there_and_back_gives_the_same_bytes(run_json: RunJson, files: Path, exported: Path, tmp_path: Path) -> None:
    words = ("convert", exported, "--to", "native", "--base", files / "base.safetensors", "-o", tmp_path / "back")
    found = run_json(*words)
    assert (found["from"], found["to"], found["lost"], found["done"]) == ("peft", "native", False, True)
    assert "LORA" in found["reason"]
    assert {line["fate"] for line in found["read"]} == {"carried"}
    assert found["written"] == []
    assert (tmp_path / "back").read_bytes() == (files / "three.safetensors").read_bytes()


def test_every_tensor_and_setting_has_a_line(
    run_json: RunJson, files: Path, tmp_path: Path, three: loraio.Adapter
) -> None:
    found = run_json("convert", files / "three.safetensors", "-o", tmp_path / "out", "--to", "peft", "--dry-run")
    assert {line["name"] for line in found["written"] if line["what"] == "tensor"} == set(three.factors)
    settings = {line["name"] for line in found["written"] if line["what"] == "setting"}
    assert settings >= {"alpha", "rank", "kind", "scale_rule", "base", "training"}
    assert not found["done"]
    assert not (tmp_path / "out").exists()


def test_the_report_is_printed(run: Run, files: Path, tmp_path: Path) -> None:
    words = ("convert", files / "three.safetensors", "-o", tmp_path / "out", "--to", "peft")
    text = run(*words, "--dry-run").stdout
    assert "native adapter, by the loraio metadata" in text
    assert "writing: tensor conv1.weight.lora_A: carried" in text
    assert text.endswith("nothing written\n")
    assert run(*words).stdout.endswith(f"{tmp_path / 'out'}: peft adapter\n")


def test_a_loss_makes_the_exit_code_3(run: Run, run_json: RunJson, exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "adapter_config.json").read_text()) | {"lora_bias": True}
    tensors = load_file(exported / "adapter_model.safetensors") | {"base_model.model.bare.lora_B.bias": torch.ones(3)}
    tensors |= {"base_model.model.bare.lora_A.weight": torch.ones(4, 2)}
    tensors |= {"base_model.model.bare.lora_B.weight": torch.ones(3, 4)}
    config["target_modules"] = [*config["target_modules"], "bare"]
    (exported / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, exported / "adapter_model.safetensors")
    own = tmp_path / "own.py"
    own.write_text(
        "import loraio, torch\n\ndef net():\n    made = loraio.build_network('digit-cnn', seed=0)\n"
        "    made.bare = torch.nn.Linear(2, 3, bias=False)\n    return made\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        torch.save(__import__("own").net().state_dict(), tmp_path / "base.pt")
        words = ["convert", exported, "--to", "native", "--base", tmp_path / "base.pt", "--model", "own:net"]
        words += ["-o", tmp_path / "back"]
        found = run_json(*words, code=3)
        assert [line["name"] for line in found["read"] if line["fate"] == "lost"] == [
            "base_model.model.bare.lora_B.bias"
        ]
        assert not (tmp_path / "back").exists()
        assert "has no place there" in run(*words, "--dry-run", code=3).stdout
        assert run_json(*words, "--lossy")["done"]
        assert "bare.weight" in loraio.load(tmp_path / "back").targets
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("own", None)


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "diffusers"])
def test_files_of_other_tools_come_back_with_the_same_bytes(
    dialect: str, run_json: RunJson, files: Path, tmp_path: Path
) -> None:
    three, base = files / "three.safetensors", files / "base.safetensors"
    found = run_json("convert", three, "-o", tmp_path / "out", "--to", dialect)
    assert (found["to"], found["done"]) == (dialect, True)
    found = run_json("convert", tmp_path / "out", "-o", tmp_path / "back", "--to", "native", "--base", base)
    assert (found["from"], found["lost"]) == (dialect, False)
    assert (tmp_path / "back").read_bytes() == three.read_bytes()


def test_options_reach_the_dialect(run: Run, files: Path, tmp_path: Path) -> None:
    three, base = files / "three.safetensors", files / "base.safetensors"
    words = ("convert", three, "-o", tmp_path / "kohya", "--to", "kohya", "--prefix", "lora_te1")
    assert "writing: setting prefix: carried, lora_te1" in run(*words).stdout
    assert "lora_te1_conv1.alpha" in load_file(tmp_path / "kohya")
    words = ("convert", three, "-o", tmp_path / "full", "--to", "lycoris", "--as-full-delta", "--base", base)
    assert "as the whole change, rounded once to float32" in run(*words).stdout
    assert set(load_file(tmp_path / "full")) == {f"lycoris_{name}.diff" for name in ("conv1", "conv2", "conv3")}
    words = ("convert", tmp_path / "full", "-o", tmp_path / "back", "--to", "native", "--base", base)
    text = run(*words, "--approximate", "--rank", "4").stdout
    assert "approximated at rank 4, relative Frobenius error " in text
    assert {target.rank for target in loraio.load(tmp_path / "back").targets.values()} == {4}


def test_a_base_is_asked_for(run: Run, exported: Path, tmp_path: Path) -> None:
    text = run("convert", exported, "--to", "native", "-o", tmp_path / "back", code=1).stderr
    assert "does not say what it is for" in text
    assert "--base BASE" in text


def test_outputs_are_not_replaced(run: Run, files: Path, exported: Path, tmp_path: Path) -> None:
    words = ("convert", files / "three.safetensors", "--to", "peft", "-o", exported)
    assert "exists" in run(*words, code=1).stderr
    run(*words, "--force")
    again = ("convert", exported, "--to", "peft", "-o", exported, "--base", files / "base.safetensors", "--force")
    assert "is also an input" in run(*again, code=1).stderr
    unknown = run("convert", files / "three.safetensors", "--to", "pefft", "-o", tmp_path / "x", code=1).stderr
    assert "did you mean 'peft'" in unknown


def test_every_command_takes_it(run_json: RunJson, files: Path, exported: Path, tmp_path: Path) -> None:
    base, merged = files / "base.safetensors", tmp_path / "merged.safetensors"
    without_metadata(exported)
    found = run_json("merge", base, exported, "-o", merged)
    assert found["folded"] == 3
    assert load_file(merged).keys() == load_file(files / "merged.safetensors").keys()
    assert all(t.equal(load_file(files / "merged.safetensors")[n]) for n, t in load_file(merged).items())
    assert run_json("verify", base, exported, merged)["ok"]
    plain = run_json("evaluate", base, "--adapter", files / "three.safetensors", "--dataset", "digits")
    theirs = run_json("evaluate", base, "--adapter", exported, "--dataset", "digits")
    assert theirs["adapters"] == plain["adapters"]
    both = run_json("evaluate", base, "--adapter", tmp_path, "--dataset", "digits")
    assert set(both["adapters"]) == {"three"}


@pytest.fixture
def other(files: Path, tmp_path: Path) -> Path:
    """Write a base that differs in one weight, which the adapter three changes."""
    network = loraio.load_base(files / "base.safetensors")
    with torch.no_grad():
        network.get_parameter("conv2.weight").mul_(1.25)
    loraio.save_base(network, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize("dialect", ["peft", "kohya", "lycoris", "diffusers"])
def test_an_export_is_refused_on_another_base(
    dialect: str,
    run: Run,
    run_json: RunJson,
    files: Path,
    other: Path,
    digits_test: loraio.Dataset,
    tmp_path: Path,
) -> None:
    theirs, merged, back = tmp_path / "theirs", tmp_path / "merged.safetensors", tmp_path / "back"
    run("convert", files / "three.safetensors", "-o", theirs, "--to", dialect)
    image = tmp_path / "image.png"
    Image.fromarray((digits_test.images[0, 0] * 255).byte().numpy()).save(image)
    commands: list[tuple[object, ...]] = [
        ("merge", other, theirs, "-o", merged),
        ("verify", other, theirs, files / "merged.safetensors"),
        ("evaluate", other, "--adapter", theirs, "--dataset", "digits"),
        ("predict", other, image, "--adapter", theirs),
        ("convert", theirs, "-o", back, "--to", "native", "--base", other),
        ("convert", files / "three.safetensors", "-o", back, "--to", "peft", "--base", other),
    ]
    for words in commands:
        failed = run_json(*words, code=1)
        assert failed["error"] == "BaseMismatchError"
        assert "'conv2.weight': changed weights" in failed["message"]
        assert "'conv1.weight'" not in failed["message"]
    assert not merged.exists()
    assert not back.exists()
    allowed = "--allow-base-mismatch"
    (line,) = run_json(*commands[0], allowed)["base_mismatch"]
    assert line.startswith("'conv2.weight': changed weights")
    assert run_json("inspect", merged)["merged"][0]["base_mismatch"] == [line]
    assert run_json("verify", other, theirs, merged, allowed)["ok"]
    for words in commands[2:4]:
        assert f"another base: {line}" in run(*words, allowed).stderr
    assert run_json(*commands[4], allowed, "--dry-run")["base_mismatch"] == [line]
    assert f"note: another base: {line}" in run(*commands[4], allowed).stderr
    assert back.read_bytes() == (files / "three.safetensors").read_bytes()


@pytest.mark.parametrize("dialect", ["loralib", "minlora"])
def test_a_dialect_without_alpha_needs_lossy_to_write_and_alpha_to_read(
    dialect: str, run: Run, run_json: RunJson, files: Path, tmp_path: Path, three: loraio.Adapter
) -> None:
    base, out = files / "base.safetensors", tmp_path / "out.pt"
    words = ("convert", files / "three.safetensors", "-o", out, "--to", dialect)
    found = run_json(*words, code=3)
    lost = {line["name"]: line["how"] for line in found["written"] if line["fate"] == "lost"}
    assert set(lost) == {"alpha", "base", "training"}
    assert lost["alpha"].endswith(": 6")
    assert not out.exists()
    unread = run("convert", files / "three.safetensors", "-o", tmp_path / "o.safetensors", "--to", dialect, code=1)
    assert "a name that ends in .pt" in unread.stderr
    assert run_json(*words, "--lossy")["done"]
    assert run_json("inspect", out)["dialect"] == dialect
    assert "lora_alpha is 1 unless" in run("merge", base, out, "-o", tmp_path / "m", code=1).stderr
    merged = tmp_path / "merged.safetensors"
    run("merge", base, out, "-o", merged, "--alpha", "6")
    expected = load_file(files / "merged.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(merged).items())
    back = run_json("convert", out, "-o", tmp_path / "back", "--to", "native", "--base", base, "--alpha", "6")
    assert back["from"] == dialect
    again = loraio.load(tmp_path / "back")
    assert {name: (t.rank, t.alpha) for name, t in again.targets.items()} == dict.fromkeys(three.targets, (4, 6))


def test_flags_of_a_merged_linear_are_given_as_ones_and_zeros(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path
) -> None:
    base = files / "base.safetensors"
    rows, columns = load_file(base)["fc.weight"].shape
    torch.save({"fc.lora_A": torch.ones(2, columns), "fc.lora_B": torch.ones(rows // 2, 2)}, tmp_path / "theirs.pt")
    words = (
        "convert",
        tmp_path / "theirs.pt",
        "-o",
        tmp_path / "out",
        "--to",
        "native",
        "--base",
        base,
        "--alpha",
        "1",
    )
    assert "--enable-lora 1,0,1 of `loraio convert`" in run(*words, code=1).stderr
    assert run_json(*words, "--enable-lora", "0,1")["done"]
    lower = loraio.load(tmp_path / "out").factors["fc.weight.lora_B"]
    assert lower.ne(0).any(1).tolist() == [False] * (rows // 2) + [True] * (rows // 2)
    for wrong in ("0,0", "1,2", "yes", "1,", ""):
        assert "is no list of flags" in run(*words, "--enable-lora", wrong, code=2).stderr


def test_inspect_names_the_dialect_and_the_reason(run: Run, run_json: RunJson, exported: Path) -> None:
    found = run_json("inspect", exported)
    assert (found["type"], found["dialect"], found["rank"], found["alpha"]) == ("adapter", "peft", 4, 6)
    assert "peft_type 'LORA'" in found["reason"]
    assert found["targets"]["conv1"]["scale"] == 1.5
    assert found["targets"]["conv1"]["shape"] is None
    assert found["targets"]["conv1"]["tensors"] == {"A": [4, 1, 3, 3], "B": [32, 4, 1, 1]}
    assert found["warnings"] == []
    assert "by adapter_config.json says" in run("inspect", exported).stdout
    config = exported / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    assert "cannot be used: init_lora_weights is 'pissa'" in run("inspect", exported).stderr


def test_inspect_names_layers_that_need_approximate(run_json: RunJson, tmp_path: Path) -> None:
    shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4), "alpha": ()}
    save_file({f"lycoris_fc.{slot}": torch.ones(shape) for slot, shape in shapes.items()}, tmp_path / "file")
    found = run_json("inspect", tmp_path / "file")
    assert found["dialect"] == "lycoris"
    assert found["warnings"] == ["needs --approximate: 'lycoris_fc': LoHa of rank 2; a pair of rank 4 is exact"]
