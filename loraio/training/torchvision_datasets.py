"""Readers of torchvision's data sets, which are downloaded on first use."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.errors import DataError

Reader = Callable[[str, Path], tuple[Tensor, Tensor, tuple[str, ...]]]
"""Take a split and the root folder; return images, labels and class names."""

DIGITS = tuple("0123456789")
"""Class names of the digits."""

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""Class names of Fashion-MNIST."""

DOWNLOAD_TIMEOUT = 30.0
"""Seconds without a byte after which a download has failed."""


def mnist_like(
    class_name: str,
    *,
    parts: tuple[str, str] = ("train", "t10k"),
    transposed: bool = False,
    class_names: tuple[str, ...] = DIGITS,
    **options: Any,
) -> Reader:
    """Return a reader for a data set in MNIST's layout.

    Args:
        class_name: class in ``torchvision.datasets``, and name of the folder.
        parts: prefixes of the file names, for training and for testing.
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


def cifar(class_name: str, folder: str, files: Sequence[str]) -> Reader:
    """Return a reader for CIFAR-10 or CIFAR-100: 32x32 pixels in colour."""

    def read(split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        found = _fetched(class_name, split, root, folder=root / folder, files=files)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return images, torch.tensor(found.targets, dtype=torch.int64), tuple(found.classes)

    return read


def _fetched(
    class_name: str, split: str, root: Path, *, folder: Path, files: Sequence[str], options: Any = None
) -> Any:
    """Return an object of that class in ``torchvision.datasets``; download its files if one is missing.

    Raises:
        DataError: the files are missing and cannot be downloaded, or they are damaged.
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
            f"{class_name} is missing and cannot be downloaded",
            problems=[*lines, *(f"looked for {path}" for path in still_missing)],
            where=f"{str(root)!r}",
            hint="--dataset digits, which needs no files, or --data-root FOLDER for files of your own",
        ) from error


@contextlib.contextmanager
def _no_endless_waits() -> Iterator[None]:
    """Give sockets a timeout: torchvision sets none, and a network that drops packets would block it forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
