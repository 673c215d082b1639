"""Image files of any size and polarity, brought into the form that the digit networks were trained on."""

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
"""The longer side of the digit itself in the result, in pixels, as in MNIST."""

MIN_CONTRAST = 0.1
"""Least difference between ink and background, of 1, for an image that is not blank."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as Pillow's own conversion has them."""

INK = 0.25
"""Share of the strongest ink above which a pixel belongs to the digit, when its box is sought."""

SKETCH = 100
"""Longer side, in pixels, of the reduced copy in which paper, noise and the digit's box are sought: averages noise."""

MAX_NOISE = 0.25
"""Most that is taken for noise of the paper, as a share of the strongest ink."""

Floats = NDArray[np.float32]


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """One digit from a PNG or JPEG, of any size, dark on light or light on dark.

    An image of 28x28 pixels is taken as it is, as the distance from the median of its frame. Of any other, light that
    falls unevenly and the paper's noise are taken off; the digit is scaled to 20 pixels and put into the middle by its
    mass, as MNIST's were (LeCun et al. 1998, Gradient-based learning applied to document recognition, section III.A).

    Returns:
        (1, 1, 28, 28), float32, in [0, 1]; 0 is background.

    Raises:
        MissingFileError: no such file.
        DataError: it is no image, or it is blank.
    """
    path = Path(path)
    where = f"{str(path)!r}"
    with open_file(path) as file:
        try:
            with Image.open(file) as image:
                grey = _grey(ImageOps.exif_transpose(image))
        except UnidentifiedImageError as error:
            raise DataError("this is no image that can be read", where=where, hint="a PNG or JPEG file") from error
        except Exception as error:  # a damaged file fails in whichever way its parser does
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
    """Brightness in [0, 1]; transparent parts become the opposite of what is drawn."""
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
    """The pixels along the four sides."""
    width = max(1, min(grey.shape) // 30)
    frame = np.ones(grey.shape, dtype=bool)
    frame[width:-width, width:-width] = False
    return frame


def _reduced(grey: Floats) -> Floats:
    """At most `SKETCH` pixels long, by averaging."""
    if max(grey.shape) <= SKETCH:
        return grey
    height, width = (max(1, round(n * SKETCH / max(grey.shape))) for n in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BOX))


def _paper(grey: Floats) -> Floats:
    """Brightness of the paper at each pixel: a plane through the frame.

    Least absolute deviations, by reweighting: ink that touches the frame hardly bends it.
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
    """(1, y, x) at the middle of each pixel, y and x from 0 to 1."""
    y, x = ((np.arange(n) + 0.5) / n for n in shape)
    return np.stack(np.broadcast_arrays(1.0, y[:, None], x[None, :]), axis=-1)


def _box(ink: Floats, noise: float) -> Floats:
    """The part of the image that holds the digit."""
    sketch = _reduced(ink)
    rows, columns = np.nonzero(sketch > max(INK, 2 * noise) * sketch.max())
    sides = []
    for found, n, full in zip((rows, columns), sketch.shape, ink.shape, strict=True):
        sides.append(slice(int(found.min() * full / n), math.ceil((found.max() + 1) * full / n)))
    return ink[tuple(sides)]


def _centred(ink: Floats, noise: float) -> Floats:
    """The digit at MNIST's size and place; ``noise`` is a share of the strongest ink."""
    digit = np.ascontiguousarray(_box(_box(ink, noise), noise))  # the second look is a closer one
    factor = BOX / max(digit.shape)
    height, width = (max(1, round(n * factor)) for n in digit.shape)
    scaled = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.LANCZOS)).clip(0, None)
    scaled = ((scaled / scaled.max() - noise) / (1 - noise)).clip(0, 1)
    y, x = (float((scaled.sum(axis) * np.arange(n)).sum() / scaled.sum()) for axis, n in ((1, height), (0, width)))
    # the mass of MNIST's digits is at pixel 14, counted from 0
    top, left = (min(max(round(SIDE / 2 - centre), 0), SIDE - n) for centre, n in ((y, height), (x, width)))
    result = np.zeros((SIDE, SIDE), dtype=np.float32)
    result[top : top + height, left : left + width] = scaled
    return result
