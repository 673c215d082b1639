"""Systems that refuse: every call that writes fails once, at every index, for every function and command that writes.

Afterwards the output is what it was, or the new one, whole; nothing temporary is left; the error is one of ours and
names the output; and the next run works. None of it depends on the user's rights: root may write everywhere.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sampling import sample
from torch import nn

import loraio
from loraio.errors import LoraioError
from loraio.exporting import export
from loraio.files import tensorfile
from loraio.formats.dialects import DIALECTS
from loraio.merging import checkpoint_writer, residue_files
from loraio.training.resuming import SideFile

FUNCTIONS = (
    "chmod", "fsync", "ftruncate", "link", "mkdir", "open", "rename", "replace", "rmdir",
    "unlink",
)  # fmt: skip
"""Of the module os, that fail. Besides them ``write`` and ``truncate`` of files."""

ROOM = ("fsync", "link", "mkdir", "open", "truncate", "write")
"""What fails on a disk that is full, each time."""

REASONS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)


class Faults:
    """Counts the calls that concern files below a folder, and lets some of them fail."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.fspath(folder)
        self.calls: Counter[str] = Counter()
        self.fails: Callable[[str, int], int | None] = lambda name, index: None

    def once(self, name: str, index: int, reason: int) -> None:
        """Let one call fail."""
        self.fails = lambda called, at: reason if (called, at) == (name, index) else None

    def after(self, room: int) -> None:
        """Let the disk be full after so many calls that need room."""
        self.fails = lambda called, _: (
            errno.ENOSPC if called in ROOM and sum(self.calls[name] for name in ROOM) > room else None
        )

    def call(self, name: str, path: Any = None) -> None:
        """Count a call; raise if it fails."""
        if isinstance(path, str | os.PathLike) and not os.fspath(path).startswith(self._folder):
            return
        self.calls[name] += 1
        reason = self.fails(name, self.calls[name] - 1)
        if reason is not None:
            raise OSError(reason, os.strerror(reason))

    @contextmanager
    def injected(self) -> Iterator[None]:
        """With the functions of the system replaced."""
        faults = self

        class File(io.FileIO):
            def __init__(self, path: Any, mode: str = "r", **options: Any) -> None:
                if set(mode) & set("wax+"):
                    faults.call("open", path)
                super().__init__(path, mode, **options)

            def write(self, data: Any) -> int:
                faults.call("write", self.name)
                return super().write(data) or 0

            def truncate(self, size: int | None = None) -> int:
                faults.call("truncate", self.name)
                return super().truncate(size)

        real_open = io.open

        def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            inside = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(faults._folder)
            if not inside or not set(mode) & set("wax+"):
                return real_open(path, mode, *rest, **options)
            buffered = io.BufferedWriter(File(path, mode.replace("b", "").replace("t", "")))
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding=options.get("encoding"), newline=options.get("newline"))

        def wrapped(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def function(path: Any, *rest: Any, **options: Any) -> Any:
                reads = name == "open" and not rest[0] & (os.O_WRONLY | os.O_RDWR)
                if not reads and "dir_fd" not in options:
                    faults.call(name, path)
                return real(path, *rest, **options)

            return function

        with pytest.MonkeyPatch.context() as patch:
            for name in FUNCTIONS:
                patch.setattr(os, name, wrapped(name))
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            patch.setattr(checkpoint_writer, "FileIO", File)
            patch.setattr(residue_files, "FileIO", File)
            yield


@dataclass(frozen=True)
class Case:
    """Something that writes.

    Attributes:
        write: into a file or folder of this name, in the place of an older one or not.
        output: the name.
        apart: whether its files stand for themselves: each is the old or the new one.
        kept: whether finished parts may stay in a hidden folder.
    """

    write: Callable[[Path, bool], Any]
    output: str = "out.safetensors"
    apart: bool = False
    kept: bool = False


Cases = dict[str, Callable[[str], Case]]


def contents(folder: Path, *, hidden: bool = False) -> dict[str, bytes]:
    """The files below a folder; those that are hidden, or lie in what is, or the others."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: data for name, data in found.items() if hidden == any(part.startswith(".") for part in Path(name).parts)
    }


@pytest.fixture(scope="module")
def things(
    tmp_path_factory: pytest.TempPathFactory,
    trained_base: nn.Module,
    three: loraio.Adapter,
    seven: loraio.Adapter,
    write_parts: Callable[..., Path],
) -> Path:
    """A folder with all inputs."""
    folder = tmp_path_factory.mktemp("things")
    loraio.save_base(trained_base, folder / "base.safetensors")
    (folder / "adapters").mkdir()
    loraio.save(three, folder / "adapters/three.safetensors")
    loraio.save(seven, folder / "adapters/seven.safetensors")
    linear = {name: target for name, target in seven.targets.items() if name.startswith("fc.")}
    factors = {name: factor for name, factor in seven.factors.items() if name.startswith("fc.")}
    loraio.save(replace(seven, targets=linear, factors=factors), folder / "linear.safetensors")
    write_parts(trained_base.state_dict(), folder / "parts")
    loraio.pack([folder / "adapters"], folder / "new.pack")
    shutil.copytree(folder / "adapters", folder / "one")
    (folder / "one/seven.safetensors").unlink()
    (folder / "older").mkdir()  # other bytes under the same names
    for name, adapter in {"three": three, "seven": seven}.items():
        loraio.save(replace(adapter, training={"note": "older"}), folder / f"older/{name}.safetensors")
    loraio.pack([folder / "older"], folder / "old.pack")
    return folder


class FakeRun:
    """A run of training with a state that differs from run to run."""

    def __init__(self, value: float) -> None:
        self._value = value

    def state_dict(self) -> dict[str, Any]:
        return {"values": torch.full((500,), self._value)}


class FakeMoment:
    step, last = 1, True


@pytest.fixture
def case(request: pytest.FixtureRequest, things: Path) -> Case:
    """The case of a name; ``write(path, True)`` writes the new one, ``write(path, False)`` an older one."""
    name: str = request.param
    base, three, seven = (things / f"{one}.safetensors" for one in ("base", "adapters/three", "adapters/seven"))

    def merging(source: Path, **options: Any) -> Callable[[Path, bool], Any]:
        return lambda path, new: loraio.merge_file(
            source, three, path, strength=1.0 if new else 0.5, overwrite=path.exists(), workers=1, **options
        )

    if name == "save":
        adapters = {True: loraio.load(three), False: loraio.load(seven)}
        return Case(lambda path, new: loraio.save(adapters[new], path, overwrite=path.exists()))
    if name == "save_base":
        model = loraio.load_base(base)
        return Case(lambda path, new: loraio.save_base(model, path, overwrite=path.exists(), training={"new": new}))
    if name == "merge":
        return Case(merging(base))
    if name == "merge, sharded":
        return Case(merging(things / "parts"), output="out", kept=True)
    if name == "merge, reversible":
        return Case(merging(base, reversible=True), apart=True)
    if name.startswith("unmerge"):
        return unmerge_case(things, sharded=name != "unmerge")
    if name == "pack":
        folders = {True: things / "adapters", False: things / "one"}
        return Case(lambda path, new: loraio.pack([folders[new]], path, overwrite=path.exists()))
    if name == "unpack":
        packs = {True: things / "new.pack", False: things / "old.pack"}
        unpacking: Any = lambda path, new: loraio.unpack(packs[new], path, overwrite=path.exists())  # noqa: E731
        return Case(unpacking, output="out", apart=True)
    if name == "side file":
        runs = {new: FakeRun(float(new)) for new in (True, False)}
        return Case(lambda path, new: SideFile(path, every=1, identity={}, validation=None)(runs[new], FakeMoment()))
    if name == "export":
        return export_case(request, base)
    dialect = name.removeprefix("convert to ")
    source = {True: three, False: seven}
    if dialect == "torchtune":
        source = {True: things / "linear.safetensors", False: things / "linear-older.safetensors"}
        if not source[False].exists():
            doubled = loraio.load(source[True])
            factors = {key: 2 * factor for key, factor in doubled.factors.items()}
            loraio.save(replace(doubled, factors=factors), source[False])
    return Case(
        lambda path, new: loraio.convert(source[new], path, to=dialect, base=base, lossy=True, overwrite=path.exists()),
        output="out.pt" if dialect in DIALECTS and DIALECTS[dialect].container == "pickle" else "out",
    )


def unmerge_case(things: Path, *, sharded: bool) -> Case:
    """With the residue; the older output is what another merge gives back."""
    bases = {
        True: things / ("parts" if sharded else "base.safetensors"),
        False: things / ("older-parts", "older.st")[not sharded],
    }
    three = things / "adapters/three.safetensors"
    state = dict(loraio.read_base(bases[True]).state)
    if not bases[False].exists():
        if sharded:
            shutil.copytree(bases[True], bases[False])
        name = min(bases[False].glob("*-1-of-2.safetensors")) if sharded else bases[False]
        inside = tensorfile.read_header(name).tensors if sharded else state
        save_file({key: state[key] + 1 if key == "conv1.bias" else state[key].clone() for key in inside}, name)
    merged = {new: base.with_name(f"merged-{base.name}") for new, base in bases.items()}
    for new, base in bases.items():
        if not merged[new].exists():
            loraio.merge_file(base, three, merged[new], reversible=True, allow_base_mismatch=True)
    return Case(
        lambda path, new: loraio.unmerge_file(merged[new], path, adapter=three, overwrite=path.exists(), workers=1),
        output="out" if sharded else "out.safetensors",
    )


def export_case(request: pytest.FixtureRequest, base: Path) -> Case:
    """Without tracing and running the network each time: what is written is real."""
    patch = request.getfixturevalue("monkeypatch")
    network = nn.Linear(784, 10)
    programs = {new: torch.export.export(network, (torch.zeros(2 + new, 784),), strict=False) for new in (True, False)}
    wanted: dict[str, Any] = {}
    patch.setattr(export, "_trace", lambda *_: programs[wanted["new"]])
    patch.setattr(export, "_run_file", lambda *_: [])
    patch.setattr(export, "compare", lambda *_, **__: ())

    def write(path: Path, new: bool) -> None:
        wanted["new"] = new
        loraio.export(base, path, overwrite=path.exists())

    return Case(write, output="out.pt2")


NAMES = ("save", "save_base", "merge", "merge, sharded", "merge, reversible", "unmerge", "unmerge, sharded", "pack")
NAMES += ("unpack", "side file", "export")
CONVERSIONS = [f"convert to {dialect}" for dialect in ("native", *DIALECTS)]
SAMPLED = {*NAMES, *sample(CONVERSIONS, 2, key="faults")}
"""Conversions are written by two functions; all of them with ``--all``."""

every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.slow) for name in (*NAMES, *CONVERSIONS)],
    indirect=True,
)
over_what = pytest.mark.parametrize("over", ["nothing", "an older one"])


class Place:
    """Where a case writes, and what it must find there."""

    def __init__(self, case: Case, folder: Path, over: str) -> None:
        self.case, self.folder = case, folder / "place"
        self.path = self.folder / case.output
        self.old: dict[str, bytes] = {}
        self.clear()
        if over != "nothing":
            case.write(self.path, False)
            self.old = contents(self.folder)
        case.write(self.path, True)
        self.new = contents(self.folder)
        assert self.old != self.new
        assert set(self.old) <= set(self.new)

    def clear(self) -> None:
        """Put back what was there before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, data in self.old.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_bytes(data)

    def check(self, error: LoraioError | None) -> None:
        """Check what is there now, and that the next run works."""
        found = contents(self.folder)
        if error is None:
            assert found == self.new
        elif self.case.apart:
            assert all(data in (self.old.get(name), self.new.get(name)) for name, data in found.items())
            assert set(found) >= set(self.old)
        else:
            assert found in (self.old, self.new)
        hidden = contents(self.folder, hidden=True)
        if not (error and self.case.kept):
            assert not list(self.folder.rglob(".*"))
        assert not [name for name in hidden if name.endswith(".tmp")]
        if error is not None:
            assert str(self.path) in str(error)
            assert ".tmp" not in str(error)
        self.case.write(self.path, True)
        assert contents(self.folder) == self.new
        assert not list(self.folder.rglob(".*"))


def attempted(place: Place, faults: Faults) -> LoraioError | None:
    """Write with the faults; the error, if there was one, which must be ours."""
    place.clear()
    faults.calls.clear()
    with faults.injected():
        try:
            place.case.write(place.path, True)
        except LoraioError as error:
            return error
    return None


@over_what
@every_case
def test_a_call_that_fails_at_any_index_leaves_the_old_output_or_the_new(case: Case, over: str, tmp_path: Path) -> None:
    place = Place(case, tmp_path, over)
    faults = Faults(place.folder)
    assert attempted(place, faults) is None
    calls = faults.calls.copy()
    assert {"fsync", "open"} <= set(calls)
    assert {"link", "replace", "rename"} & set(calls)
    failed = 0
    for name, count in calls.items():
        for index in range(count):
            reasons = REASONS[:-1] if name == "unlink" else REASONS  # a file that is there is not missing
            faults.once(name, index, reasons[(failed + index) % len(reasons)])
            error = attempted(place, faults)
            failed += error is not None
            place.check(error)
    assert failed >= len(calls) - 2  # a link that fails is replaced by a rename, and an unlink is tried again


@over_what
@every_case
def test_a_disk_that_is_full_at_any_moment_leaves_the_old_output(case: Case, over: str, tmp_path: Path) -> None:
    place = Place(case, tmp_path, over)
    faults = Faults(place.folder)
    assert attempted(place, faults) is None
    needed = sum(faults.calls[name] for name in ROOM)
    for room in range(needed):
        faults.after(room)
        error = attempted(place, faults)
        place.check(error)
        assert error is not None or room > needed - 3  # a link that fails is replaced by a rename
    assert error is None or "No space left" in str(error)


@over_what
@every_case
def test_a_file_that_may_not_grow_leaves_the_old_output(case: Case, over: str, tmp_path: Path) -> None:
    place = Place(case, tmp_path, over)
    size = max(map(len, place.new.values()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, size // 3, size // 2, size - 1):
        place.clear()
        error = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            case.write(place.path, True)
        except LoraioError as found:
            error = found
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in str(error)
        place.check(error)


def namespaces() -> bool:
    """Return True if this process may mount something that only it sees."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.skipif(not namespaces(), reason="nothing may be mounted here; the tests above need no mounts")
def test_a_real_filesystem_that_is_full_or_read_only_leaves_the_old_output(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("full_filesystem.py")
    command = ["unshare", "-rm", sys.executable, str(driver), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [line.split(": ") for line in done.stdout.splitlines()]
    assert [name for name, _ in counts] == ["save", "save_base", "merge", "merge, sharded", "convert to peft", "pack"]
    for _, count in counts:
        assert int(count.split()[0]) >= 3  # that did not fit


def test_a_folder_that_vanishes_while_it_is_written_into_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LoraioError, match="its folder has gone"):
        tensorfile.write({}, folder / "file", check=lambda _: shutil.rmtree(folder))
    assert not folder.exists()
