"""``loraio unpack``: adapter files out of a pack."""

from __future__ import annotations

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio unpack all.pack -o adapters digit-3 digit-7"))
@click.argument("packed", metavar="PACK", type=click.Path())
@click.argument("names", type=str, nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder for the files; made if it is not there.")
@_options.force_option
@_options.json_option
def unpack(packed: str, names: tuple[str, ...], output: str, force: bool, as_json: bool) -> None:
    """Write the adapters of PACK as files again.

    Each comes out as the file that it was, byte by byte; with NAMES, only those do.
    """
    from loraio.formats import pack as packing

    files = packing.unpack(packed, output, names=names, overwrite=force)
    if as_json:
        _output.print_json("unpack", {"pack": packed, "files": [str(file) for file in files]})
        return
    _output.line(f"{output}: {len(files)} adapters")
