"""Restore base weights from folded ones, slice by slice."""

from __future__ import annotations

from torch import Tensor

from loraio.adapter import Adapter
from loraio.errors import FormatError
from loraio.files.copying import Inputs
from loraio.merging.folds import Fold
from loraio.merging.plans import read_bytes, stored
from loraio.merging.residue_files import ResidueFile
from loraio.merging.residues import LENGTH, block_length, restored


class Unfolding:
    """Restores base weights from folded ones and their residue; takes the place of `loraio.merging.folds.Folding`.

    Args:
        adapter: the adapter that was folded in.
        residue: residue of the merge.
        inputs: opens the residue file.
    """

    def __init__(self, adapter: Adapter, residue: ResidueFile, inputs: Inputs) -> None:
        self.adapter = adapter
        self._residue = residue
        self._inputs = inputs
        self._read: dict[str, int] = {}

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        """Return the base's slice of a weight."""
        where = f"{name!r} of {self._residue.where}"
        return restored(part, weight, self._residue.strength, self._next(name, where), where=where)

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        """Collect nothing: the digest of the state dict proves the base."""
        return so_far

    def finish(self) -> None:
        """Raise FormatError if a residue has more blocks than its weight has slices."""
        for name in self.adapter.targets:
            if self._read.get(name) != stored(self._residue.header, name).size:
                raise FormatError(f"the residue of {name!r} is longer than it should be", where=f"{name!r}")

    def _next(self, name: str, where: str) -> bytes:
        place, done = stored(self._residue.header, name), self._read.get(name, 0)
        with self._inputs.open(place.path) as file:
            head = bytes(read_bytes(file, place.begin + done, min(LENGTH, place.size - done)).numpy().data)
            size = block_length(head, where=where)
            if done + size > place.size:
                raise FormatError("the residue is damaged: a block is longer than its tensor", where=where)
            block = bytes(read_bytes(file, place.begin + done, size).numpy().data)
        self._read[name] = done + size
        return block
