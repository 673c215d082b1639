"""Read state dicts of ``torch.save``, always with ``weights_only=True``: a file never runs code.

Only names with their endings are read so; a file named .safetensors is never unpickled. An archive is checked before
torch sees it: compressed entries, which torch never writes, can unpack to a thousand times the size of the file.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraio.errors import FormatError, LoraioError, quoted
from loraio.files.limits import limits, raising
from loraio.files.sniffing import LOOKED_AT, open_file, recognised
from loraio.files.tensorfile import check_name
from loraio.files.tensors import TORCH_DTYPES
from loraio.registry import known

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
"""Endings of files that are read with ``torch.load(weights_only=True)``, if they are of ``torch.save``."""

_WRAPPED_IN = ("state_dict", "model_state_dict", "model")  # keys under which training scripts save the state dict

_STRETCH = 4
"""Most bytes of tensors for each byte of the file: two names can share one storage."""

_SAVE = "torch.save(model.state_dict(), path) makes one"

_GLOBAL = re.compile(r"GLOBAL (?P<name>\S+)")

_MOST_RECORD = 22 + 65_535  # bytes of the end of a zip archive: its last record and a comment


def is_saved_by_torch(path: Path) -> bool:
    """Return True if a file has the name and the first bytes of one of ``torch.save``, new or old."""
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        return False
    try:
        with open_file(path) as file:
            start = file.read(9)
    except (LoraioError, OSError):  # reading it says what is wrong
        return False
    safetensors = start[8:] == b"{"  # after its length, which may start as a pickle does
    return not safetensors and _is_pickle(start)


def _is_pickle(start: bytes) -> bool:
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a state dict to the CPU, contiguous.

    Raises:
        MissingFileError: no such file.
        FormatError: it is not a dict of tensors, or needs more than ``weights_only=True`` allows.
    """
    where = f"{str(path)!r}"
    with open_file(path) as file:
        start = file.read(LOOKED_AT)
        size = file.seek(0, 2)
        if not _is_pickle(start):
            raise _not_saved_by_torch(start, where)
        if start.startswith(b"PK"):
            _check_archive(file, size, where)
    loaded = load_weights_only(path, what="not a state dict that can be read with weights_only=True", hint=_SAVE)
    for key in _WRAPPED_IN:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"holds {type(loaded).__name__}, not a state dict", where=where)
    wrong = [quoted(name) for name, value in loaded.items() if not isinstance(name, str) or not _is_plain(value)]
    if wrong:
        raise FormatError(f"not a state dict: what is not a tensor is {known(wrong, limit=5)}", where=where)
    most = limits()
    for name in loaded:
        check_name(name, most, where)
    total = sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
    if total > _STRETCH * size:
        raise FormatError(f"tensors of {total:,} bytes in a file of {size:,}", where=where)
    return {name: tensor.detach().contiguous() for name, tensor in loaded.items()}


def load_weights_only(path: Path, *, what: str, hint: str | None = None) -> Any:
    """Load a file to the CPU with ``torch.load(weights_only=True)``.

    Args:
        path: of a regular file.
        what: starts the error.
        hint: ends it.

    Raises:
        MissingFileError: no such file.
        FormatError: torch does not read it.
    """
    import torch

    open_file(path).close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how slow its checks are
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors here
        raise FormatError(f"{what}: {_in_short(error)}", where=f"{str(path)!r}", hint=hint) from error


def _in_short(error: Exception) -> str:
    """Shorten an error of torch, without its advice to trust the file."""
    text = str(error)
    asked = _GLOBAL.search(text)
    if asked:
        return f"it asks for the Python object {quoted(asked['name'])}, which a file does not get"
    _, _, rest = text.partition("WeightsUnpickler error:")
    return next((line.strip() for line in (rest or text).splitlines() if line.strip()), type(error).__name__)


def _is_plain(value: Any) -> bool:
    """Return True for a tensor with values of its own, in a dtype that safetensors files can have."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
        and str(value.dtype).removeprefix("torch.") in TORCH_DTYPES.values()
    )


def _not_saved_by_torch(start: bytes, where: str) -> FormatError:
    if not start:
        return FormatError("the file is empty", where=where, hint="fetch the file again")
    if start[8:9] == b"{":
        return FormatError(
            "a safetensors file, perhaps, by another name", where=where, hint="a name that ends in .safetensors"
        )
    what, advice = recognised(start) or ("", _SAVE)
    return FormatError(f"not a file of torch.save{f' but {what}' if what else ''}", where=where, hint=advice)


def _check_archive(file: BinaryIO, size: int, where: str) -> None:
    """Refuse archives that unpack to more than the file, or have a directory or a pickle beyond the limits."""
    most = limits().header_bytes
    file.seek(max(0, size - _MOST_RECORD))
    end = file.read()
    at = end.rfind(b"PK\x05\x06")
    directory = int.from_bytes(end[at + 12 : at + 16], "little")
    if at < 0:
        raise FormatError("a zip archive without an end: truncated", where=where, hint="fetch the file again")
    if directory > most:  # of zip64 it is the largest number, where archives have more than 4 GB before it
        where64 = end.rfind(b"PK\x06\x06")
        directory = int.from_bytes(end[where64 + 40 : where64 + 48], "little") if where64 >= 0 else directory
    if directory > most:
        raise FormatError(
            f"the archive's directory has {directory:,} bytes, at most {most:,} are read",
            where=where,
            hint=raising("header_bytes"),
        )
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"a damaged zip archive: {error}", where=where, hint="fetch the file again") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise FormatError(f"{quoted(packed[0])} is compressed, which torch.save never does", where=where)
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise FormatError(f"the archive's entries have {total:,} bytes, the file {size:,}", where=where)
    large = max((entry.file_size for entry in entries if entry.filename.endswith(".pkl")), default=0)
    if large > most:
        raise FormatError(
            f"the pickle has {large:,} bytes, at most {most:,} are read", where=where, hint=raising("header_bytes")
        )
