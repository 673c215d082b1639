"""Read adapters of any dialect, and write them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraio.adapter import Adapter
from loraio.errors import ConfigError, FormatError
from loraio.files import tensorfile
from loraio.files.atomic import staged
from loraio.files.folders import staged_folder
from loraio.files.names import refuse_link
from loraio.formats.binding import bind
from loraio.formats.dialects import NATIVE, identify, otherwise, recognised
from loraio.formats.foreign import Dialect, Encoded, Options
from loraio.formats.report import Report
from loraio.formats.sources import CONFIG, WEIGHTS, source_of

if TYPE_CHECKING:
    from torch import nn


def load(
    path: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    alpha: int | float | None = None,
    enable_lora: Sequence[bool] | None = None,
    allow_base_mismatch: bool = False,
) -> Adapter:
    """Read an adapter file or folder of any dialect, whole and checked, onto the CPU.

    Args:
        path: the file; of a PEFT adapter the folder.
        base: the network with the base's weights, for example from `loraio.load_base`. Files of other tools need it to
            find their layers. Our own files do not, and ignore it.
        alpha: of every layer without an alpha in another tool's file.
        enable_lora: the flags of a MergedLinear of loralib, which its files do not hold.
        allow_base_mismatch: accept a file that loraio wrote for another tool and another base, if only values or dtypes
            differ; names and shapes must fit. Other tools' files do not know their base, and our own are compared with
            it when the adapter is used.

    Raises:
        MissingFileError: no such file.
        FormatError: its bytes break the format, or it is no adapter.
        AdapterError: the file contradicts itself or cannot be held here, or a factor holds NaN or infinity.
        BaseMismatchError: layers of another tool's file are not in the base; all are listed. Or loraio wrote it for
            another base.
        ConfigError: another tool's file, and no base.
    """
    options = Options(alpha=alpha, enable_lora=enable_lora, allow_base_mismatch=allow_base_mismatch)
    adapter, _ = load_reported(path, base=base, options=options)
    return adapter


def load_reported(
    path: str | os.PathLike[str], *, base: nn.Module | None, options: Options
) -> tuple[Adapter, Report | None]:
    """Load an adapter as `load` does, with the fate of every tensor and setting; None for our own files."""
    found = identify(path)
    if found.dialect is None:
        assert found.source.header is not None
        return NATIVE.read(found.source.header), None
    if base is None:
        raise ConfigError(
            f"{str(path)!r} is a {found.dialect.name} adapter, which does not say what it is for",
            hint="--base BASE (base=loraio.load_base(..) in Python), the model that it was trained on",
        )
    return bind(found.dialect, found.source, base, options)


def load_bytes(data: bytes, path: str | os.PathLike[str]) -> Adapter:
    """Load an adapter file of ours from memory.

    Args:
        data: all bytes of the file.
        path: the origin of the bytes, for errors only.

    Raises:
        FormatError, AdapterError: as `load`.
    """
    header = tensorfile.parse_file(data, path)
    if NATIVE.detect(header):
        return NATIVE.read(header)
    source = source_of(header)
    found = recognised(source)
    if found is None or found.dialect is None:
        raise FormatError(f"{str(path)!r} is not an adapter but {otherwise(source)}")
    raise FormatError(
        f"{str(path)!r} is a {found.dialect.name} adapter, not one of ours", hint="`loraio convert --to native` first"
    )


def save(adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an adapter in the native format, atomically; the same adapter always gives the same bytes.

    Args:
        adapter: any device.
        path: the safetensors file to make.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        OutputError: the system refused to write.
    """
    NATIVE.write(adapter, path, overwrite=overwrite)


def write(
    dialect: Dialect,
    encoded: Encoded,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Write an adapter in the dialect of another tool; the same adapter always gives the same bytes.

    The output is written whole or not at all; for a folder see `loraio.files.folders.staged_folder`, with the
    configuration last.

    Args:
        dialect: of the tool.
        encoded: the adapter in that dialect.
        path: the file or folder to make.
        overwrite: replace existing files.
        inputs: files that the output must not replace.

    Raises:
        OutputExistsError: a file is there already and ``overwrite`` is false.
        OutputError: the system refused to write.
    """

    def write_weights(file: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]] = ()) -> None:
        tensorfile.write(
            encoded.tensors,
            file,
            document=encoded.document,
            metadata=encoded.metadata,
            overwrite=overwrite,
            inputs=inputs,
        )

    if dialect.container == "pickle":
        import torch

        buffer = io.BytesIO()
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in encoded.tensors.items()}, buffer)
        with staged(path, overwrite=overwrite, inputs=inputs) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        return
    if dialect.container == "safetensors":
        write_weights(path, inputs)
        return
    files = (WEIGHTS[0], CONFIG)
    for name in files:
        refuse_link(Path(path) / name)
    text = json.dumps(encoded.config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with staged_folder(path, files, last=CONFIG, overwrite=overwrite, inputs=inputs) as temporary:
        write_weights(temporary / WEIGHTS[0])
        (temporary / CONFIG).write_text(text, encoding="utf-8")
