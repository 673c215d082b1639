#!/usr/bin/env python
"""Kill commands of loraio at random moments, and look at what they leave.

usage: scripts/crash [--count 300] [--signal KILL|TERM|INT] [--twice] [--only NAME] [--json] ..

Each job is a command line that writes something: in the place of an older output, or of nothing. It runs in a process
that is forked from this one, which has imported everything, and is killed at a random moment: of half of the runs at
any moment of the run, of the others in the time in which it writes. After that

- the output is the old one or the new one, to the byte; of several files that belong together the one may be missing
  without which nobody takes the others for a whole (the index of a parted checkpoint, the configuration of PEFT);
- what else lies there are hidden temporaries of documented names, and after TERM and INT no temporary files at all;
- the same command, run again, ends well, with the bytes of the new output, and removes what was left.

After TERM and INT, with others behind them or not, the exit code must be that of shells, and the last line on stderr
say what happened. Exit code 0 when all of that held.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import loraio
from loraio import cli
from loraio.files import tensorfile
from loraio.bases.identity import state_sha256
from loraio.training.datasets import DATASETS

SHIPPED = Path(__file__).resolve().parent.parent / "adapters"

HIDDEN = re.compile(r"\..{1,40}\.\d+-[0-9a-f]{8}\.tmp|\..+\.merging", re.DOTALL)
"""Names of what a killed process may leave."""

WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}

CODE_OF_A_BUG = 99

Contents = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Job:
    """A command line; its output is ``out``, a file or a folder, in the folder of the run.

    Attributes:
        words: of the command, without what concerns the output.
        before: of the command that makes the old output.
        last: of an output of several files, the one that may be missing.
        resumes: whether it writes a side file that the next run goes on from.
    """

    words: tuple[str, ...]
    before: tuple[str, ...] | None = None
    out: str = "out"
    last: str | None = None
    resumes: bool = False


def jobs(inputs: Path) -> dict[str, Job]:
    """Those that write, by name."""
    base, large, parted = inputs / "base.safetensors", inputs / "large.safetensors", inputs / "parted"
    three, seven = inputs / "three.safetensors", inputs / "seven.safetensors"
    train = ("train", base, "--dataset", "few", "--steps", "3", "--digit", "3")
    peft = ("--to", "peft", "--model", "digit-cnn")
    kohya = ("--to", "kohya", "--model", "digit-cnn")
    rows = {
        "train": Job((*train, "--seed", "1"), (*train, "--seed", "2")),
        "train --checkpoint": Job((*train, "--checkpoint-every", "1"), (*train, "--seed", "2"), resumes=True),
        "convert --to native": Job(("convert", three, "--to", "native"), ("convert", seven, "--to", "native")),
        "convert --to kohya": Job(("convert", three, *kohya), ("convert", seven, *kohya)),
        "convert --to peft": Job(("convert", three, *peft), ("convert", seven, *peft), last="adapter_config.json"),
        "merge": Job(("merge", large, three), ("merge", large, three, "--strength", "0.5"), out="out.safetensors"),
        "merge, parted": Job(
            ("merge", parted, three),
            ("merge", parted, three, "--strength", "0.5"),
            last="model.safetensors.index.json",
        ),
    }
    return {name: _plain(job) for name, job in rows.items()}


def further_jobs(inputs: Path) -> dict[str, Job]:
    """Other commands, for the signals that a program can obey."""
    base, three = inputs / "base.safetensors", inputs / "adapters/three.safetensors"
    rows = {
        "pretrain": Job(("pretrain", "--dataset", "few")),
        "train --digit all": Job(("train", base, "--dataset", "few", "--steps", "2", "--digit", "all"), last=""),
        "pack": Job(("pack", inputs / "adapters")),
        "unpack": Job(("unpack", inputs / "all.pack"), last=""),
        "export": Job(("export", base), out="out.pt2"),
        "targets": Job(("targets", base), out=""),
        "inspect": Job(("inspect", three), out=""),
        "check": Job(("check", inputs / "adapters"), out=""),
        "unmerge": Job(("unmerge", inputs / "merged.safetensors", "--base", base), out="out.safetensors"),
        "predict": Job(("predict", base, inputs / "image.png"), out=""),
        "evaluate": Job(("evaluate", base, "--adapter", three, "--dataset", "few"), out=""),
        "verify": Job(("verify", base, three, inputs / "merged.safetensors"), out=""),
    }
    return {name: _plain(job) for name, job in rows.items()}


def _plain(job: Job) -> Job:
    before = None if job.before is None else tuple(map(str, job.before))
    return dataclasses.replace(job, words=tuple(map(str, job.words)), before=before)


def make_inputs(folder: Path) -> None:
    """A base, a larger one in one file and in two, and two adapters that fit all of them."""
    from PIL import Image, ImageDraw

    state = dict(loraio.read_base(SHIPPED / "base.safetensors").state)
    generator = torch.Generator().manual_seed(0)
    big = {**state, **{f"more.{n}": torch.randn(1 << 20, generator=generator) for n in range(2)}}
    shutil.copy(SHIPPED / "base.safetensors", folder / "base.safetensors")
    tensorfile.write(big, folder / "large.safetensors", metadata={})
    (folder / "parted").mkdir()
    parts = {f"model-{n + 1}-of-3.safetensors": list(big)[n::3] for n in range(3)}
    for file, names in parts.items():
        tensorfile.write({name: big[name] for name in names}, folder / "parted" / file, metadata={})
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "parted/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapters").mkdir()
    digests = {"": state_sha256(big), "adapters/": state_sha256(state)}
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
    """A command line in a forked process, and how far it is."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self._times = mmap.mmap(-1, 24)
        self._report = folder.parent / "report"
        self._report.write_bytes(b"")
        self._imported = folder.parent / "imported"
        self.started = time.monotonic()
        self._pid = os.fork()
        if not self._pid:
            self._child(words, folder)

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
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else CODE_OF_A_BUG
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            self._note(2)
            self._imported.write_text("\n".join(sys.modules))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _noting(self, function: Callable[..., int]) -> Callable[..., int]:
        def noted(path: str, flags: int = os.O_CREAT, *rest: int, **options: int) -> int:
            if flags & os.O_CREAT and not self.writes:
                self._note(1)
            return function(path, flags, *rest, **options) if function is not MKDIR else function(path, *rest)

        return noted

    def _note(self, place: int) -> None:
        struct.pack_into("d", self._times, 8 * place, time.monotonic())

    @property
    def writes(self) -> float:
        """When it began to write; 0 before that."""
        return float(struct.unpack_from("d", self._times, 8)[0])

    @property
    def ended(self) -> float:
        """When it ended; 0 before that."""
        return float(struct.unpack_from("d", self._times, 16)[0])

    @property
    def phase(self) -> str:
        """Where it is, or was when it was killed."""
        return "after" if self.ended else "during" if self.writes else "before"

    def kill(self, *numbers: int) -> None:
        """Send signals, a few milliseconds apart."""
        for number in numbers:
            os.kill(self._pid, number)
            if len(numbers) > 1:
                time.sleep(random.uniform(0, 0.005))

    def wait(self) -> tuple[int, str]:
        """Its exit code, negative for a signal, and what it printed."""
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status), self._report.read_text(errors="replace")


