"""The user's own images: a folder for each class, decoded once into one tensor in the form that a network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from loraio.bases.networks import find_network, network_args_of, network_of
from loraio.errors import ConfigError, DataError, MissingFileError
from loraio.registry import known, nearest
from loraio.training.batches import stratified_split
from loraio.training.config import check_at_least

MAX_BYTES = 4 * 2**30
"""Default for the most memory that the images of one split may take, in bytes."""

TEST_SHARE = 0.2
"""Share of each class that tests where a folder has no split of its own."""

SPLIT_SEED = 1
"""Seed of that split. It is not the seed of the run: a base and its adapters must be tested on the same images."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue for torchvision's networks."""

DECODED_AT_ONCE = 32
"""Images in one message of a worker."""

TEST_FOLDERS = ("test", "val")
"""Folders with the images that test; the first one that exists is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageForm:
    """Form of the images that a network takes.

    Attributes:
        channels: 1 for grey, 3 for red, green and blue.
        size: (height, width) in pixels; None keeps the images' own size, which must then be the same for all.
        mean: subtracted from each channel, from values in [0, 1]; empty to leave the values alone.
        std: divisor of each channel after that.

    Raises:
        ConfigError: neither 1 nor 3 channels, or a size below 1.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"images have 1 channel or 3, the network takes {self.channels}")
        if self.size is not None:
            check_at_least(1, height=self.size[0], width=self.size[1])


