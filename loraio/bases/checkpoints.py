"""Base checkpoints: read, load and write them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.metadata import check_heads
from loraio.bases.receipts import Receipt, merged_entries, read_receipts
from loraio.errors import AdapterError, FormatError
from loraio.files import tensorfile
from loraio.files.pickles import PICKLE_SUFFIXES, read_pickle
from loraio.files.sharded import is_sharded, read_sharded_header
from loraio.files.tensorfile import Header, TensorInfo
from loraio.files.tensors import TORCH_DTYPES

FORMAT_VERSION = 2
"""Version of checkpoints that are written. Those of version 1, without digests of their tensors, are read too."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of wrappers: DDP, torch.compile, and trainers that keep the network in a field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCheckpoint:
    """The contents of a base checkpoint file.

    Attributes:
        path: the file; of a sharded checkpoint the index.
        state: the state dict, on the CPU.
        network: the network's name as the file states it; None for plain state dicts from elsewhere.
        network_args: the keyword options that the network is built with, as the file states them.
        heads: layers that have another number of outputs than the network is built with, and that number.
        document: the file's loraio metadata; empty for files from elsewhere.
        stripped: the prefix of every name in the file that was taken off: "module.", "module._orig_mod.".
        parts: the files of a sharded checkpoint; empty for others.
        digests: SHA-256 of each tensor's bytes under ``stripped`` and its name, if the file states it and it was
            compared with the tensor.
        model: the network's name as the caller gives it; only callers may name code of their own.
        model_args: the keyword options as the caller gives them.
    """

    path: Path
    state: Mapping[str, Tensor]
    network: str | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)
    stripped: str = ""
    parts: tuple[Path, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None
    model_args: Mapping[str, Any] | None = None

    def for_network(self, model: str | None, model_args: Mapping[str, Any] | None = None) -> BaseCheckpoint:
        """Return the checkpoint for the network that the caller names, in place of the one that the file states."""
        return replace(self, model=model, model_args=model_args)

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Receipts of the merges into it, in order, as far as the file states them.

        Raises:
            FormatError: the file has other entries than loraio writes.
        """
        return read_receipts(self.document, where=f"{str(self.path)!r}")

    @property
    def merged_exactly(self) -> bool:
        """True if the last merge into it, if any, summed exactly, as far as the file states."""
        return all(receipt.exact for receipt in self.receipts[-1:])


def read_base(path: str | os.PathLike[str]) -> BaseCheckpoint:
    """Read a base checkpoint: ours, or a plain state dict as safetensors, single or sharded, or as `.pt`.

    Files that end in .pt, .pth or .bin are read by ``torch.load(weights_only=True)``; a dict that holds the state
    dict under ``state_dict``, ``model_state_dict`` or ``model`` is unwrapped. A name that ends in
    .safetensors.index.json, or a folder that holds exactly one such file, is a sharded checkpoint. If all names of a
    file from elsewhere have one of `PREFIXES`, it is taken off; `fitted` puts it back if it belongs to the network.

    Raises:
        MissingFileError: no such file, or a shard is missing.
        FormatError: the file is no checkpoint, or is an adapter, or index and shards contradict each other.
    """
    path = Path(path)
    if is_pickle(path):
        return _without_prefix(BaseCheckpoint(path=path, state=read_pickle(path)))
    checkpoint, headers = _describe(path)
    tensors = {name: tensor for header in headers for name, tensor in tensorfile.read_tensors(header).items()}
    digests = {name: digest for header in headers for name, digest in (header.digests or {}).items()}
    return _without_prefix(replace(checkpoint, state={n: tensors[n] for n in checkpoint.state}, digests=digests))


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Return True if `read_base` reads a file with ``torch.load``, which reads all tensors at once."""
    return Path(path).suffix.lower() in PICKLE_SUFFIXES and not is_sharded(path)


def scan_base(path: str | os.PathLike[str]) -> tuple[BaseCheckpoint, tuple[Header, ...]]:
    """Read the headers of a safetensors file or of a sharded checkpoint, and none of the tensors.

    Returns:
        the checkpoint, with tensors on the meta device: the tensor ``name`` is in the files under ``stripped + name``;
        and the headers of its file, or of its shards.

    Raises:
        MissingFileError, FormatError: as `read_base`.
    """
    checkpoint, headers = _describe(Path(path))
    return _without_prefix(checkpoint), headers


def _describe(path: Path) -> tuple[BaseCheckpoint, tuple[Header, ...]]:
    """Read a checkpoint without values, under the names in the file."""
    if is_sharded(path):
        sharded = read_sharded_header(path)
        headers = tuple(sharded.headers.values())
        described = _without_values(sharded.index, sharded.tensors, sharded.document())
        return replace(described, parts=tuple(header.path for header in headers)), headers
    header = tensorfile.read_header(path)
    document = header.document() or {}
    if "targets" in document:
        raise FormatError(
            f"{str(path)!r} is an adapter, not a base model", hint="the base comes first, then the adapter"
        )
    if "residue" in document:
        raise FormatError(f"{str(path)!r} is the residue of a merge, not a base model", hint="loraio unmerge uses it")
    if not header.tensors:
        raise FormatError(f"{str(path)!r} holds no tensors")
    return _without_values(path, header.tensors, document), (header,)


def _without_values(path: Path, tensors: Mapping[str, TensorInfo], document: Mapping[str, Any]) -> BaseCheckpoint:
    where, state = f"{str(path)!r}", {}
    for name, info in tensors.items():
        if info.dtype not in TORCH_DTYPES:
            raise FormatError(f"{name!r} has dtype {info.dtype}, which cannot be read", where=where)
        state[name] = torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]), device="meta")
    return BaseCheckpoint(path=path, state=state, document=document, **_stated(document, where=where))


