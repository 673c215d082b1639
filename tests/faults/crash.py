"""Kill commands of loraio at random moments, and look at what they leave.

    python tests/faults/crash.py SIGNALS COUNT SEED [JOB ...]

`test_crash.py` runs this, since processes are forked best from one that has imported everything and computed nothing.
Each job is a command line that writes something, over an older output or nothing. SIGNALS, such as KILL or TERM,INT,
reach it at a random moment: half of the runs at any moment, the others while it writes. After that

- the output is the old or the new one, to the byte; of several files, the one may be missing without which nobody
  takes the others for a whole (the index of a sharded checkpoint, the configuration of PEFT);
- only hidden temporaries of documented names lie beside it, and after TERM and INT no temporary files at all;
- the same command, run again, ends well, writes the new output, and removes what was left;
- after TERM and INT the exit code is that of shells, and the last line on stderr says what happened.

It prints one JSON object: by job the number of runs for each outcome, and the problems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import mmap
import os
import pkgutil
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import loraio
from loraio import cli
from loraio.bases.identity import state_sha256
from loraio.files import tensorfile
from loraio.training.datasets import DATASETS

SHIPPED = Path(__file__).resolve().parents[2] / "adapters"

HIDDEN = re.compile(r"\..{1,40}\.\d+-[0-9a-f]{8}\.tmp|\..+\.merging", re.DOTALL)
"""Names of what a killed process may leave."""

WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}

CODE_OF_A_BUG = 99

MKDIR = os.mkdir

Contents = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Job:
    """A command line that writes ``out``, a file or a folder.

    Attributes:
        words: of the command, without what concerns the output.
        before: of the command that makes the old output.
        last: of an output of several files, the one that may be missing.
        resumes: whether it writes a side file that the next run goes on from.
    """

    words: tuple[Any, ...]
    before: tuple[Any, ...] | None = None
    out: str = "out"
    last: str | None = None
    resumes: bool = False


def jobs(inputs: Path) -> dict[str, Job]:
    """Return a job for each command, by name; those with an older output are for all signals."""
    base, large, sharded = inputs / "base.safetensors", inputs / "large.safetensors", inputs / "sharded"
    three, seven = inputs / "three.safetensors", inputs / "seven.safetensors"
    own, merged = inputs / "adapters/three.safetensors", inputs / "merged.safetensors"
    train = ("train", base, "--dataset", "few", "--steps", "3", "--digit", "3")
    index = "model.safetensors.index.json"

    def converted(dialect: str, *options: str, last: str | None = None) -> Job:
        words = ("--to", dialect, *options)
        return Job(("convert", three, *words), ("convert", seven, *words), last=last)

    def merging(path: Path, **more: str) -> Job:
        return Job(("merge", path, three), ("merge", path, three, "--strength", "0.5"), **more)

    return {
        "train": Job((*train, "--seed", "1"), (*train, "--seed", "2")),
        "train --checkpoint": Job((*train, "--checkpoint-every", "1"), (*train, "--seed", "2"), resumes=True),
        "convert --to native": converted("native"),
        "convert --to kohya": converted("kohya", "--model", "digit-cnn"),
        "convert --to peft": converted("peft", "--model", "digit-cnn", last="adapter_config.json"),
        "merge": merging(large, out="out.safetensors"),
        "merge, sharded": merging(sharded, last=index),
        "pretrain": Job(("pretrain", "--dataset", "few")),
        "train --digit all": Job(("train", base, "--dataset", "few", "--steps", "2", "--digit", "all"), last=""),
        "pack": Job(("pack", inputs / "adapters")),
        "unpack": Job(("unpack", inputs / "all.pack"), last=""),
        "export": Job(("export", base), out="out.pt2"),
        "targets": Job(("targets", base), out=""),
        "inspect": Job(("inspect", own), out=""),
        "check": Job(("check", inputs / "adapters"), out=""),
        "unmerge": Job(("unmerge", merged, "--base", base), out="out.safetensors"),
        "predict": Job(("predict", base, inputs / "image.png"), out=""),
        "evaluate": Job(("evaluate", base, "--adapter", own, "--dataset", "few"), out=""),
        "verify": Job(("verify", base, own, merged), out=""),
    }


def make_inputs(folder: Path) -> None:
    """Write a base, a larger one in one file and in shards, and two adapters that fit all of them."""
    from PIL import Image, ImageDraw

    state = dict(loraio.read_base(SHIPPED / "base.safetensors").state)
    generator = torch.Generator().manual_seed(0)
    large = {**state, **{f"more.{n}": torch.randn(1 << 20, generator=generator) for n in range(2)}}
    shutil.copy(SHIPPED / "base.safetensors", folder / "base.safetensors")
    tensorfile.write(large, folder / "large.safetensors", metadata={})
    (folder / "sharded").mkdir()
    shards = {f"model-{n + 1}-of-3.safetensors": list(large)[n::3] for n in range(3)}
    for file, names in shards.items():
        tensorfile.write({name: large[name] for name in names}, folder / "sharded" / file, metadata={})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapters").mkdir()
    digests = {"": state_sha256(large), "adapters/": state_sha256(state)}
    for name, file in {"three": "digit-3", "seven": "digit-7"}.items():
        adapter = loraio.load(SHIPPED / f"{file}.safetensors")
        for start, digest in digests.items():
            fits = dataclasses.replace(adapter, base=dataclasses.replace(adapter.base, sha256=digest))
            loraio.save(fits, folder / f"{start}{name}.safetensors")
    loraio.pack([folder / "adapters"], folder / "all.pack")
    loraio.merge_file(folder / "base.safetensors", folder / "adapters/three.safetensors", folder / "merged.safetensors")
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).line((14, 4, 14, 24), fill=255, width=3)
    image.save(folder / "image.png")


class Run:
    """A command line in a forked process, with the moments of its first write and its end; 0 before them."""

    def __init__(self, words: Iterable[Any], folder: Path) -> None:
        self._times = mmap.mmap(-1, 16)
        self._report, self._imported = folder.parent / "report", folder.parent / "imported"
        self.started = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            self._child([str(word) for word in words], folder)

    def _child(self, words: list[str], folder: Path) -> None:
        code = CODE_OF_A_BUG
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            descriptor = os.open(self._report, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.open, os.mkdir = self._noting(os.open), self._noting(os.mkdir)  # type: ignore[assignment]
            sys.argv = ["loraio", *words]
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else CODE_OF_A_BUG
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            self._note(1)
            self._imported.write_text("\n".join(sys.modules))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *rest: Any, **options: Any) -> Any:
            if not self.writes and (function is MKDIR or rest[0] & os.O_CREAT):
                self._note(0)
            return function(path, *rest, **options)

        return noted

    def _note(self, place: int) -> None:
        struct.pack_into("d", self._times, 8 * place, time.monotonic())

    @property
    def writes(self) -> float:
        return float(struct.unpack_from("d", self._times, 0)[0])

    @property
    def ended(self) -> float:
        return float(struct.unpack_from("d", self._times, 8)[0])

    def wait(self) -> tuple[int, str]:
        """Return its exit code, negative for a signal, and what it printed."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self._report.read_text(errors="replace")


