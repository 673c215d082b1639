"""``loraio check``: compare files with their digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.formats.checking import Checked


@click.command(epilog=_options.example("loraio check adapters"))
@click.argument("files", type=click.Path(), nargs=-1, required=True)
@_options.json_option
def check(files: tuple[str, ...], as_json: bool) -> None:
    """Compare FILES with the digests that they hold.

    FILES are adapters, packs, base checkpoints, other tools' files that loraio wrote, or folders of them. If one is
    damaged, the exit code is 3 and the damaged tensor is named. The digests notice damage; they do not prove who wrote
    a file.
    """
    from loraio.errors import MissingFileError
    from loraio.formats import checking

    paths = [path for file in files for path in (checking.checkable(file) if Path(file).is_dir() else [Path(file)])]
    if not paths:
        raise MissingFileError(f"there are no safetensors files in {', '.join(map(repr, files))}")
    checked = [checking.check(path) for path in paths]
    ok = all(file.ok for file in checked)
    if as_json:
        keys = ("ok", "bytes", "tensors", "complete", "problems")
        facts = [{key: getattr(file, key) for key in keys} for file in checked]
        rows = [{"file": str(file.path), "type": file.kind, **fact} for file, fact in zip(checked, facts, strict=True)]
        _output.print_json("check", {"ok": ok, "files": rows})
    else:
        for file in checked:
            _output.line(_line(file))
            for problem in file.problems:
                _output.line(f"  {problem}")
        _output.line(_sum(checked))
    if not ok:
        _options.say_no()


def _sum(checked: Sequence[Checked]) -> str:
    count, bad = len(checked), sum(not file.ok for file in checked)
    bare = sum(not file.complete for file in checked)
    if bad:
        return f"{bad} of {count} files DAMAGED"
    if bare:
        return f"{count} files in order, but {bare} of them have no digests for all of their content"
    return f"{count} files, all as they were written"


def _line(file: Checked) -> str:
    about = f"{file.kind}, {_output.size(file.bytes)}"
    if not file.ok:
        return f"{file.path}: DAMAGED, {about}"
    if file.complete:
        return f"{file.path}: ok, {about}, {file.tensors} digests and that of the header"
    return f"{file.path}: {about}, in order, but without digests for all of its content"
