"""Images in folders of classes: layouts, forms and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import loraio
from loraio.errors import ConfigError, DataError, MissingFileError
from loraio.training import image_folders


def put(path: Path, *, size: tuple[int, int] = (8, 6), seed: int = 0, mode: str = "RGB") -> np.ndarray:
    """Write an image of (height, width) with random pixels; return the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Write folders: train with three images of two classes each, val with one."""
    for n, name in enumerate(("dog", "cat")):
        for k in range(3):
            put(tmp_path / "train" / name / f"{k}.png", seed=10 * n + k)
        put(tmp_path / "val" / name / "a.png", seed=10 * n + 5)
    return tmp_path


def load(path: Path, part: str = "train", **options: object) -> loraio.Dataset:
    return loraio.load_dataset(f"imagefolder:{path}", part, **options)  # type: ignore[arg-type]


def test_images_of_the_right_size_keep_their_pixels(split: Path) -> None:
    found = load(split)
    assert (found.images.shape, found.labels.tolist()) == ((6, 3, 8, 6), [0, 0, 0, 1, 1, 1])
    assert (found.class_names, found.classes, found.split) == (("cat", "dog"), 2, "train")
    pixels = put(split.parent / "again" / "x.png", seed=10)
    assert found.images[0].equal(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert load(split, workers=2).images.equal(found.images)
    test = load(split, "test")
    assert (len(test), test.class_names) == (2, ("cat", "dog"))


def test_folders_without_a_split_are_split_once_for_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for k in range(10):
            put(tmp_path / name / f"{k}.png", seed=100 * ord(name) + k)
    train, test = load(tmp_path), load(tmp_path, "test")
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([8, 8], [2, 2])
    together = torch.cat([train.images, test.images]).flatten(1)
    assert len(together.unique(dim=0)) == 20
    assert load(tmp_path, "test").images.equal(test.images)


def test_images_are_scaled_to_cover_the_size_and_cut_around_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255  # a white square in the middle of black
    (tmp_path / "train/a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "train/a/wide.png")
    found = load(tmp_path, form=image_folders.ImageForm(size=(10, 10)))
    assert found.images.unique().tolist() == [1.0]
    assert load(tmp_path, form=image_folders.ImageForm(size=(20, 20), channels=1)).images.shape == (1, 1, 20, 20)


def test_grey_and_sixteen_bit_images(tmp_path: Path) -> None:
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 51, dtype=np.uint8)).save(folder / "1-grey.png")
    Image.fromarray(np.full((4, 4), 13107, dtype=np.uint16)).save(folder / "2-deep.png")
    Image.new("RGBA", (4, 4), (51, 51, 51, 255)).save(folder / "3-alpha.png")
    for channels in (1, 3):
        found = load(tmp_path, form=image_folders.ImageForm(channels=channels))
        assert found.images.shape == (3, channels, 4, 4)
        torch.testing.assert_close(found.images, torch.full_like(found.images, 0.2))


def test_values_are_normalised_where_the_form_says_so(split: Path) -> None:
    form = image_folders.ImageForm(mean=(0.5, 0.25, 0.0), std=(0.5, 2.0, 1.0))
    plain, normalised = load(split).images, load(split, form=form).images
    expected = torch.stack([(plain[:, 0] - 0.5) / 0.5, (plain[:, 1] - 0.25) / 2, plain[:, 2]], 1)
    torch.testing.assert_close(normalised, expected)


def test_the_form_is_what_the_network_takes(base: nn.Module) -> None:
    assert loraio.image_form(base) == image_folders.ImageForm(channels=1, size=(28, 28))
    assert loraio.image_form(nn.Conv2d(3, 4, 3)) == image_folders.ImageForm(channels=3)
    assert loraio.image_form(nn.Conv2d(3, 4, 3), size=64).size == (64, 64)
    resnet = loraio.build_network("torchvision:resnet18", args={"num_classes": 2}, seed=1)
    mean, std = image_folders.IMAGENET
    assert loraio.image_form(resnet) == image_folders.ImageForm(size=(224, 224), mean=mean, std=std)
    with pytest.raises(ConfigError, match="images have 1 channel or 3, the network takes 4"):
        loraio.image_form(nn.Conv2d(4, 4, 3))


def test_more_bytes_than_the_limit_are_refused_with_both_numbers(split: Path) -> None:
    with pytest.raises(
        DataError, match=r"6 images of \(3, 8, 6\) take 3,456 bytes of memory, more than the limit of 3,455"
    ):
        load(split, max_bytes=3455)
    assert len(load(split, max_bytes=3456)) == 6


def test_images_of_several_sizes_need_the_option(split: Path) -> None:
    put(split / "train/cat/9.png", size=(9, 6))
    with pytest.raises(DataError, match=r"several sizes: '0.png' is \(8, 6\), '9.png' \(9, 6\)") as caught:
        load(split)
    assert "--image-size" in str(caught.value)
    assert load(split, form=image_folders.ImageForm(size=(5, 5))).images.shape == (7, 3, 5, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_all_together(split: Path, workers: int) -> None:
    for name in ("a", "b"):
        (split / f"train/cat/{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 8 images cannot be read") as caught:
        load(split, workers=workers)
    assert [name in line for name, line in zip(("a.png", "b.png"), caught.value.problems, strict=True)] == [True, True]


def test_other_folders_are_refused(tmp_path: Path, split: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="no folders of classes"):
        load(tmp_path / "flat")
    put(split / "val/dgo/x.png")
    with pytest.raises(DataError, match="'dgo' is not among the training classes; did you mean 'dog'"):
        load(split, "test")
    (split / "train/empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load(split)
    (tmp_path / "half/train/a").mkdir(parents=True)
    put(tmp_path / "half/train/a/1.png")
    with pytest.raises(DataError, match="none of 'test', 'val'"):
        load(tmp_path / "half", "test")


def test_a_class_missing_from_the_test_images_keeps_its_number(split: Path) -> None:
    for file in (split / "val/cat").iterdir():
        file.unlink()
    (split / "val/cat").rmdir()
    found = load(split, "test")
    assert (found.labels.tolist(), found.class_names) == ([1], ("cat", "dog"))