class Trial:
    """One job, killed again and again in its folder."""

    def __init__(self, job: Job, folder: Path, numbers: list[int]) -> None:
        self._job, self._folder, self._numbers = job, folder, numbers
        self.counts: Counter[str] = Counter()
        self._old: Contents = {}
        self._complete(job.words, clear=True)
        import_as(folder.parent / "imported")
        if job.before is not None:
            self._complete(job.before, clear=True)
            self._old = self._outputs()
        run = self._complete(job.words, clear=True)
        self._span, self._writing = run.ended - run.started, run.ended - (run.writes or run.started)
        self._new = self._outputs()

    def _line(self, words: tuple[Any, ...], *options: str) -> tuple[Any, ...]:
        if not self._job.out:
            return words
        side = ("--checkpoint", "run.pt") if self._job.resumes else ()
        return (*words, "-o", self._job.out, *side, *options)

    def _outputs(self) -> Contents:
        names = {path: path.relative_to(self._folder) for path in sorted(self._folder.rglob("*")) if path.is_file()}
        seen = {path: name for path, name in names.items() if not any(part.startswith(".") for part in name.parts)}
        return {str(name): path.read_bytes() for path, name in seen.items() if str(name) != "run.pt"}

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()

    def _complete(self, words: tuple[Any, ...], *options: str, clear: bool = False) -> Run:
        if clear:
            self._clear()
        run = Run(self._line(words, *options), self._folder)
        code, printed = run.wait()
        assert code == 0, f"{words} ended with {code}: {printed}"
        return run

    def once(self, chance: random.Random) -> None:
        """Kill it once, and look.

        Raises:
            AssertionError: something is not as it must be.
        """
        self._clear()
        old = self._old if chance.random() < 0.5 else {}
        for name, data in old.items():
            (self._folder / name).parent.mkdir(exist_ok=True)
            (self._folder / name).write_bytes(data)
        run = Run(self._line(self._job.words, *(["--force"] if old else [])), self._folder)
        span = self._span
        if self._job.out and chance.random() < 0.5:
            span = self._writing
            while not (run.writes or run.ended):
                time.sleep(20e-6)
        time.sleep(chance.uniform(0, 1.1 * span))
        for number in self._numbers:
            os.kill(run.pid, number)
            time.sleep(chance.uniform(0, 0.005) if len(self._numbers) > 1 else 0)
        code, printed = run.wait()
        self.counts["during"] += bool(run.writes and (code or not run.ended))
        self._check_end(code, printed)
        self._check_files(old, code)
        if self._job.out:
            again = ["--resume"] if self._job.resumes and (self._folder / "run.pt").exists() else []
            self._complete(self._job.words, "--force", *again)
            assert self._outputs() == self._new, "the next run gives something else"
            assert not list(self._folder.rglob(".*")), "the next run leaves what was left"

    def _check_end(self, code: int, printed: str) -> None:
        # Before and after the command line runs the system ends the process; that is the same to a shell.
        ends = [end for number in self._numbers for end in (-number, 128 + number)]
        assert code in (0, *ends), (code, printed)
        assert "Traceback" not in printed, printed
        if code > 0:
            assert printed.splitlines()[-1] == WORDS[signal.Signals(code - 128)], printed

    def _check_files(self, old: Contents, code: int) -> None:
        found, last = self._outputs(), self._job.last
        if found == self._new:
            self.counts["new"] += 1
        elif found == old:
            self.counts["old"] += 1
        else:
            assert last is not None, f"neither old nor new: {sorted(found)}"
            ours = [name for name in found if last and name.endswith(last)]
            assert not ours, f"{last} is there, and the whole is neither old nor new: {sorted(found)}"
            for name, data in found.items():
                assert data in (old.get(name), self._new.get(name)), f"{name} is neither old nor new"
            self.counts["unfinished"] += 1
        hidden = [path.name for path in self._folder.rglob(".*") if not path.parent.name.startswith(".")]
        assert all(HIDDEN.fullmatch(name) for name in hidden), f"{hidden} were left"
        if self._numbers[0] != signal.SIGKILL and code >= 0:
            assert not list(self._folder.rglob(".*.tmp")), f"{hidden} were left"


