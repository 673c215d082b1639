"""Put many adapter files into one pack, and read each without the others; see `loraio/docs/format.md`, section 8.

A pack is a safetensors file with one tensor of bytes for each adapter file, so that the strict reader of
`loraio.files.tensorfile` guards it too. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loraio.errors import ConfigError, FormatError, MissingFileError, OutputError, OutputExistsError
from loraio.files import integrity, tensorfile
from loraio.files.atomic import check_output, staged
from loraio.files.folders import make_folder
from loraio.files.integrity import is_sha256
from loraio.files.names import name_clashes, name_key, name_problem, normal_form, refuse_link
from loraio.files.sniffing import open_file
from loraio.files.temporaries import remove_stale
from loraio.files.tensorfile import Header
from loraio.formats.native import read_metadata
from loraio.registry import lookup

PACK_VERSION = 2
"""Version of packs that are written. Version 1, without a digest of the index, is read too."""

SUFFIX = ".safetensors"
"""The ending of adapter files; the adapter's name stands before it."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One adapter file in a pack: the offset of its bytes from the pack's first, their number and their digest."""

    begin: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """The index of a pack, checked.

    Attributes:
        path: the pack.
        members: by name, in the order of the names' bytes.
        file_bytes: length of the whole pack.
        stamp: of the pack when the index was read, `stamp_of`.
    """

    path: Path
    members: Mapping[str, Member]
    file_bytes: int
    stamp: tuple[int, ...]


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return device, inode, size and time of the last write, which change if a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# Reading


def is_pack(header: Header) -> bool:
    """Return True if a safetensors file with this header is a pack."""
    return "pack" in (header.document() or {})


def read_index(path: str | os.PathLike[str]) -> Pack:
    """Read the index of a pack, from the header alone.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is no pack, or its index contradicts itself.
    """
    stamp = _stamp(path)
    header = tensorfile.read_header(path)
    pack = check_index(header, stamp=stamp)
    if _stamp(path) != stamp:
        raise FormatError("the pack changed while its index was being read", where=f"{str(header.path)!r}")
    return pack


def check_index(header: Header, *, stamp: tuple[int, ...]) -> Pack:
    """Return the index in a pack's header.

    Args:
        header: of the pack.
        stamp: of the file that it was read from, `stamp_of`.

    Raises:
        FormatError: as `read_index`.
    """
    where = f"{str(header.path)!r}"
    document = header.document() or {}
    if "pack" not in document:
        what = "an adapter" if "targets" in document else "no file of loraio" if not document else "a base model"
        raise FormatError(f"not a pack of adapters but {what}", where=where)
    version = document.get("format_version")
    if type(version) is not int or not 1 <= version <= PACK_VERSION:
        raise FormatError(f"pack version {version!r}, this loraio reads versions up to {PACK_VERSION}", where=where)
    listed = document["pack"]
    if not isinstance(listed, dict):
        raise FormatError("'pack' is not a JSON object", where=where)
    problems = [f"{name!r}: {problem}" for name in listed if (problem := name_problem(name))]
    problems += [f"{name!r} is listed and not there" for name in listed if name not in header.tensors]
    problems += [f"{name!r} is there and not listed" for name in header.tensors if name not in listed]
    problems += [
        f"{name!r} is {info.dtype} of shape {info.shape}, not a list of bytes"
        for name, info in header.tensors.items()
        if info.dtype != "U8" or len(info.shape) != 1
    ]
    problems += [
        f"{name!r} has the digest {digest!r}, not 64 hexadecimal digits"
        for name, digest in listed.items()
        if not is_sha256(digest)
    ]
    problems += dict.fromkeys(name_clashes(listed).values())
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise FormatError("the index of the pack contradicts itself", problems=problems[:20] + more, where=where)
    start = 8 + header.header_bytes
    members = {
        name: Member(begin=start + info.begin, size=info.end - info.begin, sha256=listed[name])
        for name, info in sorted(header.tensors.items())
    }
    return Pack(path=header.path, members=members, file_bytes=header.file_bytes, stamp=stamp)


def read_member(pack: Pack, name: str) -> bytes:
    """Read the bytes of one adapter file, as they were before packing; no other member is read.

    Raises:
        UnknownNameError: no such member.
        MissingFileError: the pack cannot be read any more.
        FormatError: the pack changed since its index was read, or the bytes have another digest.
    """
    member = lookup(pack.members, name, what="adapter in the pack")
    where = f"{str(pack.path)!r}"
    try:
        descriptor = os.open(pack.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            if stamp_of(os.fstat(descriptor)) != pack.stamp:
                raise FormatError("the pack was changed after its index was read", where=where, hint="read it again")
            data = read_range(descriptor, member.begin, member.size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MissingFileError(f"{where} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != member.sha256:
        raise FormatError(f"{name!r} is damaged: its bytes have another digest than the index says", where=where)
    return data


def read_range(descriptor: int, begin: int, size: int) -> bytes:
    """Read ``size`` bytes of an open file from ``begin`` on; fewer if it ends before."""
    parts = []
    while size > 0 and (part := os.pread(descriptor, min(size, 1 << 30), begin)):
        parts.append(part)
        begin, size = begin + len(part), size - len(part)
    return b"".join(parts)


# Writing


def pack(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, overwrite: bool = False) -> Pack:
    """Put adapter files into one pack, byte for byte, each under its name without the ending.

    The same files always give the same pack, in any order.

    Args:
        files: adapter files, or one folder with adapters; its base models are ignored.
        output: the pack to make.
        overwrite: replace an existing file.

    Returns:
        the index of the pack.

    Raises:
        ConfigError: nothing to pack, or names that clash; all are listed.
        FormatError, AdapterError: a file is no adapter.
        OutputExistsError, OutputError: as `loraio.save`.
    """
    paths = _adapter_files(files)
    with staged(output, overwrite=overwrite, inputs=paths.values()) as temporary:
        members = {name: _examined(path) for name, path in sorted(paths.items(), key=lambda item: item[0].encode())}
        with temporary.open("wb") as file:
            file.write(_header(members))
            for name, (size, sha256) in members.items():
                if _copied(paths[name], file) != (size, sha256):
                    raise FormatError("the file changed while it was being packed", where=f"{str(paths[name])!r}")
        read_index(temporary)
    return read_index(output)


def unpack(
    packed: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write members of a pack into a folder, byte for byte the files that were packed.

    Args:
        packed: the pack.
        output: the folder; it is made if it does not exist.
        names: of the members; all of them when empty.
        overwrite: replace existing files.

    Returns:
        the files.

    Raises:
        UnknownNameError: no such member; nothing was written.
        OutputExistsError: a file exists, or one with nearly the same name (as in another case), which is never
            replaced; nothing was written.
        FormatError: a member is damaged; those before it are written.
        OutputError: a link, which may lead out of the folder, stands in the place of a file, or the system refused to
            write.
    """
    index = read_index(packed)
    chosen = [normal_form(name) for name in names] or list(index.members)
    for name in chosen:
        lookup(index.members, name, what="adapter in the pack")
    folder = Path(output)
    targets = _places(folder, dict.fromkeys(chosen), overwrite=overwrite)
    make_folder(folder)
    for path in targets.values():
        check_output(path, overwrite=overwrite, inputs=[packed])
    remove_stale(folder, [path.name for path in targets.values()])  # once, not for each of thousands
    for name, path in targets.items():
        data = read_member(index, name)
        with staged(path, overwrite=overwrite, inputs=[packed], tidy=False) as temporary:
            temporary.write_bytes(data)
    return list(targets.values())


