"""``loraio pack``: put many adapter files into one."""

from __future__ import annotations

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio pack adapters -o all.pack"))
@click.argument("files", type=click.Path(), nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(), help="The pack to write.")
@_options.force_option
@_options.json_option
def pack(files: tuple[str, ...], output: str, force: bool, as_json: bool) -> None:
    """Put adapter FILES, or all of a folder, into one file.

    Each adapter keeps its bytes, and its file name without the ending. Each can be read without the others.
    """
    from loraio.formats import pack as packing

    packed = packing.pack(files, output, overwrite=force)
    if as_json:
        _output.print_json("pack", {"file": output, "bytes": packed.file_bytes, "adapters": list(packed.members)})
        return
    _output.line(f"{output}: {len(packed.members)} adapters, {_output.size(packed.file_bytes)}")