def import_as(names: Path) -> None:
    """Import what a process imported, so that those that are forked later need not."""
    for name in names.read_text().splitlines():
        if name not in sys.modules and name.startswith(("torch.", "sklearn.", "rich.", "numpy.", "loraio.")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def warm_up() -> None:
    """Import loraio, and have its data at hand. No gradients here: torch forbids them after a fork."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(loraio.__path__, "loraio."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    digits = loraio.load_dataset("digits")
    rows = [row for n in range(10) for row in (digits.labels == n).nonzero().flatten()[:4].tolist()]
    few = (digits.images[rows], digits.labels[rows], digits.class_names)
    DATASETS["few"] = lambda split, root: few
    gc.collect()
    gc.freeze()  # pages that no collection writes to need not be copied after a fork


def main() -> None:
    """Run the jobs that are named, or all that write over an older output; with TERM all there are."""
    numbers = [int(signal.Signals[f"SIG{name}"]) for name in sys.argv[1].split(",")]
    count, chance, names = int(sys.argv[2]), random.Random(sys.argv[3]), sys.argv[4:]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also in a job in the background of a shell, which ignores it
    warm_up()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        inputs.mkdir()
        make_inputs(inputs)
        for name, job in jobs(inputs).items():
            if name in names or (not names and (job.before or signal.SIGTERM in numbers)):
                trial, problems = Trial(job, Path(folder, "run"), numbers), []
                for number in range(count):
                    try:
                        trial.once(chance)
                    except AssertionError as problem:
                        problems.append(f"run {number}: {problem}")
                results[name] = {**trial.counts, "problems": problems}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
