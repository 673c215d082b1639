"""Test ``loraio predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import Run, RunJson
from torch import nn

import loraio


@pytest.fixture
def images(tmp_path: Path, digits_test: loraio.Dataset) -> list[Path]:
    """Write three digits as PNG files of 28x28 pixels."""
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, image in zip(paths, digits_test.images, strict=False):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)
    return paths


def test_each_image_gets_its_line(run: Run, run_json: RunJson, files: Path, images: list[Path]) -> None:
    lines = run("predict", files / "base.safetensors", *images).stdout.splitlines()
    rows = run_json("predict", files / "base.safetensors", *images)["predictions"]
    expected = [f"{r['image']}: {r['digit']} ({max(r['probabilities']):.1%})" for r in rows]
    assert lines == expected
    assert [row["image"] for row in rows] == [str(image) for image in images]


def test_json_holds_the_probabilities_of_the_network(
    run_json: RunJson, files: Path, images: list[Path], base: nn.Module, three: loraio.Adapter
) -> None:
    pixels = torch.cat([loraio.read_image(image) for image in images])
    alone = run_json("predict", files / "base.safetensors", *images)
    assert alone.keys() == {"schema", "base", "stripped", "adapter", "predictions"}
    assert alone["adapter"] is None
    words = ("predict", files / "base.safetensors", *images, "--adapter", files / "three.safetensors")
    adapted, half = run_json(*words), run_json(*words, "--strength", 0.5)
    assert adapted["adapter"] == str(files / "three.safetensors")

    def check(found: dict[str, Any]) -> None:
        shares = loraio.predict(base, pixels).double().softmax(1)
        assert [row["probabilities"] for row in found["predictions"]] == shares.tolist()
        assert [row["digit"] for row in found["predictions"]] == shares.argmax(1).tolist()

    check(alone)
    with loraio.attach(base, three) as live:
        check(adapted)
        live.strength = 0.5
        check(half)
    assert len({str(found["predictions"]) for found in (alone, adapted, half)}) == 3


def test_the_merge_effect_is_noted_on_stderr(run: Run, files: Path, tmp_path: Path) -> None:
    image = tmp_path / "three.png"
    pixels = loraio.load_dataset("digits", "test").images[3, 0]
    Image.fromarray((pixels * 255).byte().numpy()).save(image)
    words = ("predict", files / "base.safetensors", image, "--adapter", files / "three.safetensors")
    found = run(*words)
    assert "changes 3 weights (4,388 parameters)" in found.stderr
    assert "targets" not in found.stdout
    assert run(*words, "--strength", 0).stderr.rstrip().endswith("changes none of 3 weights: a no-op")
    assert run(*words, "--json").stderr == ""
