"""Data sets by name. Each is held in memory as one tensor of images and one of labels."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.errors import ConfigError, DataError
from loraio.registry import lookup

SPLITS = ("train", "test")

DOWNLOAD_TIMEOUT = 30.0
"""Seconds that a download may stand still before it counts as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: as registered, or any other for data of one's own.
        split: "train" or "test".
        images: (n, channels, height, width), float32, in [0, 1].
        labels: (n,), int64, 0 to classes - 1.
        classes: how many classes there are, whether all occur or not.

    Raises:
        DataError: shapes or dtypes are others, there are no images, or a label is out of range.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: int = 10

    def __post_init__(self) -> None:
        where = f"data set {self.name!r}, {self.split}"
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


def load_dataset(name: str, split: str = "train", *, root: str | os.PathLike[str] | None = None) -> Dataset:
    """A registered data set, in memory.

    Args:
        name: a name in `DATASETS`.
        split: "train" or "test".
        root: folder of the torchvision data sets; by default `default_root`. Files that are not there are downloaded.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: no such split.
        DataError: the files are neither there nor to be had, or they are damaged.
    """
    read = lookup(DATASETS, name, what="data set")
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}. Known: {', '.join(SPLITS)}")
    images, labels = read(split, Path(root) if root is not None else default_root())
    return Dataset(name=name, split=split, images=images, labels=labels)


def default_root() -> Path:
    """Where torchvision data sets live: ``LORAIO_DATA`` if set, else ``loraio/data`` in the user's cache folder."""
    if configured := os.environ.get("LORAIO_DATA"):
        return Path(configured).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loraio" / "data"


def _read_digits(split: str, root: Path) -> tuple[Tensor, Tensor]:
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
    return images[part].clone(), labels[part].clone()


Reader = Callable[[str, Path], tuple[Tensor, Tensor]]
"""Split and root folder in; images and labels out."""


def _torchvision(
    class_name: str, *, parts: tuple[str, str] = ("train", "t10k"), transposed: bool = False, **options: Any
) -> Reader:
    """A reader for one of torchvision's MNIST-like data sets, downloaded on first use.

    Args:
        class_name: in ``torchvision.datasets``; also the folder's name.
        parts: how the names of the files for training and for testing begin.
        transposed: the images are stored with rows and columns exchanged.
        options: further arguments of the class.
    """

    def read(split: str, root: Path) -> tuple[Tensor, Tensor]:
        from torchvision import datasets

        folder = root / class_name / "raw"
        names = [f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
        missing = [folder / name for name in names if not (folder / name).is_file()]
        try:
            with _no_endless_waits(), contextlib.redirect_stdout(sys.stderr):
                cls = getattr(datasets, class_name)
                found = cls(root=root, train=split == "train", download=bool(missing), **options)
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
        images = found.data.float().div_(255)
        return (images.transpose(1, 2).contiguous() if transposed else images)[:, None], found.targets.long()

    return read


@contextlib.contextmanager
def _no_endless_waits() -> Iterator[None]:
    """torchvision sets no timeout; without one a network that swallows packets would hang the download for good."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


DATASETS: dict[str, Reader] = {
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST"),
    "kmnist": _torchvision("KMNIST"),
    "emnist-digits": _torchvision(
        "EMNIST", parts=("emnist-digits-train", "emnist-digits-test"), transposed=True, split="digits"
    ),
    "digits": _read_digits,
}
