"""Parts of an output that are finished before all of them are, for a run that goes on where one was killed."""

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
from loraio.merging.folds import Fold
from loraio.merging.weight_check import FoldCheck

RECEIPT = "receipt.json"
"""In a working folder: which parts are finished, and of which merge."""


class FinishedShards:
    """The finished parts in a working folder; what else is in it, or belongs to another merge, is removed.

    A part is of use if it is still the file that was finished, and the base's part the file that it was made from.

    Args:
        folder: from `loraio.files.folders.working_folder`.
        identity: what must be the same for a part to be of use, as plain JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self._parts: dict[str, Any] = {}
        self.reused = 0
        for file in folder.iterdir():
            if file.is_symlink():  # nothing of ours; writing to it would write elsewhere
                file.unlink()
        with contextlib.suppress(LoraioError):
            found = read_json(folder / RECEIPT)
            if isinstance(found, dict) and found.get("of") == self._identity:
                self._parts = found["parts"]
        for file in folder.iterdir():
            if file.name not in (RECEIPT, *self._parts):
                file.unlink()

    def get(self, file: str, source: list[int]) -> dict[str, Written] | None:
        """What is in a finished part; None where there is none.

        Args:
            file: its name.
            source: `loraio.merging.checkpoint_writer.Inputs.signature` of the base's part.
        """
        part = self._parts.get(file)
        if part is None or part["source"] != source or part["file"] != _signature(self._folder / file):
            return None
        self.reused += 1
        return {name: _written(tensor) for name, tensor in part["tensors"].items()}

    def add(self, file: str, source: list[int], written: Mapping[str, Written]) -> None:
        """A part is finished."""
        self._parts[file] = {
            "source": source,
            "file": _signature(self._folder / file),
            "tensors": {name: _plain(tensor) for name, tensor in written.items()},
        }
        with staged(self._folder / RECEIPT, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": self._identity, "parts": self._parts}), encoding="utf-8")

    def forget(self) -> None:
        """All parts are about to get their names: nothing but they must be in the folder."""
        (self._folder / RECEIPT).unlink()


def _plain(tensor: Written) -> dict[str, Any]:
    fold = None
    if tensor.fold is not None:  # JSON has no word for the length of a weight that holds NaN
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
