"""``loraio unpack``: write the adapters of a pack as files again."""

from __future__ import annotations

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio unpack all.pack -o adapters digit-1 digit-8"))
@click.argument("packed", metavar="PACK", type=click.Path())
@click.argument("names", type=str, nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder for the files; made if missing.")
@_options.force_option
@_options.json_option
def unpack(packed: str, names: tuple[str, ...], output: str, force: bool, as_json: bool) -> None:
    """Write the adapters of PACK as files again.

    With NAMES, only those. Each file has the bytes of the file that was packed.
    """
    from loraio.formats import pack as packing

    files = packing.unpack(packed, output, names=names, overwrite=force)
    if as_json:
        _output.print_json("unpack", {"pack": packed, "files": [str(file) for file in files]})
        return
    _output.line(f"{output}: {len(files)} adapters")
