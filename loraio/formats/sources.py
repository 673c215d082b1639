"""Open an adapter's file or folder of any dialect: names and shapes of tensors, metadata, a configuration."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraio.errors import FormatError, MissingFileError
from loraio.files import tensorfile
from loraio.files.pickles import is_saved_by_torch, read_pickle
from loraio.files.strictjson import read_json
from loraio.files.tensorfile import Header, TensorInfo
from loraio.files.tensors import dtype_code

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
"""The configuration beside the tensors."""

WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""Names of the tensors' file in an adapter's folder; the first that exists is read."""

_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An adapter's file or folder, of any dialect. Of safetensors only the header was read.

    Attributes:
        path: as the user named it.
        file: the one with the tensors.
        tensors: dtype code and shape of each, by name; offsets of tensors from ``torch.save`` mean nothing.
        metadata: the strings in a safetensors header.
        config: the contents of `CONFIG` in the same folder; None if there is none.
        header: of a safetensors file.
        loaded: the tensors from ``torch.save``.
    """

    path: Path
    file: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    header: Header | None = field(default=None, repr=False)
    loaded: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @property
    def file_bytes(self) -> int:
        """The length of the file with the tensors."""
        return self.header.file_bytes if self.header is not None else self.file.stat().st_size

    def read(self) -> dict[str, Tensor]:
        """Read all tensors onto the CPU."""
        if self.header is not None:
            return tensorfile.read_tensors(self.header)
        return dict(self.loaded or {})

    def number(self, name: str) -> int | float:
        """Return the value of a tensor with one element, such as an alpha; safetensors are read without torch.

        Raises:
            FormatError: it has another number of elements, or its dtype is no number.
        """
        info = self.tensors[name]
        where = f"{str(self.file)!r}"
        if math.prod(info.shape) != 1:
            raise FormatError(f"{name!r} has the shape {info.shape}, it should be one number", where=where)
        if self.loaded is not None:
            value: int | float = self.loaded[name].item()
            return value
        if info.dtype != "BF16" and info.dtype not in _NUMBERS:
            raise FormatError(f"{name!r} is {info.dtype}, it should be a number", where=where)
        raw = self._raw(info)
        if info.dtype == "BF16":  # the upper half of a float32
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        number: int | float = struct.unpack(_NUMBERS[info.dtype], raw)[0]
        return number

    def _raw(self, info: TensorInfo) -> bytes:
        assert self.header is not None
        begin = 8 + self.header.header_bytes + info.begin
        if self.header.data is not None:
            return self.header.data[begin : begin + info.end - info.begin]
        with self.file.open("rb") as file:
            file.seek(begin)
            return file.read(info.end - info.begin)


def is_adapter_folder(path: str | os.PathLike[str]) -> bool:
    """Return True if a folder holds an adapter's file under one of the usual names."""
    return any((Path(path) / name).is_file() for name in (CONFIG, *WEIGHTS))


def adapter_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the files of an adapter: its own and the configuration beside it, or those of its folder."""
    path = Path(path)
    if path.is_dir():
        return tuple(file for name in (CONFIG, *WEIGHTS) if (file := path / name).is_file())
    beside = path.with_name(CONFIG)
    return (path, beside) if path.name in WEIGHTS and beside.is_file() else (path,)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file of tensors, or a folder that holds one under a usual name.

    Raises:
        MissingFileError: there is no such file, or none in the folder.
        FormatError: the bytes contradict their container.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise MissingFileError(
                f"there is no adapter in the folder {str(path)!r}", hint=f"one of {', '.join(WEIGHTS)}"
            )
        file = found[0]
    beside = file.parent / CONFIG
    config = read_json(beside) if file.name in WEIGHTS and beside.is_file() else None
    if config is not None and not isinstance(config, dict):
        raise FormatError("not a JSON object", where=f"{str(beside)!r}")
    if is_saved_by_torch(file):
        loaded = read_pickle(file)
        tensors = {
            name: TensorInfo(dtype_code(tensor.dtype), tuple(tensor.shape), 0, 0) for name, tensor in loaded.items()
        }
        return Source(path=path, file=file, tensors=tensors, config=config, loaded=loaded)
    return source_of(tensorfile.read_header(file), path=path, config=config)


def source_of(header: Header, *, path: Path | None = None, config: Mapping[str, Any] | None = None) -> Source:
    """Return the source with this header."""
    return Source(
        path=path or header.path,
        file=header.path,
        tensors=header.tensors,
        metadata=header.metadata,
        config=config,
        header=header,
    )
