"""Reading image files of any size and polarity, in bad light, and refusing other files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import loraio
from loraio.errors import DataError, MissingFileError
from loraio.training.images import SIDE

TOLERANCE = 0.06
"""Mean difference of two readings of one digit, of 1; a shift by half a pixel makes about this much."""


def seven(side: int = 200, *, ink: int = 0, paper: int = 255, at: tuple[float, float] = (0.3, 0.25)) -> Image.Image:
    """Draw a 7 with thick lines, 0.4 by 0.5 of the image's side."""
    big = Image.new("L", (side * 4, side * 4), paper)
    x, y = (side * 4 * part for part in at)
    w, h = side * 4 * 0.4, side * 4 * 0.5
    line = ImageDraw.Draw(big)
    line.line([(x, y), (x + w, y), (x + w * 0.4, y + h)], fill=ink, width=side // 4, joint="curve")
    return big.resize((side, side), Image.Resampling.BOX)


@pytest.fixture
def expected(tmp_path: Path) -> Tensor:
    """Read the 7 from a large, clean image."""
    seven(800).save(tmp_path / "expected.png")
    return loraio.read_image(tmp_path / "expected.png")


def read(image: Image.Image, path: Path, **options: object) -> Tensor:
    image.save(path, **options)
    found = loraio.read_image(path)
    assert found.shape == (1, 1, SIDE, SIDE)
    assert found.dtype == torch.float32
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    return found


def alike(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().mean()) < TOLERANCE


def turned_upright_by_exif(path: Path) -> Tensor:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn clockwise to see it upright
    return read(seven().transpose(Image.Transpose.ROTATE_90), path.with_suffix(".jpg"), exif=exif)


def with_alpha(path: Path, *, ink: tuple[int, ...] = (20, 20, 60, 255), red: int = 255) -> Tensor:
    image = Image.new("RGBA", (200, 200), (red, 0, 0, 0))
    image.paste(ink, mask=seven(ink=255, paper=0))
    return read(image, path)


def on_shaded_paper(path: Path) -> Tensor:
    light = np.linspace(1, 0.6, 200)[None, :] * np.linspace(1, 0.8, 200)[:, None]
    return read(Image.fromarray((np.asarray(seven()) * light).astype(np.uint8)), path)


def on_grainy_paper(path: Path) -> Tensor:
    grain = np.random.default_rng(0).normal(0, 15, (200, 200))
    return read(Image.fromarray((np.asarray(seven(paper=220)) + grain).clip(0, 255).astype(np.uint8)), path)


WAYS: dict[str, Callable[[Path], Tensor]] = {
    "small": lambda path: read(seven(60), path),
    "large": lambda path: read(seven(1500), path),
    "light on dark": lambda path: read(seven(ink=255, paper=0), path),
    "pale": lambda path: read(seven(ink=120, paper=200), path),
    "off centre": lambda path: read(seven(at=(0.05, 0.45)), path),
    "wide": lambda path: read(seven().crop((0, 20, 200, 180)), path),
    "tightly cut": lambda path: read(seven().crop((50, 40, 160, 160)), path),
    "jpeg": lambda path: read(seven(), path.with_suffix(".jpg"), quality=40),
    "colour": lambda path: read(seven().convert("RGB"), path),
    "palette": lambda path: read(seven().convert("P", palette=Image.Palette.ADAPTIVE), path),
    "black and white": lambda path: read(seven().convert("1"), path),
    "16 bits": lambda path: read(Image.fromarray(np.asarray(seven()).astype(np.uint16) * 257), path),
    "transparent": with_alpha,
    "transparent, light": lambda path: with_alpha(path, ink=(250, 240, 255, 255), red=0),
    "grey and alpha": lambda path: read(seven().convert("LA"), path),
    "exif": turned_upright_by_exif,
    "shaded paper": on_shaded_paper,
    "grainy paper": on_grainy_paper,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_digit_is_read_alike_in_whatever_way_it_is_stored(way: str, tmp_path: Path, expected: Tensor) -> None:
    found = WAYS[way](tmp_path / "seven.png")
    assert alike(found, expected)
    assert float(found.max()) == 1


def test_another_digit_is_not_alike(tmp_path: Path, expected: Tensor) -> None:
    assert not alike(read(seven().transpose(Image.Transpose.ROTATE_180), tmp_path / "turned.png"), expected)
    assert not alike(torch.zeros_like(expected), expected)


def test_the_digit_is_20_pixels_long_with_its_mass_at_pixel_14(expected: Tensor) -> None:
    ink = expected[0, 0]
    rows, columns = (torch.nonzero(ink.amax(axis) > 0.1).flatten() for axis in (1, 0))
    assert max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1 == 20
    places = torch.arange(28.0)
    assert float((ink.sum(1) * places).sum() / ink.sum()) == pytest.approx(14, abs=0.51)
    assert float((ink.sum(0) * places).sum() / ink.sum()) == pytest.approx(14, abs=0.51)


def test_an_image_of_28_by_28_is_kept_bit_for_bit_and_an_inverted_one_is_turned_round(tmp_path: Path) -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[4:24, 5:20] = np.random.default_rng(0).integers(0, 256, (20, 15))
    expected = torch.from_numpy(pixels).float().div_(255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert loraio.read_image(tmp_path / "x.png")[0, 0].equal(expected)
    Image.fromarray(255 - pixels).save(tmp_path / "x.png")
    assert torch.allclose(loraio.read_image(tmp_path / "x.png")[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(28, 28), (1, 1), (2, 2), (1, 300), (300, 200)])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_blank_image_is_refused(tmp_path: Path, size: tuple[int, int], grey: int) -> None:
    Image.new("L", size, grey).save(tmp_path / "blank.png")
    with pytest.raises(DataError, match="blank"):
        loraio.read_image(tmp_path / "blank.png")


@pytest.mark.parametrize("size", [(2, 3), (3, 3), (1, 40), (40, 1), (27, 28)])
def test_an_image_of_a_few_pixels_is_read_too(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("L", size, 255)
    image.putpixel((size[0] // 2, size[1] // 2), 0)
    found = read(image, tmp_path / "tiny.png")
    assert float(found.max()) == 1


def test_other_files_are_refused_by_name_and_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    for name, error, message in (
        ("text.png", DataError, r"no image[^$]*text\.png"),
        ("nowhere.png", MissingFileError, r"nowhere\.png"),
        ("pipe.png", MissingFileError, "it is a named pipe"),
        ("", MissingFileError, "it is a folder"),
    ):
        with pytest.raises(error, match=message):
            loraio.read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"whole{suffix}"
    seven().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="whole"):
        loraio.read_image(path)
