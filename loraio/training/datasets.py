"""Data sets by name. Each is held in memory as one tensor of images and one of labels.

To add one, write a function that returns images, labels and class names, and name it in `DATASETS` or `SOURCES`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.errors import ConfigError, DataError
from loraio.registry import lookup
from loraio.training.image_folders import MAX_BYTES, ImageForm, Source, read_folder
from loraio.training.torchvision_datasets import DIGITS, GARMENTS, Reader, cifar, mnist_like

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: as registered, or any other for data of your own.
        split: "train" or "test".
        images: (n, channels, height, width), float32, in [0, 1] unless they are normalised.
        labels: (n,), int64, 0 to classes - 1.
        classes: number of classes, also those without images.
        class_names: one for each class; by default its number.

    Raises:
        DataError: a shape or dtype is wrong, there are no images, a label is out of range, or the class names are too
            few, too many or not distinct.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: int = 10
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(self.class_names)
        if names == tuple(map(str, range(len(names)))):  # none, or the default for another number of classes
            names = tuple(map(str, range(self.classes)))
        object.__setattr__(self, "class_names", names)
        if problem := self._problem():
            raise DataError(problem, where=f"data set {self.name!r}, {self.split}")

    def _problem(self) -> str | None:
        names, images, labels = self.class_names, self.images, self.labels
        if len(set(names)) != self.classes or len(names) != self.classes:
            return f"{len(names)} class names, {len(set(names))} of them different, not {self.classes}"
        if images.ndim != 4 or images.dtype != torch.float32:
            return f"images are {images.dtype} {tuple(images.shape)}, not float32 (n, c, h, w)"
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            return f"labels are {labels.dtype} {tuple(labels.shape)}, not int64 ({len(images)},)"
        if not len(labels):
            return "there are no images"
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.classes:
            return f"labels go from {low} to {high}, not 0 to {self.classes - 1}"
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def class_number(self, name: str) -> int:
        """Return the number of the class of that name.

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
    """Load a data set by name, or images of your own, into memory.

    Args:
        name: a name in `DATASETS`, or ``SOURCE:PATH`` with a name in `SOURCES`, such as ``imagefolder:photos``; see
            `loraio.training.image_folders.read_folder`.
        split: "train" or "test".
        root: folder of the torchvision data sets; by default `default_root`. Missing files are downloaded.
        form: for a source: channels, size and normalisation, as `image_form` finds them for a network.
        workers: for a source: processes that decode; 0 decodes in this one.
        max_bytes: for a source: most memory that the images may take.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: no such split.
        DataError: the files are missing and cannot be downloaded, or they are damaged, or too large for ``max_bytes``.
        MissingFileError: no such folder.
    """
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}. Known: {', '.join(SPLITS)}")
    source, colon, path = name.partition(":")
    if colon:
        read = lookup(SOURCES, source, what="source of images")
        found = read(Path(path).expanduser(), split, form=form or ImageForm(), workers=workers, max_bytes=max_bytes)
    else:
        lookup(dict.fromkeys([*DATASETS, *(f"{source}:PATH" for source in SOURCES)]), name, what="data set")
        found = DATASETS[name](split, Path(root) if root is not None else default_root())
    images, labels, class_names = found
    return Dataset(
        name=name, split=split, images=images, labels=labels, classes=len(class_names), class_names=class_names
    )


def default_root() -> Path:
    """Return the folder of the torchvision data sets.

    It is ``LORAIO_DATA`` if that is set, else ``loraio/data`` in the user's cache folder.
    """
    if configured := os.environ.get("LORAIO_DATA"):
        return Path(configured).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loraio" / "data"


def _read_digits(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read scikit-learn's 1,797 digits of 8x8 pixels, scaled to 20x20 and centred in 28x28 like MNIST's.

    The first half trains. The second half, by other writers, tests.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images, labels = F.pad(images, (4, 4, 4, 4)).clamp_(0, 1), torch.from_numpy(bunch.target).long()
    half = len(labels) // 2
    part = slice(None, half) if split == "train" else slice(half, None)
    return images[part].clone(), labels[part].clone(), DIGITS


DATASETS: dict[str, Reader] = {
    "mnist": mnist_like("MNIST"),
    "fashion-mnist": mnist_like("FashionMNIST", class_names=GARMENTS),
    "kmnist": mnist_like("KMNIST", class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist-digits": mnist_like(
        "EMNIST", parts=("emnist-digits-train", "emnist-digits-test"), transposed=True, split="digits"
    ),
    "digits": _read_digits,
    "cifar10": cifar(
        "CIFAR10", "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]
    ),
    "cifar100": cifar("CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
}
"""Readers of the data sets with a fixed name."""

SOURCES: dict[str, Source] = {"imagefolder": read_folder}
"""Readers of the user's own images, by the word before the colon in ``SOURCE:PATH``."""
