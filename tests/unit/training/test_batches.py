"""Choosing the images of each batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraio.errors import DataError
from loraio.training.batches import epoch_batches, focused_batches, in_order

LABELS = torch.arange(10).repeat(30)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(
    digit: int | None = 3, *, labels: Tensor = LABELS, focus: float = 0.5, size: int = 16, steps: int = 9
) -> Tensor:
    return focused_batches(labels, digit, focus=focus, batch_size=size, steps=steps, generator=generator())


@pytest.mark.parametrize(
    ("focus", "size", "share"),
    [(0.5, 16, 8), (0.25, 64, 16), (0.5, 5, 3), (0.3, 10, 3), (0.01, 10, 1), (1.0, 7, 7), (0.8, 8, 6)],
)
def test_every_batch_has_exactly_the_share_of_the_digit(focus: float, size: int, share: int) -> None:
    found = rows(focus=focus, size=size)
    assert found.shape == (9, size)
    assert (LABELS[found] == 3).sum(1).tolist() == [share] * 9


def test_the_others_share_the_rest_evenly_over_the_run_and_in_each_batch() -> None:
    found = LABELS[rows(size=40, steps=9)]  # 20 of others in each: 180 in all, 20 for each of nine
    counts = torch.stack([torch.bincount(batch, minlength=10) for batch in found])
    others = [n for n in range(10) if n != 3]
    assert counts.sum(0)[others].tolist() == [20] * 9
    assert int(counts[:, others].min()) >= 1
    assert int(counts[:, others].max()) <= 4


def test_the_others_are_even_also_where_the_data_are_not() -> None:
    labels = torch.cat([torch.zeros(500), torch.ones(5), torch.full((50,), 3)]).long()
    found = labels[rows(labels=labels, size=8, steps=50)]
    assert torch.bincount(found.flatten(), minlength=4).tolist() == [100, 100, 0, 200]


@pytest.mark.parametrize("digit", [3, None])
def test_each_image_comes_once_before_any_comes_twice(digit: int | None) -> None:
    found = rows(digit, size=20, steps=40).flatten()
    for label in range(10):
        seen = found[LABELS[found] == label]
        assert len(seen) > 30
        if digit is None:
            continue
        for start in range(0, len(seen) - 29, 30):
            assert len(seen[start : start + 30].unique()) == 30
    if digit is None:
        assert len(found[:300].unique()) == len(found[300:600].unique()) == 300


def test_at_focus_1_there_is_nothing_but_the_digit() -> None:
    assert LABELS[rows(focus=1.0)].unique().tolist() == [3]
    only = torch.full((20,), 3)
    assert rows(labels=only, focus=1.0).max() < 20


def test_without_a_digit_all_images_come_as_they_are() -> None:
    labels = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    found = rows(None, labels=labels, size=20, steps=5)
    assert found.flatten().sort().values.tolist() == list(range(100))


def test_a_class_that_is_missing_or_alone_is_refused() -> None:
    with pytest.raises(DataError, match="no image of class 2, only of 0, 4"):
        rows(2, labels=torch.tensor([0, 4, 4]))
    with pytest.raises(DataError, match=r"only images of class 3, focus 0\.5 needs others"):
        rows(labels=torch.full((20,), 3))


def test_the_seed_decides_everything() -> None:
    def draw(seed: int) -> Tensor:
        return focused_batches(LABELS, 3, focus=0.5, batch_size=8, steps=20, generator=generator(seed))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))
    assert rows().dtype == torch.int64


def test_an_epoch_shows_every_image_once_and_its_last_batch_is_shorter() -> None:
    found = list(epoch_batches(10, 4, 2, generator=generator()))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    epochs = torch.cat(found[:3]), torch.cat(found[3:])
    assert [epoch.sort().values.tolist() for epoch in epochs] == [list(range(10))] * 2
    assert not epochs[0].equal(epochs[1])
    same, again, other = (torch.cat([*epoch_batches(50, 7, 1, generator=generator(seed))]) for seed in (4, 4, 5))
    assert same.equal(again)
    assert not same.equal(other)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_has_its_channels_last_in_memory_where_that_is_asked_for(channels: int) -> None:
    images = torch.randn(6, channels, 4, 5)
    for last in (False, True):
        found = in_order(images, channels_last=last)
        assert found.equal(images)
        assert torch.conv2d(found, torch.ones(2, channels, 2, 2)).is_contiguous() is not last
