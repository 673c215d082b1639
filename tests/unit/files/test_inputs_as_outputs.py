"""No function writes over one of the files that it reads, whatever way leads to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import loraio
from loraio.errors import ConfigError, OutputExistsError


@pytest.fixture
def things(files: Path, tmp_path: Path, write_parts: Callable[..., Path], trained_base: nn.Module) -> Path:
    """A base, in one file and in parts, an adapter, and the same as a PEFT folder."""
    for name in ("base", "three"):
        shutil.copy(files / f"{name}.safetensors", tmp_path)
    write_parts(trained_base.state_dict(), tmp_path / "parts")
    loraio.convert(
        tmp_path / "three.safetensors", tmp_path / "peft", to="peft", base=tmp_path / "base.safetensors", lossy=True
    )
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def merge(base: str, adapter: str, output: str) -> Callable[[Path], object]:
    return lambda folder: loraio.merge_file(folder / base, folder / adapter, folder / output, overwrite=True)


def convert(adapter: str, to: str, output: str) -> Callable[[Path], object]:
    return lambda folder: loraio.convert(
        folder / adapter, folder / output, to=to, base=folder / "base.safetensors", overwrite=True, lossy=True
    )


ONE, MANY, THREE = "base.safetensors", "parts", "three.safetensors"


@pytest.mark.parametrize(
    "write",
    [
        merge(ONE, THREE, THREE),
        merge(ONE, "peft", "peft/adapter_model.safetensors"),
        merge(ONE, "peft", "peft/adapter_config.json"),
        merge(ONE, "peft/adapter_model.safetensors", "peft/adapter_config.json"),
        merge(MANY, THREE, "parts/a-1-of-2.safetensors"),
        merge(MANY, THREE, "parts"),
        merge(f"{MANY}/a.safetensors.index.json", THREE, "parts/a-2-of-2.safetensors"),
        convert(THREE, "native", ONE),
        convert(THREE, "kohya", ONE),
        convert(THREE, "native", THREE),
        convert("peft", "native", "peft/adapter_config.json"),
        convert("peft", "peft", "peft"),
        convert("peft/adapter_model.safetensors", "peft", "peft"),
        lambda folder: loraio.export(folder / MANY, folder / "parts/link.pt2", model="digit-cnn", overwrite=True),
        lambda folder: loraio.pack([folder / THREE], folder / THREE, overwrite=True),
    ],
)
def test_an_output_that_is_an_input_is_refused(things: Path, write: Callable[[Path], object]) -> None:
    (things / "parts/link.pt2").hardlink_to(things / "parts/a-1-of-2.safetensors")
    before = contents(things)
    with pytest.raises(OutputExistsError, match="is also an input"):
        write(things)
    assert contents(things) == before


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to])
@pytest.mark.parametrize("name", [ONE, THREE, "peft/adapter_config.json", "parts/a-2-of-2.safetensors"])
def test_another_name_of_an_input_is_refused_too(things: Path, name: str, link: Callable[[Path, Path], None]) -> None:
    output = things / "other.safetensors"
    link(output, things / name)
    base, adapter = (MANY if name.startswith("parts") else ONE), ("peft" if name.startswith("peft") else THREE)
    with pytest.raises(OutputExistsError, match="is also an input"):
        loraio.merge_file(things / base, things / adapter, output, overwrite=True)


def test_log_and_side_file_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "log.csv")
    with pytest.raises(ConfigError, match="are the same file"):
        loraio.RunFiles(log=tmp_path / "log.csv", checkpoint=tmp_path / "link").check()
