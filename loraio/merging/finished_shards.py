"""Keep the finished shards of a merge, so that a later run can go on from them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraio.errors import LoraioError
from loraio.files.atomic import staged
from loraio.files.copying import signature_of
from loraio.files.strictjson import read_json
from loraio.merging.checkpoint_writer import Written
from loraio.merging.effect import Fold
from loraio.merging.weight_check import FoldCheck

RECEIPT = "receipt.json"
"""File in a working folder that lists the finished shards, and names their merge."""


class FinishedShards:
    """The finished shards in a working folder; anything else in the folder is removed.

    A shard is used if ``identity``, plain JSON values, is that of its merge, and neither its file nor the base's shard
    has changed since.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self._shards: dict[str, Any] = {}
        self.reused = 0
        for file in folder.iterdir():
            if file.is_symlink():  # not ours: writing to it would write elsewhere
                file.unlink()
        with contextlib.suppress(LoraioError):
            found = read_json(folder / RECEIPT)
            if isinstance(found, dict) and found.get("of") == self._identity:
                self._shards = found["parts"]
        for file in folder.iterdir():
            if file.name not in (RECEIPT, *self._shards):
                file.unlink()

    def get(self, file: str, source: list[int]) -> dict[str, Written] | None:
        """Return the tensors of a finished shard, or None; ``source`` is the signature of the base's shard."""
        shard = self._shards.get(file)
        if shard is None or shard["source"] != source or shard["file"] != _signature(self._folder / file):
            return None
        self.reused += 1
        return {name: _written(tensor) for name, tensor in shard["tensors"].items()}

    def add(self, file: str, source: list[int], written: Mapping[str, Written]) -> None:
        """Record a finished shard."""
        self._shards[file] = {
            "source": source,
            "file": _signature(self._folder / file),
            "tensors": {name: _plain(tensor) for name, tensor in written.items()},
        }
        with staged(self._folder / RECEIPT, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": self._identity, "parts": self._shards}), encoding="utf-8")

    def forget(self) -> None:
        """Remove the list, so that nothing but the shards is in the folder."""
        (self._folder / RECEIPT).unlink()


def _plain(tensor: Written) -> dict[str, Any]:
    fold = None
    if tensor.fold is not None:  # JSON cannot hold NaN
        lengths = {"length": tensor.fold.length.hex(), "moved": tensor.fold.moved.hex()}
        fold = {"check": asdict(tensor.fold.check), **lengths}
    return {"sha256": tensor.sha256, "source_sha256": tensor.source_sha256, "fold": fold}


def _written(tensor: Mapping[str, Any]) -> Written:
    fold = tensor["fold"]
    if fold is not None:
        length, moved = (float.fromhex(fold[name]) for name in ("length", "moved"))
        fold = Fold(check=FoldCheck(**fold["check"]), length=length, moved=moved)
    return Written(sha256=tensor["sha256"], source_sha256=tensor["source_sha256"], fold=fold)


def _signature(path: Path) -> list[int] | None:
    try:
        return list(signature_of(path.stat()))
    except FileNotFoundError:
        return None