MKDIR = os.mkdir


def contents(folder: Path) -> Contents:
    """The files below a folder, but for hidden ones."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            found[name] = path.read_bytes()
    return found


class Trial:
    """One job, killed again and again."""

    def __init__(self, name: str, job: Job, folder: Path, numbers: list[int], count: int) -> None:
        self.name, self._job, self._folder, self._numbers = name, job, folder, numbers
        self.counts = dict.fromkeys(("before", "during", "after", "old", "new", "unfinished", "left", "kept"), 0)
        self._old: Contents = {}
        self._clear()
        self._complete([*job.words, *self._output(force=False)])
        import_as(folder.parent / "imported")
        self._clear()
        if job.before is not None:
            self._complete([*job.before, *self._output(force=False)])
            self._old = self._outputs()
        spans = []
        for _ in range(3 if count > 20 else 1):
            self._clear()
            started, writes, ended = self._complete([*job.words, *self._output(force=False)])
            spans.append((ended - started, ended - (writes or started)))
        self._span, self._writing = (sorted(values)[len(values) // 2] for values in zip(*spans, strict=True))
        self._new = self._outputs()

    def _output(self, *, force: bool) -> list[str]:
        if not self._job.out:
            return []
        side = ["--checkpoint", "run.pt"] if self._job.resumes else []
        return ["-o", self._job.out, *side, *(["--force"] if force else [])]

    def _outputs(self) -> Contents:
        return {name: data for name, data in contents(self._folder).items() if name != "run.pt"}

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()

    def _complete(self, words: list[str]) -> tuple[float, float, float]:
        run = Run(words, self._folder)
        code, printed = run.wait()
        assert code == 0, f"{words} ended with {code}: {printed}"
        return run.started, run.writes, run.ended

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
        run = Run([*self._job.words, *self._output(force=bool(old))], self._folder)
        if chance.random() < 0.5 and self._job.out:
            while not (run.writes or run.ended):
                time.sleep(20e-6)
            time.sleep(chance.uniform(0, 1.1 * self._writing))
        else:
            time.sleep(chance.uniform(0, 1.1 * self._span))
        phase = run.phase
        run.kill(*self._numbers)
        code, printed = run.wait()
        self.counts[run.phase if self._numbers[0] == signal.SIGKILL else phase] += 1
        self._check_end(code, printed)
        self._check_files(old, code)
        if self._job.out:
            again = ["--resume"] if self._job.resumes and (self._folder / "run.pt").exists() else []
            self._complete([*self._job.words, *self._output(force=True), *again])
            assert self._outputs() == self._new, "the next run gives something else"
            assert not list(self._folder.rglob(".*")), "the next run leaves what was left"

    def _check_end(self, code: int, printed: str) -> None:
        numbers = self._numbers
        if numbers[0] == signal.SIGKILL:
            assert code in (0, -signal.SIGKILL), (code, printed)
            return
        # Before and after the command line runs the system ends the process; that is the same to a shell.
        assert code in (0, *(128 + number for number in numbers), *(-number for number in numbers)), (code, printed)
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
        hidden = [path for path in self._folder.rglob(".*") if not path.parent.name.startswith(".")]
        for path in hidden:
            assert HIDDEN.fullmatch(path.name), f"{path.name} was left"
        if self._numbers[0] != signal.SIGKILL and code >= 0:
            assert not list(self._folder.rglob(".*.tmp")), f"{hidden} were left"
        self.counts["left"] += any(path.suffix == ".tmp" for path in hidden)
        self.counts["kept"] += any(path.suffix == ".merging" for path in hidden)


def trials(options: argparse.Namespace, folder: Path) -> Iterator[Trial]:
    """One for each job that was asked for."""
    number = signal.Signals[f"SIG{options.signal}"]
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    found = jobs(inputs)
    if number != signal.SIGKILL:
        found |= further_jobs(inputs)
    numbers = [number] if number == signal.SIGKILL or not options.twice else [number, signal.SIGTERM, signal.SIGINT]
    for name, job in found.items():
        if not options.only or name in options.only:
            yield Trial(name, job, folder / "run", numbers, options.count)


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


def main() -> int:
    """Run all trials, print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="kills of each job")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--twice", action="store_true", help="further signals follow TERM or INT")
    parser.add_argument("--only", action="append", metavar="NAME", help="a job, by name; may be repeated")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also in a job in the background of a shell, which ignores it
    warm_up()
    chance, results, failures = random.Random(options.seed), {}, 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for trial in trials(options, Path(name)):
            problems = []
            for number in range(options.count):
                try:
                    trial.once(chance)
                except AssertionError as problem:
                    problems.append(f"run {number}: {problem}")
                if (number + 1) % 25 == 0:
                    print(f"{trial.name}, {number + 1} of {options.count}: {trial.counts}", file=sys.stderr, flush=True)
            results[trial.name] = {**trial.counts, "problems": problems}
            failures += len(problems)
            if not options.json:
                print(
                    f"{trial.name}: {', '.join(f'{count} {what}' for what, count in trial.counts.items())}", flush=True
                )
                for problem in problems:
                    print(f"  FAILED {problem}", flush=True)
    if options.json:
        print(json.dumps({"signal": options.signal, "count": options.count, "jobs": results}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
