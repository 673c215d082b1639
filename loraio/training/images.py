"""Read image files of any size and polarity into the form that the digit networks were trained on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from loraio.errors import DataError
from loraio.files.sniffing import open_file

SIDE = 28
"""Height and width of the result, in pixels."""

BOX = 20
"""Longer side of the digit itself in the result, in pixels, as in MNIST."""

MIN_CONTRAST = 0.1
"""Smallest difference between ink and background, of 1, in an image that is not blank."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as in Pillow."""

INK = 0.25
"""Share of the strongest ink above which a pixel belongs to the digit, for finding its box."""

SKETCH = 100
"""Longer side, in pixels, of the reduced copy for finding paper, noise and the digit's box; reducing averages noise."""

MAX_NOISE = 0.25
"""Largest value that counts as noise of the paper, as a share of the strongest ink."""

Floats = NDArray[np.float32]


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read one digit from a PNG or JPEG of any size, dark on light or light on dark.

    An image of 28x28 pixels is not scaled; its values are distances from the median of its frame. In any other image,
    uneven light and the noise of the paper are removed. The digit is scaled to 20 pixels and its centre of mass is put
    into the middle, as in MNIST (LeCun et al. 1998, Gradient-based learning applied to document recognition, section
    III.A).

    Returns:
        (1, 1, 28, 28), float32, in [0, 1]; 0 is background.

    Raises:
        MissingFileError: no such file.
        DataError: the file is no image, or the image is blank.
    """
    path = Path(path)
    where = f"{str(path)!r}"
    with open_file(path) as file:
        try:
            with Image.open(file) as image:
                grey = _grey(ImageOps.exif_transpose(image))
        except UnidentifiedImageError as error:
            raise DataError("no image that can be read", where=where, hint="use a PNG or JPEG file") from error
        except Exception as error:  # parsers of damaged files raise anything
            raise DataError(f"cannot be read as an image: {error}", where=where) from error
    whole = grey.shape == (SIDE, SIDE)
    light = grey - (np.median(grey[_frame(grey)]) if whole else _paper(grey))
    sketch = _reduced(light)
    contrast = float(np.abs(sketch).max())
    if contrast < MIN_CONTRAST:
        raise DataError(f"the image is blank: its strongest contrast is {contrast:.2f} of 1", where=where)
    if whole:
        ink = np.abs(light)
    else:
        noise = 3 * float(np.median(np.abs(sketch[_frame(sketch)]))) / contrast  # two standard deviations
        ink = _centred((light if sketch.max() == contrast else -light).clip(0, None), min(noise, MAX_NOISE))
    return torch.from_numpy(np.ascontiguousarray(ink, dtype=np.float32))[None, None]


def _grey(image: Image.Image) -> Floats:
    """Return the brightness in [0, 1]; transparent parts become the opposite of the drawn ones."""
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits
        values = np.asarray(image, dtype=np.float32)
        return values / (65535.0 if image.mode.startswith("I") else max(1.0, float(values.max())))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        alpha, grey = rgba[..., 3], rgba[..., :3] @ LUMA
        drawn = float((grey * alpha).sum() / max(float(alpha.sum()), 1e-6))
        paper = 0.0 if drawn > 0.5 else 1.0
        return np.asarray(grey * alpha + paper * (1 - alpha), dtype=np.float32)
    return np.asarray(np.asarray(image.convert("L")) / 255, dtype=np.float32)


def _frame(grey: Floats) -> NDArray[np.bool_]:
    """Return a mask of the pixels along the four sides."""
    width = max(1, min(grey.shape) // 30)
    frame = np.ones(grey.shape, dtype=bool)
    frame[width:-width, width:-width] = False
    return frame


def _reduced(grey: Floats) -> Floats:
    """Reduce the image to at most `SKETCH` pixels in length, by averaging."""
    if max(grey.shape) <= SKETCH:
        return grey
    height, width = (max(1, round(n * SKETCH / max(grey.shape))) for n in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BOX))


def _paper(grey: Floats) -> Floats:
    """Return the brightness of the paper at each pixel: a plane through the frame.

    The fit is by least absolute deviations, so that ink on the frame hardly bends the plane.
    """
    sketch = _reduced(grey)
    frame = _frame(sketch)
    points, values = _plane(sketch.shape)[frame], sketch[frame].astype(np.float64)
    slope = np.array([np.median(values), 0, 0])
    for _ in range(10):
        root = np.abs(values - points @ slope).clip(1e-3, None) ** -0.5
        slope = np.linalg.lstsq(points * root[:, None], values * root, rcond=None)[0]
    return np.asarray(_plane(grey.shape) @ slope, dtype=np.float32)


def _plane(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return (1, y, x) at the centre of each pixel, y and x from 0 to 1."""
    y, x = ((np.arange(n) + 0.5) / n for n in shape)
    return np.stack(np.broadcast_arrays(1.0, y[:, None], x[None, :]), axis=-1)


def _box(ink: Floats, noise: float) -> Floats:
    """Crop the image to the digit."""
    sketch = _reduced(ink)
    rows, columns = np.nonzero(sketch > max(INK, 2 * noise) * sketch.max())
    sides = []
    for found, n, full in zip((rows, columns), sketch.shape, ink.shape, strict=True):
        sides.append(slice(int(found.min() * full / n), math.ceil((found.max() + 1) * full / n)))
    return ink[tuple(sides)]


def _centred(ink: Floats, noise: float) -> Floats:
    """Scale and centre the digit as in MNIST; ``noise`` is a share of the strongest ink."""
    digit = np.ascontiguousarray(_box(_box(ink, noise), noise))  # the second time at a finer scale
    factor = BOX / max(digit.shape)
    height, width = (max(1, round(n * factor)) for n in digit.shape)
    scaled = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.LANCZOS)).clip(0, None)
    scaled = ((scaled / scaled.max() - noise) / (1 - noise)).clip(0, 1)
    y, x = (float((scaled.sum(axis) * np.arange(n)).sum() / scaled.sum()) for axis, n in ((1, height), (0, width)))
    # the centre of mass of MNIST's digits is at pixel 14, counted from 0
    top, left = (min(max(round(SIDE / 2 - centre), 0), SIDE - n) for centre, n in ((y, height), (x, width)))
    result = np.zeros((SIDE, SIDE), dtype=np.float32)
    result[top : top + height, left : left + width] = scaled
    return result
