"""Resume a run from a side file after a kill, and end in the same bytes.

The side file alone holds the states of optimizer and random generators, and the best factors so far. When the run has
ended, it may be removed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraio.errors import BaseMismatchError, ConfigError, DataError, FormatError, LoraioError
from loraio.files.atomic import staged
from loraio.files.pickles import load_weights_only
from loraio.files.tensors import tensor_sha256
from loraio.training.config import TrainConfig
from loraio.training.datasets import Dataset
from loraio.training.optimizing import Moment, Optimization
from loraio.training.validation import Validation

VERSION = 1
"""Version of the side file."""

FREE_SETTINGS = ("device", "compile")
"""Settings that a resumed run may change; the last bits of its result then differ."""


def run_identity(config: TrainConfig, dataset: Dataset, *, steps: int, base_sha256: str) -> dict[str, Any]:
    """Return the plain values that must be the same when a run is resumed.

    Args:
        config: all of its settings count, but `FREE_SETTINGS`.
        dataset: its name, split and the digests of images and labels count.
        steps: number of planned steps, for configurations that leave it open.
        base_sha256: digest of the base model's state dict.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    data = {
        "name": dataset.name,
        "split": dataset.split,
        "images": tensor_sha256(dataset.images),
        "labels": tensor_sha256(dataset.labels),
    }
    return {"base": base_sha256, "data": data, "settings": {**settings, "steps": steps}}


class SideFile:
    """An observer that writes the state of the run every ``every`` steps and at its end.

    Args:
        path: the file; each write replaces it as a whole.
        every: steps between two writes.
        identity: as from `run_identity`.
        validation: its state is stored too.
    """

    def __init__(self, path: Path, *, every: int, identity: Mapping[str, Any], validation: Validation | None) -> None:
        self.path = path
        self._every = every
        self._identity = dict(identity)
        self._validation = validation

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Write if this step is due.

        Raises:
            OutputError: the system refused to write.
        """
        ended = moment.last or (self._validation is not None and self._validation.stopped is not None)
        if moment.step % self._every == 0 or ended:
            state: dict[str, Any] = {"loraio_run": VERSION, "identity": self._identity, "run": run.state_dict()}
            if self._validation is not None:
                state["validation"] = self._validation.state_dict()
            buffer = io.BytesIO()  # torch reports a file that cannot be written in many ways
            torch.save(state, buffer)
            with staged(self.path, overwrite=True) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        return False

    def load(self, run: Optimization) -> None:
        """Load the state of the run and of its validation.

        Raises:
            MissingFileError: there is no such file.
            FormatError: it is no side file, or not one of this version.
            ConfigError, DataError, BaseMismatchError: it belongs to a run with other settings, data or base.
        """
        state = _read(self.path)
        self._check(state["identity"])
        try:
            run.load_state_dict(state["run"])
            if self._validation is not None:
                self._validation.load_state_dict(state["validation"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FormatError(f"the state of the run is incomplete: {error}", where=f"{str(self.path)!r}") from error

    def _check(self, found: Any) -> None:
        where, own = f"{str(self.path)!r}", self._identity
        if not isinstance(found, dict) or found.keys() != own.keys() or not isinstance(found["settings"], dict):
            raise FormatError("it does not say to which run it belongs", where=where)
        wrong: list[tuple[type[LoraioError], str, list[str]]] = []
        settings = [
            f"{name} is {own['settings'].get(name)!r}, there it was {found['settings'].get(name)!r}"
            for name in {**own["settings"], **found["settings"]}
            if own["settings"].get(name) != found["settings"].get(name)
        ]
        if settings:
            wrong.append((ConfigError, "settings", settings))
        if found["data"] != own["data"]:
            mine, other = (f"{data['name']!r}, {data['split']}" for data in (own["data"], found["data"]))
            detail = "other images or labels" if mine == other else f"{mine}; there it was {other}"
            wrong.append((DataError, "data", [f"the data set is {detail}"]))
        if found["base"] != own["base"]:
            digests = f"{own['base'][:12]}.., there it was {str(found['base'])[:12]}.."
            wrong.append((BaseMismatchError, "base", [f"the base model's digest is {digests}"]))
        if wrong:
            what = " and ".join(name for _, name, _ in wrong)
            raise wrong[0][0](
                f"the side file belongs to a run with other {what}",
                problems=[line for _, _, lines in wrong for line in lines],
                where=where,
                hint="use the options of that run, or another --checkpoint without --resume",
            )


def _read(path: Path) -> dict[str, Any]:
    state, where = load_weights_only(path, what="not a side file of a training run"), f"{str(path)!r}"
    if not isinstance(state, dict) or "loraio_run" not in state:
        raise FormatError("not a side file of a training run", where=where, hint="--checkpoint FILE writes one")
    if state["loraio_run"] != VERSION or not {"identity", "run"} <= state.keys():
        raise FormatError(f"a side file of version {state['loraio_run']!r}, this loraio reads {VERSION}", where=where)
    return state