def _stated(document: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check the metadata of a base checkpoint; return the facts of its network."""
    version = document.get("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FormatError(
            f"format version {version!r}, this loraio reads versions up to {FORMAT_VERSION}",
            where=where,
            hint="a newer loraio",
        )
    network, args = document.get("network"), document.get("network_args", {})
    heads = document.get("heads", {})
    if network is not None and not isinstance(network, str):
        raise FormatError(f"the network is {network!r}, not a name", where=where)
    merged_entries(document, where=where)
    if not isinstance(args, dict):
        raise FormatError(f"the network's options are {args!r}, not an object", where=where)
    try:
        check_heads(heads, what="the network's heads")
    except AdapterError as error:
        raise FormatError(error.message, where=where) from error
    return {"network": network, "network_args": args, "heads": heads}


def _without_prefix(checkpoint: BaseCheckpoint) -> BaseCheckpoint:
    """Take off the prefix of all names; those of our own files have none."""
    state, stripped = checkpoint.state, ""
    while not checkpoint.document:
        shared = [prefix for prefix in PREFIXES if all(name.startswith(prefix) and name != prefix for name in state)]
        if not shared:
            break
        state = {name.removeprefix(shared[0]): tensor for name, tensor in state.items()}
        stripped += shared[0]
    return replace(checkpoint, state=state, stripped=stripped)


def fitted(checkpoint: BaseCheckpoint, names: Iterable[str]) -> BaseCheckpoint:
    """Put back as much of a checkpoint's prefix as the names ask for.

    A network may itself hold everything in a field named ``model``: then that prefix is its own.

    Args:
        checkpoint: from `read_base`.
        names: of a network's state dict, or of an adapter's targets.

    Returns:
        the checkpoint with the shortest names that include all of ``names``; the same checkpoint if none do.
    """
    wanted, rest, prefix = set(names), checkpoint.stripped, ""
    while not wanted <= {prefix + name for name in checkpoint.state}:
        if not rest:
            return checkpoint
        last = next(each for each in PREFIXES if rest.endswith(each))
        rest, prefix = rest.removesuffix(last), last + prefix
    return replace(checkpoint, state={prefix + name: each for name, each in checkpoint.state.items()}, stripped=rest)


def base_document(
    sha256: str,
    *,
    network: str | None,
    network_args: Mapping[str, Any] | None = None,
    heads: Mapping[str, int] | None = None,
    **entries: Any,
) -> dict[str, Any]:
    """Return the metadata of a base checkpoint whose state dict has this digest; ``entries`` are further keys."""
    document = {"format_version": FORMAT_VERSION, "sha256": sha256, **entries}
    if network is not None:
        document["network"] = network
        if network_args:
            document["network_args"] = dict(network_args)
    if heads:
        document["heads"] = dict(heads)
    return document
