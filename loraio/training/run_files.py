"""Files that a run writes beside its adapter: a metrics log, TensorBoard events, a side file to resume from."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from loraio.errors import ConfigError, MissingFileError, OutputError
from loraio.files.atomic import check_output, staged
from loraio.training.config import check_at_least
from loraio.training.optimizing import Moment, Optimization
from loraio.training.validation import Validation

COLUMNS = ("step", "loss", "lr", "val_loss", "val_accuracy")
"""Columns of the metrics log: step, from 1; its loss in nats; its learning rate; and after a validation its loss in
nats and its accuracy, 0 to 1."""

LOG_SUFFIXES = (".csv", ".jsonl")
"""File name suffixes, which decide the format of the metrics log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Files that a run writes while it trains. The adapter works without them.

    Attributes:
        log: metrics of every step, as .csv or .jsonl.
        tensorboard: folder for TensorBoard's event files.
        checkpoint: side file to resume from.
        checkpoint_every: steps between two writes of the side file.
        resume: continue from the side file, and continue the log.
        overwrite: replace an existing log or side file.

    Raises:
        ConfigError: a value is out of range, or there is nothing to resume from.
    """

    log: str | os.PathLike[str] | None = None
    tensorboard: str | os.PathLike[str] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 200
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, checkpoint_every=self.checkpoint_every)
        if self.log is not None and Path(self.log).suffix.lower() not in LOG_SUFFIXES:
            raise ConfigError(f"the log is {str(self.log)!r}, it must end in {' or '.join(LOG_SUFFIXES)}")
        if self.resume and self.checkpoint is None:
            raise ConfigError("there is nothing to resume from", hint="--checkpoint FILE together with --resume")

    def check(self, *, inputs: tuple[str | os.PathLike[str], ...] = ()) -> None:
        """Refuse files that the run could not read or write, before it starts.

        Raises:
            OutputExistsError, OutputError: as for `loraio.files.atomic.check_output`.
            MissingFileError: there is no side file to resume from.
            ConfigError: TensorBoard is not installed, or log and side file are the same file.
        """
        paths = [path for path in (self.log, self.checkpoint) if path is not None]
        if len({os.path.realpath(path) for path in paths}) < len(paths):
            raise ConfigError(f"the log and the side file are the same file, {str(self.log)!r}")
        for path in paths:
            check_output(path, overwrite=self.overwrite or self.resume, inputs=inputs)
        if self.resume and not Path(self.checkpoint or "").is_file():
            raise MissingFileError(
                f"{str(self.checkpoint)!r} does not exist", hint="without --resume the run starts anew"
            )
        if self.tensorboard is not None:
            _writer_class()

    def of(self, part: str) -> RunFiles:
        """Return the files of one of several runs: for "digit-3", ``log.csv`` becomes ``log-digit-3.csv``.

        A run without a side file starts anew.

        >>> RunFiles(log="log.csv").of("digit-3").log.name
        'log-digit-3.csv'
        """
        named = {
            name: Path(path).with_name(f"{Path(path).stem}-{part}{Path(path).suffix}")
            for name, path in (("log", self.log), ("checkpoint", self.checkpoint))
            if path is not None
        }
        folder = Path(self.tensorboard) / part if self.tensorboard is not None else None
        resume = self.resume and named["checkpoint"].is_file()
        overwrite = self.overwrite or self.resume
        return replace(self, **named, tensorboard=folder, resume=resume, overwrite=overwrite)  # type: ignore[arg-type]


class MetricsLog:
    """An observer that writes one line after every step, at once, so that a killed run keeps its log.

    Args:
        path: ends in .csv or .jsonl.
        validation: source of the validation figures.
        done: steps of a resumed run; the file's lines up to there are kept.
    """

    def __init__(self, path: Path, *, validation: Validation | None, done: int) -> None:
        self._path = path
        self._validation = validation
        self._as_csv = path.suffix.lower() == ".csv"
        kept = _lines_until(path, done) if done else []
        start = ",".join(COLUMNS) + "\n" if self._as_csv else ""
        with staged(path, overwrite=True) as temporary:  # a kill here must not lose the lines that are kept
            temporary.write_text(start + "".join(kept), encoding="utf-8", newline="")
        with _writing(path):
            self._file: TextIO = path.open("a", encoding="utf-8", newline="")

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Write a line.

        Raises:
            OutputError: the system refused to write.
        """
        figures = _figures(moment, self._validation)
        values = [moment.step, *(n if n is None or math.isfinite(n) else None for n in figures)]
        with _writing(self._path):
            if self._as_csv:
                csv.writer(self._file, lineterminator="\n").writerow(
                    ["" if value is None else value for value in values]
                )
            else:
                self._file.write(json.dumps(dict(zip(COLUMNS, values, strict=True))) + "\n")
            self._file.flush()
        return False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """An observer that writes TensorBoard events: loss, learning rate, validation loss and accuracy."""

    def __init__(self, folder: Path, *, validation: Validation | None, done: int) -> None:
        self._validation = validation
        with _writing(folder):
            self._writer = _writer_class()(log_dir=str(folder), purge_step=done + 1)

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Write the figures of the step."""
        for name, value in zip(COLUMNS[1:], _figures(moment, self._validation), strict=True):
            if value is not None:
                self._writer.add_scalar(name, value, moment.step)
        return False

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _figures(moment: Moment, validation: Validation | None) -> tuple[float | None, ...]:
    latest = (validation and validation.latest) or (None, None)
    return (float(moment.loss), moment.lr, *latest)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard cannot be imported: {error}",
            hint="pip install tensorboard, or use --log FILE.csv, which needs no package",
        ) from error
    return SummaryWriter


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the complete lines of a log up to that step, without its header."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for line in lines:
        text = line.removeprefix('{"step": ').split(",")[0].strip()
        if line.endswith("\n") and text.isdecimal() and int(text) <= step:
            kept.append(line)
    return kept


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
