"""Data sets by name. Each is held in memory as one tensor of images and one of labels."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.errors import ConfigError, DataError
from loraio.registry import lookup
from loraio.training.image_folders import FOLDER_PREFIX, MAX_BYTES, ImageForm, read_folder

SPLITS = ("train", "test")

DOWNLOAD_TIMEOUT = 30.0
"""Seconds that a download may stand still before it counts as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: as registered, or any other for data of one's own.
        split: "train" or "test".
        images: (n, channels, height, width), float32, in [0, 1] unless they are normalised.
        labels: (n,), int64, 0 to classes - 1.
        classes: how many classes there are, whether all occur or not.
        class_names: one for each class; by default its number.

    Raises:
        DataError: shapes or dtypes are others, there are no images, a label is out of range, or class names are
            missing, left over or twice the same.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: int = 10
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"data set {self.name!r}, {self.split}"
        names = tuple(self.class_names)
        if names == tuple(map(str, range(len(names)))):  # none, or the default for another number of classes
            names = tuple(map(str, range(self.classes)))
        object.__setattr__(self, "class_names", names)
        if len(set(names)) != self.classes or len(names) != self.classes:
            raise DataError(
                f"{len(names)} class names, {len(set(names))} of them different, not {self.classes}", where=where
            )
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise DataError(
                f"images are {self.images.dtype} {tuple(self.images.shape)}, not float32 (n, c, h, w)", where=where
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise DataError(
                f"labels are {self.labels.dtype} {tuple(self.labels.shape)}, not int64 ({len(self.images)},)",
                where=where,
            )
        if not len(self.labels):
            raise DataError("there are no images", where=where)
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.classes:
            raise DataError(f"labels go from {low} to {high}, not 0 to {self.classes - 1}", where=where)

    def __len__(self) -> int:
        return len(self.labels)

    def class_number(self, name: str) -> int:
        """The number of the class of that name.

        Raises:
            UnknownNameError: no such class; the error says the nearest one.
        """
        return lookup({known: number for number, known in enumerate(self.class_names)}, name, what="class")


def load_dataset(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    form: ImageForm | None = None,
    workers: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """A data set by name, or images of one's own, in memory.

    Args:
        name: a name in `DATASETS`, or ``imagefolder:PATH``; see `loraio.training.image_folders.read_folder`.
        split: "train" or "test".
        root: folder of the torchvision data sets; by default `default_root`. Files that are not there are downloaded.
        form: for an image folder: channels, size and normalisation, as `image_form` finds them for a network.
        workers: for an image folder: processes that decode; 0 decodes in this one.
        max_bytes: for an image folder: refuse to take more memory than this.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: no such split.
        DataError: the files are neither there nor to be had, or they are damaged, or too large together.
        MissingFileError: no such folder.
    """
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}. Known: {', '.join(SPLITS)}")
    if name.startswith(FOLDER_PREFIX):
        folder = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
        found = read_folder(folder, split, form=form or ImageForm(), workers=workers, max_bytes=max_bytes)
    else:
        read = lookup(DATASETS, name, what="data set")
        found = read(split, Path(root) if root is not None else default_root())
    images, labels, class_names = found
    return Dataset(
        name=name, split=split, images=images, labels=labels, classes=len(class_names), class_names=class_names
    )


def default_root() -> Path:
    """Where torchvision data sets live: ``LORAIO_DATA`` if set, else ``loraio/data`` in the user's cache folder."""
    if configured := os.environ.get("LORAIO_DATA"):
        return Path(configured).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loraio" / "data"


def _read_digits(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """scikit-learn's 1,797 digits of 8x8 pixels, as 20x20 in the middle of 28x28, like MNIST's.

    The first half trains; the second half, by other writers, tests.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images, labels = F.pad(images, (4, 4, 4, 4)).clamp_(0, 1), torch.from_numpy(bunch.target).long()
    half = len(labels) // 2
    part = slice(None, half) if split == "train" else slice(half, None)
    return images[part].clone(), labels[part].clone(), DIGITS


Reader = Callable[[str, Path], tuple[Tensor, Tensor, tuple[str, ...]]]
"""Split and root folder in; images, labels and class names out."""

DIGITS = tuple("0123456789")


def _torchvision(
    class_name: str,
    *,
    parts: tuple[str, str] = ("train", "t10k"),
    transposed: bool = False,
    class_names: tuple[str, ...] = DIGITS,
    **options: Any,
) -> Reader:
    """A reader for one of torchvision's MNIST-like data sets, downloaded on first use.

    Args:
        class_name: in ``torchvision.datasets``; also the folder's name.
        parts: how the names of the files for training and for testing begin.
        transposed: the images are stored with rows and columns exchanged.
        class_names: in the order of the labels.
        options: further arguments of the class.
    """
    files = [f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]

    def read(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        found = _fetched(class_name, split, root, folder=root / class_name / "raw", files=files, options=options)
        images = found.data.float().div_(255)
        images = images.transpose(1, 2).contiguous() if transposed else images
        return images[:, None], found.targets.long(), class_names

    return read


def _cifar(class_name: str, folder: str, files: Sequence[str]) -> Reader:
    """A reader for CIFAR-10 or CIFAR-100: 32x32 in colour, downloaded on first use."""

    def read(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        found = _fetched(class_name, split, root, folder=root / folder, files=files)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return images, torch.tensor(found.targets, dtype=torch.int64), tuple(found.classes)

    return read


def _fetched(
    class_name: str, split: str, root: Path, *, folder: Path, files: Sequence[str], options: Any = None
) -> Any:
    """The data set of that class in ``torchvision.datasets``, with files that are missing downloaded.

    Raises:
        DataError: they are neither there nor to be had, or they are damaged.
    """
    from torchvision import datasets

    missing = [folder / name for name in files if not (folder / name).is_file()]
    try:
        with _no_endless_waits(), contextlib.redirect_stdout(sys.stderr):
            cls = getattr(datasets, class_name)
            return cls(root=root, train=split == "train", download=bool(missing), **(options or {}))
    except Exception as error:  # files, downloads and archives fail in many ways
        still_missing = [path for path in missing if not path.is_file()]
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if not still_missing:
            raise DataError(
                f"{class_name} is damaged: {lines[0]}",
                where=f"{str(folder)!r}",
                hint="remove this folder; the files are then downloaded again",
            ) from error
        raise DataError(
            f"{class_name} is not there and cannot be downloaded",
            problems=[*lines, *(f"looked for {path}" for path in still_missing)],
            where=f"{str(root)!r}",
            hint="--dataset digits, which needs no files, or --data-root FOLDER for files of your own",
        ) from error


@contextlib.contextmanager
def _no_endless_waits() -> Iterator[None]:
    """torchvision sets no timeout; without one a network that swallows packets would hang the download for good."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""Fashion-MNIST's classes."""

DATASETS: dict[str, Reader] = {
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST", class_names=GARMENTS),
    "kmnist": _torchvision("KMNIST", class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist-digits": _torchvision(
        "EMNIST", parts=("emnist-digits-train", "emnist-digits-test"), transposed=True, split="digits"
    ),
    "digits": _read_digits,
    "cifar10": _cifar(
        "CIFAR10", "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]
    ),
    "cifar100": _cifar("CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
}
