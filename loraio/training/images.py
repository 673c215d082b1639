"""Image files of any size and polarity, brought into the form that the digit networks were trained on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from loraio.errors import DataError, MissingFileError

SIDE = 28
"""Height and width of the result, in pixels."""

BOX = 20
"""The longer side of the digit itself in the result, in pixels, as in MNIST."""

MIN_CONTRAST = 0.1
"""Least difference between ink and background, of 1, for an image that is not blank."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as Pillow's own conversion has them."""

INK = 0.25
"""Share of the strongest ink above which a pixel belongs to the digit, when its frame is sought."""


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """One digit from a PNG or JPEG, of any size, dark on light or light on dark.

    The background is the median of the frame of the image; ink is the distance from it. An image of 28x28 pixels is
    taken as it is, ink and background apart; any other is framed, scaled to 20 pixels and centred by its mass, as
    MNIST's were (LeCun et al. 1998, Gradient-based learning applied to document recognition, section III.A).

    Returns:
        (1, 1, 28, 28), float32, in [0, 1]; 0 is background.

    Raises:
        MissingFileError: no such file.
        DataError: it is no image, or it is blank.
    """
    path = Path(path)
    where = f"{str(path)!r}"
    try:
        with Image.open(path) as image:
            grey = _grey(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise MissingFileError(f"{where} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read as an image: {error}", where=where) from error
    frame = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(frame))
    contrast = float(ink.max())
    if contrast < MIN_CONTRAST:
        raise DataError(f"the image is blank: its strongest contrast is {contrast:.2f} of 1", where=where)
    if ink.shape != (SIDE, SIDE):
        ink = _centred(ink / contrast)
    return torch.from_numpy(np.ascontiguousarray(ink, dtype=np.float32))[None, None]


def _grey(image: Image.Image) -> NDArray[np.float32]:
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


def _centred(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, columns = np.nonzero(ink > INK)
    digit = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    factor = BOX / max(digit.shape)
    size = (max(1, round(digit.shape[1] * factor)), max(1, round(digit.shape[0] * factor)))
    scaled = np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)).clip(0, 1)
    y, x = (float((scaled.sum(axis) * np.arange(n)).sum() / scaled.sum()) for axis, n in ((1, size[1]), (0, size[0])))
    top, left = (min(max(round((SIDE - 1) / 2 - centre), 0), SIDE - n) for centre, n in ((y, size[1]), (x, size[0])))
    result = np.zeros((SIDE, SIDE), dtype=np.float32)
    result[top : top + size[1], left : left + size[0]] = scaled / scaled.max()
    return result
