"""Write the residue of a merge while the merge goes on.

Any program must be able to load a merged checkpoint, so the residue is a safetensors file of its own. It holds a tensor
of bytes for each target, and the originals of the tensors that the adapter replaced whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.errors import VerificationError
from loraio.files import tensorfile
from loraio.files.atomic import staged
from loraio.files.copying import Inputs, write_all
from loraio.files.integrity import PENDING
from loraio.files.temporaries import owned_file
from loraio.files.tensors import tensor_bytes
from loraio.merging.checkpoint_writer import copy_tensor
from loraio.merging.plans import Plans, facts_sha256, read_bytes
from loraio.merging.residue_files import FORMAT_VERSION, KEY, residue_beside
from loraio.merging.residues import residue_of, restored


@dataclass(frozen=True, slots=True, kw_only=True)
class Residue:
    """Size of a residue.

    Attributes:
        path: the file.
        bytes: length of the file.
        weights: number of values in the folded weights.
        coded: bytes of their residue; the rest are originals of whole tensors, and the header.
        share: ``bytes`` divided by the bytes of the base's tensors.
    """

    path: Path
    bytes: int
    weights: int
    coded: int
    share: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of residue for each value of the folded weights."""
        return 8 * self.coded / self.weights


@contextlib.contextmanager
def residue_writer(
    output: Path, strength: float, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str]]
) -> Iterator[ResidueWriter]:
    """Open a residue beside the output of a merge; it gets its name when the block ends well.

    The checkpoint must get its name inside the block. Then a new checkpoint may lack its residue, while its base is at
    hand; but an old checkpoint never loses its residue to the new one's.
    """
    path = residue_beside(output)
    with (
        staged(path, overwrite=overwrite, inputs=inputs) as temporary,
        owned_file(path) as spool,
        FileIO(spool, "r+") as blocks,
    ):
        yield ResidueWriter(path, temporary, blocks, strength)


class ResidueWriter:
    """Takes the blocks of a merge from several threads, and makes a file of them.

    Blocks wait in a spool file until their number is known.

    Attributes:
        path: the residue's final name.
        sha256: digest of its tensors, as of a state dict; `PENDING` until `write`.

    Args:
        path: the residue's final name.
        temporary: the file to write.
        spool: file for the waiting blocks.
        strength: strength of the merge.
    """

    def __init__(self, path: Path, temporary: Path, spool: FileIO, strength: float) -> None:
        self.path = path
        self.sha256 = PENDING
        self._temporary = temporary
        self._spool = spool
        self._strength = strength
        self._lock = threading.Lock()
        self._end = 0
        self._blocks: dict[str, list[tuple[int, int]]] = {}
        self._file_bytes = 0

    def keep(self, name: str, part: Adapter, base: Tensor, folded: Tensor) -> None:
        """Take a slice of a weight; it is restored at once, and compared.

        Raises:
            VerificationError: it would not be restored.
        """
        block = residue_of(part, base, folded, self._strength)
        back = restored(part, folded, self._strength, block, where=f"{name!r}")
        if not tensor_bytes(back).equal(tensor_bytes(base)):
            raise VerificationError(f"{name!r} cannot be restored from its residue; nothing was written")
        with self._lock:
            self._spool.seek(self._end)
            write_all(self._spool, memoryview(block))
            self._blocks.setdefault(name, []).append((self._end, len(block)))
            self._end += len(block)

    def write(self, originals: Plans, document: Mapping[str, Any], *, inputs: Inputs) -> None:
        """Write the file and read it back.

        Args:
            originals: plans of the tensors that were replaced whole.
            document: what the file says of the merge.
            inputs: the files that hold the originals.

        Raises:
            VerificationError: it reads back wrong.
        """
        where = f"{str(self.path)!r}"
        sizes = {name: sum(size for _, size in blocks) for name, blocks in self._blocks.items()}
        facts: dict[str, tuple[str, tuple[int, ...]]] = {name: ("U8", (size,)) for name, size in sizes.items()}
        facts |= {name: (plan.dtype, plan.shape) for name, plan in originals.items()}  # not what replaces them
        whole = {"format_version": FORMAT_VERSION, KEY: dict(document)}
        metadata = partial(tensorfile.metadata_of, whole, facts, where=where)
        start, placed = tensorfile.layout(facts, metadata(lambda _: PENDING), where=where)
        found: dict[str, str] = {}
        with FileIO(self._temporary, "r+") as file:
            file.truncate(0)
            for name, info in placed.items():
                if name in originals:
                    found[name] = copy_tensor(originals[name], file, len(start) + info.begin, inputs)
                else:
                    found[name] = self._put(name, file, len(start) + info.begin)
            self._file_bytes = file.seek(0, os.SEEK_END)
            start, _ = tensorfile.layout(facts, metadata(found.__getitem__), where=where)
            file.seek(0)
            write_all(file, memoryview(start))
        if tensorfile.read_header(self._temporary).tensors != placed:
            raise VerificationError("the header reads back wrong; nothing was written", where=where)
        self.sha256 = facts_sha256(facts, found)

    def size(self, *, weights: int, base_bytes: int) -> Residue:
        """Return the size of the written file."""
        size = self._file_bytes
        return Residue(path=self.path, bytes=size, weights=weights, coded=self._end, share=size / base_bytes)

    def _put(self, name: str, file: FileIO, place: int) -> str:
        """Write the blocks of a weight, and return their digest as read back."""
        wanted, found, position = hashlib.sha256(), hashlib.sha256(), place
        for begin, size in self._blocks[name]:
            self._spool.seek(begin)
            block = self._spool.read(size)
            wanted.update(block)
            file.seek(position)
            write_all(file, memoryview(block))
            found.update(read_bytes(file, position, size).numpy().data)
            position += size
        if found.digest() != wanted.digest():
            raise VerificationError(f"the residue of {name!r} reads back wrong; nothing was written")
        return found.hexdigest()
