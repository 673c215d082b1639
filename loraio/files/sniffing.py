"""Recognise common non-safetensors files by their first bytes, and refuse pipes and devices."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from loraio.errors import MissingFileError

LOOKED_AT = 512
"""Bytes at the start of a file that `recognised` wants."""

FETCH_AGAIN = "fetch the file again: it may be damaged, or not be finished"
"""The hint for a file that ends too soon."""

_UNPACK = "unpack it and name the file inside"
_ONLY = "only safetensors files and, by the endings .pt, .pth and .bin, those of torch.save are read"

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file", "`git lfs pull` fetches the file"),
    (rb"PK\x03\x04", "a zip archive, perhaps from torch.save", "if it is from torch.save, a name that ends in .pt"),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"BZh[1-9]", "a bzip2 archive", _UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (rb"(?s).{257}ustar", "a tar archive", _UNPACK),
    (rb"GGUF|gg(ml|jt|la)|(lm|tj|al)gg", "a GGUF or GGML model", _ONLY),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, perhaps of Keras", _ONLY),
    (rb"(?s).{4}TFL3", "a TensorFlow Lite model", _ONLY),
    (rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x2a|\x32|\x3a)", "perhaps an ONNX model", _ONLY),
    (rb"\x93NUMPY", "a NumPy array", _ONLY),
    (rb"\x89PNG|GIF8[79]a|\xff\xd8\xff|RIFF", "an image or a recording", _ONLY),
    (rb"%PDF-", "a PDF document", _ONLY),
    (rb"\x7fELF|MZ\x90|#!", "a program", _ONLY),
    (rb"\x80[\x01-\x05][\x28-\x95]", "a pickle, perhaps an old torch.save file", "if it is, a name that ends in .pt"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head)",
        "an HTML page",
        "download it again: a link to the file itself gives it, one to its page, or without permission, a web page",
    ),
    (rb"(\xef\xbb\xbf)?\s*<", "an HTML or XML page", "download it again, by a link to the file itself"),
    (
        rb"(\xef\xbb\xbf)?\s*[{\[]",
        "a JSON text",
        "name the file with the tensors, or the .index.json of its shards",
    ),
    (rb"\0{16}", "zeros", "download it again: the space was set aside and nothing was written"),
)
"""Pattern, what it is, what to do. Those that are less sure come last."""

_NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def recognised(start: bytes) -> tuple[str, str] | None:
    """Guess the kind of a file from its first bytes, with advice on what to do; None if they say nothing.

    >>> recognised(b"<!DOCTYPE html><html>")[0]
    'an HTML page'
    """
    for pattern, what, advice in _SIGNATURES:
        if re.match(pattern, start):
            return what, advice
    line = start.split(b"\n", 1)[0].strip()
    if line and start.isascii() and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"a text that starts with {line[:60].decode()!r}", _ONLY
    return None


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading. Nothing is read from other files, and a pipe is not waited for.

    Raises:
        MissingFileError: it is not there, cannot be read, or is no file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise MissingFileError(f"{str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:  # a NUL or half a surrogate pair in the name
        raise MissingFileError(f"{str(path)!r} cannot be read: {reason(error)}") from error
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise MissingFileError(
                f"{str(path)!r} cannot be read: it is {_NOT_FILES.get(kind, 'no regular file')}, not a file",
                hint=None if kind == stat.S_IFDIR else "put what it gives into a file",
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def reason(error: OSError | ValueError) -> str:
    """Return the reason of a system error in words."""
    return getattr(error, "strerror", None) or str(error)
