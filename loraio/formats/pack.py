"""Many adapter files in one: a pack. Any of them is read without the others; `SPEC.md`, section 8, says it in words.

A pack is a safetensors file with one tensor of bytes for each adapter file, so that the strict reader of
`loraio.container` guards it too. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loraio import container
from loraio.container import METADATA_KEY, Header
from loraio.errors import ConfigError, FormatError, MissingFileError, OutputError, OutputExistsError
from loraio.firstbytes import open_file
from loraio.formats.native import read_metadata
from loraio.outputs import staged
from loraio.registry import lookup

PACK_VERSION = 1

SUFFIX = ".safetensors"
"""The ending of adapter files; what stands before it is the adapter's name."""

MAX_NAME_BYTES = 200
"""The longest name in UTF-8: with the ending, and what a temporary file adds, it must make a file name."""

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One adapter file in a pack: where its bytes are, counted from the pack's first, and their digest."""

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
    """What tells that a file was written to or replaced: device, inode, size and the time of the last write."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def name_problem(name: str) -> str | None:
    """What is wrong with a name, if anything: every name must make the same file name on every system.

    >>> name_problem("digit-7"), name_problem("a/b")
    (None, "it holds '/'")
    """
    if not name or name != name.strip() or name.startswith(".") or name.endswith("."):
        return "it is empty, or begins or ends with a space or dot"
    bad = next((c for c in name if c in '/\\:*?"<>|' or unicodedata.category(c) in container.HIDDEN), None)
    if bad is not None:
        return f"it holds {bad!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it has {len(name.encode())} bytes, at most {MAX_NAME_BYTES} make a file name everywhere"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode normal form C"
    return None


def name_key(name: str) -> str:
    """The same for names that differ in nothing but case and Unicode normal form, which are one on some systems.

    >>> name_key("Digit-7") == name_key("digit-7")
    True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def name_clashes(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that share their `name_key` with others, and what is wrong with each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_key(name), []).append(name)
    clashes = [group for group in groups.values() if len(group) > 1]
    said = [f"{' and '.join(map(repr, sorted(group)))} are one name to some systems" for group in clashes]
    return {name: text for group, text in zip(clashes, said, strict=True) for name in group}


# Reading


def is_pack(header: Header) -> bool:
    """Whether a safetensors file with this header is a pack, judged by content."""
    return "pack" in (header.document() or {})


def read_index(path: str | os.PathLike[str]) -> Pack:
    """The index of a pack; reads the header and nothing else.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is no pack, or its index contradicts itself.
    """
    stamp = _stamp(path)
    header = container.read_header(path)
    pack = check_index(header, stamp=stamp)
    if _stamp(path) != stamp:
        raise FormatError("the pack changed while its index was being read", where=f"{str(header.path)!r}")
    return pack


def check_index(header: Header, *, stamp: tuple[int, ...]) -> Pack:
    """The index in a pack's header.

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
    if type(version) is not int or version != PACK_VERSION:
        raise FormatError(f"pack version {version!r}, this loraio reads version {PACK_VERSION}", where=where)
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
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest)
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
    """The bytes of one adapter file, as they were before it was packed; no other member is read.

    Raises:
        UnknownNameError: no such member.
        MissingFileError: the pack cannot be read any more.
        FormatError: the pack was changed since its index was read, or the bytes are not those that were packed.
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
    """``size`` bytes of an open file from ``begin`` on; fewer where it ends before."""
    parts = []
    while size > 0 and (part := os.pread(descriptor, min(size, 1 << 30), begin)):
        parts.append(part)
        begin, size = begin + len(part), size - len(part)
    return b"".join(parts)


# Writing


def pack(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, overwrite: bool = False) -> Pack:
    """Put adapter files into one, byte by byte, each under its name without the ending.

    The same files always give the same pack, in whatever order they come.

    Args:
        files: adapter files, or one folder, whose adapters are taken and whose base models are passed over.
        output: the pack to make.
        overwrite: replace an existing file.

    Returns:
        the index of the pack.

    Raises:
        ConfigError: nothing to pack, or names that cannot stand together; all are listed.
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
    """Write members of a pack into a folder, each the file that it was, byte by byte.

    Args:
        packed: the pack.
        output: the folder; made where it is not there.
        names: of the members; all of them when empty.
        overwrite: replace existing files.

    Returns:
        the files.

    Raises:
        UnknownNameError: no such member; nothing was written.
        OutputExistsError: a file is there already; nothing was written.
        FormatError: a member is damaged; those before it are written.
        OutputError: the system refused to write.
    """
    index = read_index(packed)
    for name in names:
        lookup(index.members, name, what="adapter in the pack")
    folder = Path(output)
    targets = {name: folder / f"{name}{SUFFIX}" for name in dict.fromkeys(names or index.members)}
    existing = [f"{str(path)!r}" for path in targets.values() if os.path.lexists(path)]
    if existing and not overwrite:
        raise OutputExistsError(
            f"{len(existing)} of {len(targets)} files exist",
            problems=existing[:20],
            hint="pass --force to replace them",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be made: {error.strerror or error}") from error
    for name, path in targets.items():
        data = read_member(index, name)
        with staged(path, overwrite=overwrite, inputs=[packed]) as temporary:
            temporary.write_bytes(data)
    return list(targets.values())


def listed_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The plain ``*.safetensors`` files of a folder, unsorted; neither links, nor hidden files, nor what is deeper.

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
    """Paths by the names that they get in the pack."""
    paths = [Path(file) for file in files]
    if len(paths) == 1 and paths[0].is_dir():
        paths = [Path(entry.path) for entry in listed_files(paths[0])]
        paths = [path for path in paths if _is_adapter(container.read_header(path))]
    if not paths:
        raise ConfigError(
            "there is nothing to pack",
            hint="name a folder that holds adapters, or adapter files; other tools' after `loraio convert`",
        )
    stems = [unicodedata.normalize("NFC", path.name.removesuffix(SUFFIX)) for path in paths]
    problems = [f"{stem!r}: {problem}" for stem in stems if (problem := name_problem(stem))]
    problems += dict.fromkeys(name_clashes(stems).values())
    if problems:
        raise ConfigError("names that a pack cannot hold", problems=problems)
    return dict(zip(stems, paths, strict=True))


def _is_adapter(header: Header) -> bool:
    return "targets" in (header.document() or {})


def _examined(path: Path) -> tuple[int, str]:
    """Size and digest of a file that must be an adapter."""
    header = container.read_header(path)
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
    """The pack's header, laid out as the safetensors library lays one out."""
    index = {name: sha256 for name, (_, sha256) in members.items()}
    document = container.canonical_json({"format_version": PACK_VERSION, "pack": index})
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: document}}
    position = 0
    for name, (size, _) in members.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    try:
        return stamp_of(Path(path).stat())
    except OSError as error:
        raise MissingFileError(f"{os.fspath(path)!r} cannot be read: {error.strerror or error}") from error
