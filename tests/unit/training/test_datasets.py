"""Data sets by name: the embedded digits, torchvision's files, and errors when they are missing."""

from __future__ import annotations

import hashlib
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import loraio
from loraio.errors import ConfigError, DataError, UnknownNameError
from loraio.training import datasets, torchvision_datasets

MNIST_PARTS = ("train", "t10k")
EMNIST_PARTS = ("emnist-digits-train", "emnist-digits-test")
FOLDERS = {
    "mnist": ("MNIST", MNIST_PARTS),
    "fashion-mnist": ("FashionMNIST", MNIST_PARTS),
    "kmnist": ("KMNIST", MNIST_PARTS),
    "emnist-digits": ("EMNIST", EMNIST_PARTS),
}


def idx(values: Tensor) -> bytes:
    """An array of bytes in the IDX format: a magic number, the sizes, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.contiguous().numpy().tobytes()


def fake(root: Path, name: str, *, images: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
    """Write files as torchvision expects them, with random pixels; return images and labels of each split."""
    folder, parts = FOLDERS[name]
    (root / folder / "raw").mkdir(parents=True, exist_ok=True)
    made = {}
    for split, part in zip(("train", "test"), parts, strict=True):
        generator = torch.Generator().manual_seed(len(made))
        pixels = torch.randint(256, (images, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(images, dtype=torch.uint8) % 10
        (root / folder / "raw" / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (root / folder / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        made[split] = (pixels, labels)
    return made


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every download fail at once; return the addresses that were tried."""
    tried: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        tried.append(url)
        print(f"Failed to download {url}")  # noqa: T201  # as torchvision does
        raise RuntimeError("no network here")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    return tried


def test_the_registry_has_the_data_sets() -> None:
    assert set(datasets.DATASETS) >= {*FOLDERS, "digits", "cifar10", "cifar100"}
    assert set(datasets.SOURCES) >= {"imagefolder"}


def test_the_embedded_digits_are_split_in_halves_and_stand_in_the_middle(
    digits: loraio.Dataset, digits_test: loraio.Dataset
) -> None:
    assert (len(digits), len(digits_test)) == (898, 899)
    for part in (digits, digits_test):
        assert part.images.shape == (len(part), 1, 28, 28)
        assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert (float(part.images.min()), float(part.images.max())) == (0, 1)
        assert part.labels.unique().tolist() == list(range(10))
        assert float(part.images[:, :, 4:24, 4:24].mean()) > 0.2
        edge = part.images.clone()
        edge[:, :, 4:24, 4:24] = 0
        assert float(edge.abs().max()) == 0
    again = loraio.load_dataset("digits", "train")
    assert again.images.equal(digits.images)
    assert again.images.data_ptr() != digits.images.data_ptr()


def test_the_embedded_digits_are_scikit_learn_s_in_order(digits: loraio.Dataset, digits_test: loraio.Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert torch.cat([digits.labels, digits_test.labels]).tolist() == bunch.target.tolist()
    small = torch.nn.functional.interpolate(digits.images[:, :, 4:24, 4:24], size=(8, 8), mode="area")
    original = torch.from_numpy(bunch.images[:898]).float()[:, None] / 16
    distance, to_others = ((small - other).abs().mean((1, 2, 3)) for other in (original, original.roll(1, 0)))
    assert float(distance.max()) < 0.15  # a digit shrunk again is blurred, but the same
    assert float(to_others.mean()) > 0.2


@pytest.mark.parametrize("name", FOLDERS)
def test_files_in_the_root_are_read_without_a_download(tmp_path: Path, no_network: list[str], name: str) -> None:
    for split, (pixels, labels) in fake(tmp_path, name).items():
        found = loraio.load_dataset(name, split, root=tmp_path)
        upright = pixels.transpose(1, 2) if name == "emnist-digits" else pixels
        assert (found.name, found.split, len(found)) == (name, split, 20)
        assert found.images.equal(upright[:, None].float().div_(255))
        assert found.images.is_contiguous()
        assert found.labels.equal(labels.long())
    assert no_network == []


def test_the_root_comes_from_the_environment_unless_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "one", "mnist", images=10)
    made = fake(tmp_path / "two", "mnist", images=30)
    monkeypatch.setenv("LORAIO_DATA", str(tmp_path / "two"))
    assert loraio.load_dataset("mnist", "test").labels.equal(made["test"][1].long())
    assert len(loraio.load_dataset("mnist", root=tmp_path / "one")) == 10


