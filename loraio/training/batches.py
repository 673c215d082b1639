"""Choose the images of each batch, for a whole run at once: the training loop does no work for single samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraio.errors import ConfigError, DataError

MAX_DRAWS = 2**28
"""Most images that one run may draw. Their indices are held in memory, 8 bytes each."""


def epoch_batches(images: int, batch_size: int, epochs: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Show every image once in each epoch, in a new random order.

    Yields:
        int64 index tensors of ``batch_size``; the last one of an epoch may be shorter.
    """
    for _ in range(epochs):
        yield from torch.randperm(images, generator=generator).split(batch_size)


def focused_batches(
    labels: Tensor, digit: int | None, *, focus: float, batch_size: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Draw batches in which one digit has a fixed share and the other classes share the rest evenly.

    Images of a class are taken in random order, each once before any is taken twice.

    Args:
        labels: (n,), int64.
        digit: class with the fixed share; None draws from all images alike.
        focus: that share, above 0 to 1, rounded to whole images of a batch, halves up, at least one.
        batch_size: images in a batch.
        steps: number of batches.
        generator: on the CPU.

    Returns:
        (steps, batch_size), int64, indices into ``labels``.

    Raises:
        ConfigError: more than `MAX_DRAWS` images would be drawn, or a focus below 1 still fills the batch.
        DataError: the data set has no image of the digit, or none of another class if the focus is below 1.

    >>> labels = torch.arange(10).repeat(20)
    >>> rows = focused_batches(labels, 3, focus=0.5, batch_size=8, steps=5, generator=torch.Generator())
    >>> (labels[rows] == 3).sum(1).tolist()
    [4, 4, 4, 4, 4]
    """
    if steps * batch_size > MAX_DRAWS:
        raise ConfigError(f"{steps:,} steps of {batch_size:,} images are more than {MAX_DRAWS:,} draws")
    if digit is None:
        everything = torch.arange(len(labels))
        return _in_turn(everything, steps * batch_size, generator).view(steps, batch_size)
    refuse_missing(labels, digit)
    pools = {int(label): torch.nonzero(labels == label).flatten() for label in labels.unique()}
    own = pools.pop(digit)
    share = max(1, int(batch_size * focus + 0.5))
    rest = batch_size - share
    if focus < 1 and not rest:
        raise ConfigError(
            f"focus {focus:g} of a batch of {batch_size} leaves no place for other images", hint="a larger --batch-size"
        )
    if rest and not pools:
        raise DataError(f"the data set has only images of class {digit}, focus {focus:g} needs others")
    rows = torch.empty(steps, batch_size, dtype=torch.int64)
    rows[:, :share] = _in_turn(own, steps * share, generator).view(steps, share)
    if rest:
        turns = _in_turn(torch.tensor(list(pools)), steps * rest, generator)
        others = torch.empty_like(turns)
        for label, pool in pools.items():
            places = turns == label
            others[places] = _in_turn(pool, int(places.sum()), generator)
        rows[:, share:] = others.view(steps, rest)
    return rows


def refuse_missing(labels: Tensor, digit: int) -> None:
    """Refuse a class without images.

    Raises:
        DataError: naming the classes that have some.
    """
    found = labels.unique().tolist()
    if digit not in found:
        raise DataError(f"the data set has no image of class {digit}, only of {', '.join(map(str, found))}")


def in_order(images: Tensor, *, channels_last: bool) -> Tensor:
    """Return the images, with their channels last in memory if that is asked for.

    Images of one channel have the same bytes in both orders. Convolutions go by the strides, which are set here.
    """
    if not channels_last:
        return images
    _, channels, height, width = images.shape
    last = images.contiguous(memory_format=torch.channels_last)
    return last.as_strided(last.shape, (channels * height * width, 1, channels * width, channels))


def stratified_split(labels: Tensor, share: float, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split every class in the same proportion, at random.

    Args:
        labels: (n,), int64.
        share: share of each class for the second part, above 0 to below 1, rounded to whole images, halves up. Both
            parts get at least one image of a class that has two; a single image stays in the first part.
        generator: on the CPU.

    Returns:
        two int64 index tensors in rising order, the first part and the second.

    >>> kept, held = stratified_split(torch.arange(3).repeat(10), 0.2, generator=torch.Generator())
    >>> len(kept), torch.arange(3).repeat(10)[held].bincount().tolist()
    (24, [2, 2, 2])
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        pool = torch.nonzero(labels == label).flatten()
        count = min(max(1, int(len(pool) * share + 0.5)), len(pool) - 1)
        held[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def _in_turn(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` members of the pool: one random order of it after another, the last one cut."""
    rounds = -(-count // len(pool))
    orders = [torch.randperm(len(pool), generator=generator) for _ in range(rounds)]
    return pool[torch.cat(orders)[:count]] if orders else pool[:0]