class Source(Protocol):
    """A reader of the user's own images, such as `read_folder`."""

    def __call__(
        self, path: Path, split: str, /, *, form: ImageForm, workers: int, max_bytes: int
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return images, labels and class names of one split."""
        ...


def image_form(model: nn.Module, *, size: int | None = None) -> ImageForm:
    """Return the form in which a network takes images.

    The first convolution decides between grey and colour. The size is known for networks by name. Values are
    normalised with ImageNet's mean and deviation for torchvision's networks.

    Args:
        model: the network.
        size: height and width to use instead, in pixels.

    Raises:
        ConfigError: the network takes neither 1 nor 3 channels.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    name = network_of(model) or ""
    shape = find_network(name, network_args_of(model)).input_shape if name else None
    channels = first.in_channels if first is not None else shape[0] if shape else 3
    mean, std = IMAGENET if name.startswith("torchvision:") and channels == 3 else ((), ())
    known_size = (shape[-2], shape[-1]) if shape is not None and len(shape) == 3 else None
    return ImageForm(channels=channels, size=(size, size) if size else known_size, mean=mean, std=std)


def read_folder(
    path: Path, split: str, *, form: ImageForm, workers: int = 0, max_bytes: int = MAX_BYTES
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Decode the images of one split.

    ``path`` holds ``train`` and ``test`` (or ``val``), each with one folder for each class. Or it holds the class
    folders themselves; a fifth of each class, drawn with a fixed seed, then tests. Images are scaled until they cover
    the size, and cropped around their centre. Classes are numbered in the order of their names.

    Args:
        path: the folder.
        split: "train" or "test".
        form: channels, size and normalisation.
        workers: processes that decode; 0 decodes in this one.
        max_bytes: most memory that the images may take.

    Returns:
        images (n, channels, height, width), float32, in [0, 1] unless normalised; labels (n,), int64; class names.

    Raises:
        MissingFileError: no such folder.
        DataError: no classes, a class without images, a damaged image, images of several sizes, or too many bytes.
    """
    check_at_least(0, workers=workers)
    where = f"{str(path)!r}"
    if not path.is_dir():
        raise MissingFileError(f"there is no folder {where}")
    files, labels, names = _listed(path, split)
    height, width = form.size or _common_size(files, where)
    needed = len(files) * form.channels * height * width * 4
    if needed > max_bytes:
        raise DataError(
            f"{len(files):,} images of ({form.channels}, {height}, {width}) take {needed:,} bytes of memory, more than "
            f"the limit of {max_bytes:,}",
            where=where,
            hint=f"a smaller --image-size, or --data-limit {math.ceil(needed / 2**30)}",
        )
    images = torch.empty(len(files), form.channels, height, width)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Decoded(files, form.channels, (height, width)),
        batch_size=DECODED_AT_ONCE,
        num_workers=workers,
        collate_fn=list,
    )
    problems = []
    for place, found in enumerate(chain.from_iterable(loader)):
        if isinstance(found, str):
            problems.append(found)
        else:
            images[place] = found
    if problems:
        raise DataError(
            f"{len(problems)} of {len(files):,} images cannot be read",
            problems=problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else []),
            where=where,
        )
    if form.mean:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (form.mean, form.std))
        images.sub_(mean).div_(std)
    return images, labels, names


def _listed(path: Path, split: str) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Return files, labels and class names of one split."""
    if not (path / "train").is_dir():
        files, labels, names = _classes(path)
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        rows = stratified_split(labels, TEST_SHARE, generator=generator)[split == "test"]
        if not len(rows):
            raise DataError("no class has two images, so none is left to test", where=f"{str(path)!r}")
        return [files[row] for row in rows.tolist()], labels[rows], names
    if split == "train":
        return _classes(path / "train")
    folder = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if folder is None:
        raise DataError(
            f"there is a folder 'train', but none of {', '.join(map(repr, TEST_FOLDERS))}", where=f"{str(path)!r}"
        )
    _, _, names = _classes(path / "train")
    files, labels, found = _classes(folder)
    if strange := [name for name in found if name not in names]:
        raise DataError(
            f"the class {strange[0]!r} is not among the training classes{nearest(strange[0], names)}",
            where=f"{str(folder)!r}",
            hint=f"the classes are: {known(names)}",
        )
    numbers = torch.tensor([names.index(name) for name in found])
    return files, numbers[labels], names


def _classes(path: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    from torchvision.datasets import folder

    where = f"{str(path)!r}"
    names = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise DataError("there are no folders of classes", where=where, hint="PATH/CLASS/IMAGE.png")
    try:
        pairs = folder.make_dataset(str(path), {name: n for n, name in enumerate(names)}, folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:  # a class without images
        raise DataError(str(error).splitlines()[0], where=where) from error
    return [Path(file) for file, _ in pairs], torch.tensor([label for _, label in pairs]), names


def _common_size(files: Sequence[Path], where: str) -> tuple[int, int]:
    """Return the (height, width) that all images share, from their headers.

    Files that cannot be read are skipped here; decoding them gives the error.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            with Image.open(file) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the camera was held sideways
                sizes.setdefault(image.size if turned else (image.height, image.width), file)
        except Exception:  # damaged files fail in many ways
            continue
    if len(sizes) > 1:
        (one, a), (other, b) = list(sizes.items())[:2]
        raise DataError(
            f"images are of several sizes: {a.name!r} is {one}, {b.name!r} {other}, and the network's own is not known",
            where=where,
            hint="--image-size N",
        )
    return next(iter(sizes), (1, 1))


class _Decoded(torch.utils.data.Dataset[Tensor | str]):
    """Images as tensors. A damaged image gives a line of text: not every exception survives its way from a worker."""

    def __init__(self, files: Sequence[Path], channels: int, size: tuple[int, int]) -> None:
        self.files = files
        self.channels = channels
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor | str:
        file = self.files[row]
        try:
            with Image.open(file) as image:
                return _decoded(ImageOps.exif_transpose(image), self.channels, self.size)
        except Exception as error:  # parsers of damaged files raise anything
            return f"{str(file)!r}: {error}"


def _decoded(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    height, width = size
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits: a conversion to 8 would keep the low ones
        top = 65535.0 if image.mode.startswith("I") else 1.0
        wide = Image.fromarray(np.asarray(image, dtype=np.float32) / np.float32(top))
        values = np.asarray(ImageOps.fit(wide, (width, height), Image.Resampling.BILINEAR)).clip(0, 1)
        return torch.from_numpy(values.astype(np.float32))[None].expand(channels, -1, -1)
    image = image.convert("L" if channels == 1 else "RGB")
    values = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(height, width, channels)).permute(2, 0, 1)