def _places(folder: Path, names: Iterable[str], *, overwrite: bool) -> dict[str, Path]:
    """Return the file of each member in the folder; an existing file in another normal form is used.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false, or one that some systems take for the same.
        OutputError: a link is in its place, or the folder cannot be read.
    """
    there: dict[str, list[str]] = {}
    try:
        for file in sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else ():
            there.setdefault(name_key(file), []).append(file)
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be read: {error.strerror or error}") from error
    places, existing, clashes = {}, [], []
    for name in names:
        file = f"{name}{SUFFIX}"
        found = there.get(name_key(file), [])
        if len(found) == 1 and normal_form(found[0]) == file:
            file = found[0]
            existing.append(f"{str(folder / file)!r}")
        elif found:
            clashes.append(f"{file!r} and {' and '.join(map(repr, found))} are one name to some systems")
        places[name] = folder / file
    if existing and not overwrite:
        raise OutputExistsError(
            f"{len(existing)} of {len(places)} files exist",
            problems=existing[:20],
            hint="pass --force to replace them",
        )
    if clashes:
        raise OutputExistsError(
            f"{str(folder)!r} has files of nearly the same names", problems=clashes[:20], hint="another folder"
        )
    for path in places.values():
        refuse_link(path)
    return places


def listed_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the plain ``*.safetensors`` files of a folder, unsorted, without links, hidden files and subfolders.

    Raises:
        MissingFileError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and entry.name[0] != "." and entry.is_file(follow_symlinks=False):
                    yield entry
    except OSError as error:
        raise MissingFileError(f"the folder {str(folder)!r} cannot be read: {error.strerror or error}") from error


def _adapter_files(files: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return the paths by their names in the pack."""
    paths = [Path(file) for file in files]
    if len(paths) == 1 and paths[0].is_dir():
        paths = [Path(entry.path) for entry in listed_files(paths[0])]
        paths = [path for path in paths if _is_adapter(tensorfile.read_header(path))]
    if not paths:
        raise ConfigError(
            "there is nothing to pack",
            hint="name a folder that holds adapters, or adapter files; other tools' after `loraio convert`",
        )
    stems = [normal_form(path.name.removesuffix(SUFFIX)) for path in paths]
    problems = [f"{stem!r}: {problem}" for stem in stems if (problem := name_problem(stem))]
    problems += dict.fromkeys(name_clashes(stems).values())
    if problems:
        raise ConfigError("names that a pack cannot hold", problems=problems)
    return dict(zip(stems, paths, strict=True))


def _is_adapter(header: Header) -> bool:
    return "targets" in (header.document() or {})


def _examined(path: Path) -> tuple[int, str]:
    """Return size and digest of a file that must be an adapter."""
    header = tensorfile.read_header(path)
    if not _is_adapter(header):
        raise FormatError(f"{str(path)!r} is not an adapter")
    read_metadata(header)
    return _copied(path, None)


def _copied(path: Path, output: BinaryIO | None) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if output is not None:
                    output.write(chunk)
    except FileNotFoundError:
        raise MissingFileError(f"{str(path)!r} does not exist") from None
    return size, digest.hexdigest()


def _header(members: Mapping[str, tuple[int, str]]) -> bytes:
    """Return the pack's header, laid out as the safetensors library does."""
    index = {name: sha256 for name, (_, sha256) in members.items()}
    document = {"format_version": PACK_VERSION, "pack": index}
    header: dict[str, object] = {"__metadata__": tensorfile.metadata_of(document, {}, None, where="the pack")}
    position = 0
    for name, (size, _) in members.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return integrity.seal(len(text).to_bytes(8, "little") + text, where="the pack")


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    try:
        return stamp_of(Path(path).stat())
    except OSError as error:
        raise MissingFileError(f"{os.fspath(path)!r} cannot be read: {error.strerror or error}") from error
