"""``loraio check``: is every bit of a file what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.formats.checking import Checked

FAILED = 3
"""Exit code when the check ran and says no."""


@click.command(epilog=_options.example("loraio check adapters"))
@click.argument("files", type=click.Path(), nargs=-1, required=True)
@_options.json_option
@click.pass_context
def check(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Say whether every bit of FILES is what was written.

    Adapters, packs, base checkpoints in one file or in parts, and other tools' files that loraio wrote are compared
    with the digests that they hold; of a folder all. Exit code 3 says no, and which tensor is damaged. The digests
    notice damage, not who wrote the file.
    """
    from loraio.errors import MissingFileError
    from loraio.formats import checking

    paths = [path for file in files for path in (checking.checkable(file) if Path(file).is_dir() else [Path(file)])]
    if not paths:
        raise MissingFileError(f"there are no safetensors files in {', '.join(map(repr, files))}")
    checked = [checking.check(path) for path in paths]
    ok = all(file.ok for file in checked)
    if as_json:
        rows = [
            {
                "file": str(file.path),
                "ok": file.ok,
                "type": file.kind,
                "bytes": file.bytes,
                "tensors": file.tensors,
                "complete": file.complete,
                "problems": file.problems,
            }
            for file in checked
        ]
        _output.print_json("check", {"ok": ok, "files": rows})
    else:
        for file in checked:
            _output.line(_line(file))
            for problem in file.problems:
                _output.line(f"  {problem}")
        _output.line(_sum(checked))
    if not ok:
        ctx.exit(FAILED)


def _sum(checked: Sequence[Checked]) -> str:
    count, bad = len(checked), sum(not file.ok for file in checked)
    bare = sum(not file.complete for file in checked)
    if bad:
        return f"{bad} of {count} files DAMAGED"
    if bare:
        return f"{count} files in order, {bare} of them without digests of all that is in them"
    return f"{count} files, all as they were written"


def _line(file: Checked) -> str:
    size = _output.size(file.bytes)
    if not file.ok:
        return f"{file.path}: DAMAGED, {file.kind}, {size}"
    if file.complete:
        return f"{file.path}: ok, {file.kind}, {size}, {file.tensors} digests and that of the header"
    return f"{file.path}: {file.kind}, {size}, in order, but it has no digests of all that is in it"