def test_the_default_root_is_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAIO_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert datasets.default_root() == Path("/somewhere/loraio/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert datasets.default_root() == Path.home() / ".cache/loraio/data"
    monkeypatch.setenv("LORAIO_DATA", "~/mine")
    assert datasets.default_root() == Path.home() / "mine"


@pytest.mark.parametrize("name", [*FOLDERS, "cifar10", "cifar100"])
def test_the_error_without_data_and_network_has_a_hint(
    tmp_path: Path, no_network: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        loraio.load_dataset(name, root=tmp_path)
    text = str(caught.value)
    folder, parts = FOLDERS.get(name, ("", ()))
    names = [f"{folder}/raw/{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
    for file in names or ["cifar"]:
        assert f"looked for {tmp_path / file}" in text
    assert "no network here" in text
    assert "--dataset digits" in text
    assert repr(str(tmp_path)) in text
    assert no_network != []
    assert capsys.readouterr().out == ""
    if name == "mnist":
        fake(tmp_path, name)
        (tmp_path / names[3]).unlink()
        with pytest.raises(DataError) as caught:
            loraio.load_dataset(name, root=tmp_path)
        missing = [line for line in caught.value.problems if line.startswith("looked for")]
        assert missing == [f"looked for {tmp_path / names[3]}"]


def test_a_download_talks_on_stderr_and_cannot_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timeouts = []

    def download(self: torchvision.datasets.MNIST) -> None:
        timeouts.append(socket.getdefaulttimeout())
        print("downloading")  # noqa: T201  # as torchvision does
        fake(tmp_path, "mnist")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(loraio.load_dataset("mnist", root=tmp_path)) == 20
    assert capsys.readouterr() == ("", "downloading\n")
    assert timeouts == [torchvision_datasets.DOWNLOAD_TIMEOUT]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("bad", [slice(-100), slice(16), slice(0), b"<html>" * 100])
def test_a_damaged_file_is_no_missing_file(tmp_path: Path, no_network: list[str], bad: slice | bytes) -> None:
    fake(tmp_path, "mnist")
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(bad if isinstance(bad, bytes) else file.read_bytes()[bad])
    with pytest.raises(DataError, match="MNIST is damaged") as caught:
        loraio.load_dataset("mnist", root=tmp_path)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert no_network == []


def test_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    fake(tmp_path, "mnist")
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(idx(torch.zeros(19, dtype=torch.uint8)))
    with pytest.raises(DataError, match="labels are"):
        loraio.load_dataset("mnist", root=tmp_path)


def test_unknown_names_and_splits_are_answered() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'mnist'.*imagefolder:PATH"):
        loraio.load_dataset("minst")
    with pytest.raises(UnknownNameError, match="no source of images 'imagefoldr'; did you mean 'imagefolder'"):
        loraio.load_dataset("imagefoldr:photos")
    with pytest.raises(ConfigError, match="'tset'"):
        loraio.load_dataset("digits", "tset")


def fake_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, list[int]]]:
    """Write pickles as torchvision expects them, with their checksums; return images and labels of each split."""
    cls, key, classes = {
        "cifar10": (torchvision.datasets.CIFAR10, "labels", 10),
        "cifar100": (torchvision.datasets.CIFAR100, "fine_labels", 100),
    }[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    made = {}
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        entries, pixels, labels = [], [], []
        for n, (file, _) in enumerate(getattr(cls, attribute)):
            values = torch.randint(256, (6, 3072), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
            numbers = [(n + row) % classes for row in range(6)]
            (folder / file).write_bytes(pickle.dumps({"data": values.numpy(), key: numbers}))
            entries.append([file, hashlib.md5((folder / file).read_bytes()).hexdigest()])
            pixels.append(values)
            labels += numbers
        monkeypatch.setattr(cls, attribute, entries)
        made[split] = (torch.cat(pixels).view(-1, 3, 32, 32), labels)
    meta = {**cls.meta}
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [f"class {n}" for n in range(classes)]}))
    meta["md5"] = hashlib.md5((folder / meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(cls, "meta", meta)
    return made


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_in_colour_with_its_class_names(
    tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch, name: str, classes: int
) -> None:
    for split, (pixels, labels) in fake_cifar(tmp_path, name, monkeypatch).items():
        found = loraio.load_dataset(name, split, root=tmp_path)
        assert found.images.equal(pixels.float().div_(255))
        assert found.labels.tolist() == labels
        assert (found.classes, found.class_names[2]) == (classes, "class 2")
    assert no_network == []
    next(tmp_path.glob("cifar*/*test*")).write_bytes(b"other")
    with pytest.raises(DataError, match="is damaged"):
        loraio.load_dataset(name, "test", root=tmp_path)


def test_classes_have_names(digits: loraio.Dataset) -> None:
    assert digits.class_names == tuple("0123456789")
    assert digits.class_number("7") == 7
    assert torchvision_datasets.GARMENTS[9] == "Ankle boot"
    labels = torch.zeros(2, dtype=torch.int64)
    own = loraio.Dataset(
        name="x", split="test", images=torch.zeros(2, 1, 2, 2), labels=labels, classes=2, class_names=("cat", "dog")
    )
    assert own.class_number("dog") == 1
    with pytest.raises(UnknownNameError, match="no class 'dgo'; did you mean 'dog'"):
        own.class_number("dgo")
    for wrong in (("cat",), ("cat", "cat"), ("a", "b", "c")):
        with pytest.raises(DataError, match="class names"):
            replace(own, class_names=wrong)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 28, 28), [0, 0, 0], "images are"),
        (torch.zeros(3, 1, 28, 28).double(), [0, 0, 0], "images are torch.float64"),
        (torch.zeros(3, 1, 28, 28), [0, 0], r"labels are torch.int64 \(2,\)"),
        (torch.zeros(2, 1, 28, 28), [0.0, 1.0], "labels are torch.float32"),
        (torch.zeros(0, 1, 28, 28), torch.arange(0), "no images"),
        (torch.zeros(2, 1, 28, 28), [0, 10], "from 0 to 10, not 0 to 9"),
        (torch.zeros(2, 1, 28, 28), [-1, 3], "from -1 to 3"),
    ],
)
def test_wrong_images_and_labels_are_refused(images: Tensor, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        loraio.Dataset(name="mine", split="train", images=images, labels=torch.as_tensor(labels))
    assert "'mine'" in str(caught.value)
