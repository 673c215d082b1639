"""Base checkpoints: reading, loading and writing them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from loraio.adapter.metadata import check_heads
from loraio.bases.identity import identity_of, state_sha256
from loraio.bases.networks import (
    NAME_FORMS,
    NETWORKS,
    build_network,
    heads_of,
    network_args_of,
    network_of,
    refuse_own_code,
    resize_heads,
)
from loraio.bases.receipts import Receipt, read_receipts
from loraio.errors import AdapterError, BaseMismatchError, FormatError, LoraioError, StateError, UnknownNameError
from loraio.files import tensorfile
from loraio.files.pickles import PICKLE_SUFFIXES, read_pickle
from loraio.files.sharded import is_sharded, read_sharded_header
from loraio.files.tensorfile import Header, TensorInfo
from loraio.files.tensors import TORCH_DTYPES, tensor_bytes
from loraio.registry import known, nearest

FORMAT_VERSION = 2
"""Of checkpoints that are written; those of version 1, which have no digests of their tensors, are read too."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name: DDP, torch.compile, and trainers that keep the network in a field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCheckpoint:
    """What a base checkpoint file holds.

    Attributes:
        path: the file; of a parted checkpoint the index.
        state: the state dict, on the CPU.
        network: the network's name that the file states; None for plain state dicts from elsewhere.
        network_args: the keyword options that the network is built with, as the file states them.
        heads: layers of the network with another number of outputs than it is built with, and that number.
        document: the file's loraio metadata; empty for files from elsewhere.
        stripped: what stood before every name in the file and was taken off: "module.", "module._orig_mod.".
        parts: the files of a parted checkpoint; empty for others.
        digests: SHA-256 of each tensor's bytes under ``stripped`` and its name, where the file says it and the tensors
            were compared with it.
        model: the network's name as the caller gives it, who may also name code of his own.
        model_args: the options as the caller gives them.
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
        """What was merged into it, in order, as far as the file says.

        Raises:
            FormatError: the file says it in another way than loraio does.
        """
        return read_receipts(self.document, where=f"{str(self.path)!r}")

    @property
    def merged_exactly(self) -> bool:
        """Whether the last adapter that was merged into it, if any, was summed exactly, as far as the file says."""
        return all(receipt.exact for receipt in self.receipts[-1:])


def read_base(path: str | os.PathLike[str]) -> BaseCheckpoint:
    """Read a base checkpoint: ours, or a plain state dict as safetensors, single or parted, or as `.pt`.

    Files that end in .pt, .pth or .bin go through ``torch.load(weights_only=True)``; a dict that holds the state
    dict under ``state_dict``, ``model_state_dict`` or ``model`` is unwrapped. A name that ends in
    .safetensors.index.json, or a folder that holds exactly one such file, is a parted checkpoint. Where all names of a
    file from elsewhere have one of `PREFIXES`, it is taken off; `fitted` puts it back where it belongs to the network.

    Raises:
        MissingFileError: no such file, or no such part.
        FormatError: it is no checkpoint, or it is an adapter, or index and parts contradict each other.
    """
    path = Path(path)
    if is_pickle(path):
        return _without_prefix(BaseCheckpoint(path=path, state=read_pickle(path)))
    checkpoint, headers = _described(path)
    tensors = {name: tensor for header in headers for name, tensor in tensorfile.read_tensors(header).items()}
    digests = {name: digest for header in headers for name, digest in (header.digests or {}).items()}
    return _named(replace(checkpoint, state={name: tensors[name] for name in checkpoint.state}, digests=digests))


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether `read_base` reads it with ``torch.load``, which cannot read one tensor after the other."""
    return Path(path).suffix.lower() in PICKLE_SUFFIXES and not is_sharded(path)


def scan_base(path: str | os.PathLike[str]) -> tuple[BaseCheckpoint, tuple[Header, ...]]:
    """What `read_base` gives, from the headers alone, for a safetensors file or a parted checkpoint.

    Returns:
        the checkpoint, whose tensors are on the meta device and have no values: the tensor ``name`` is in the files
        under ``stripped + name``; and the headers of its file, or of its parts.

    Raises:
        MissingFileError, FormatError: as `read_base`.
    """
    checkpoint, headers = _described(Path(path))
    return _named(checkpoint), headers


def _described(path: Path) -> tuple[BaseCheckpoint, tuple[Header, ...]]:
    """A checkpoint without values, under the names in the file."""
    if is_sharded(path):
        parted = read_sharded_header(path)
        headers = tuple(parted.headers.values())
        state = {name: _without_values(name, info, parted.index) for name, info in parted.tensors.items()}
        document = parted.document()
        stated = _stated(document, where=f"{str(parted.index)!r}")
        parts = tuple(header.path for header in headers)
        return BaseCheckpoint(path=parted.index, state=state, document=document, parts=parts, **stated), headers
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
    stated = _stated(document, where=f"{str(path)!r}")
    state = {name: _without_values(name, info, path) for name, info in header.tensors.items()}
    return BaseCheckpoint(path=path, state=state, document=document, **stated), (header,)


def _without_values(name: str, info: TensorInfo, path: Path) -> Tensor:
    if info.dtype not in TORCH_DTYPES:
        raise FormatError(f"{name!r} has dtype {info.dtype}, which cannot be read", where=f"{str(path)!r}")
    return torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]), device="meta")


def _named(checkpoint: BaseCheckpoint) -> BaseCheckpoint:
    """Without a prefix, except that the names of our own files are as they must be."""
    return checkpoint if checkpoint.document else _without_prefix(checkpoint)


def load_base(
    path: str | os.PathLike[str], *, model: str | None = None, model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Load a base checkpoint into its network, in eval mode, on the CPU.

    Args:
        path: our checkpoint, or a plain state dict; see `read_base`.
        model: the network's name, see `loraio.bases.networks.find_network`; needed only if the file has none.
        model_args: keyword options of the network, in the place of the file's.

    Raises:
        MissingFileError, FormatError: as `read_base`.
        UnknownNameError: the file states no network and none was given, or there is none of that name.
        ConfigError: the network cannot be built, or only the file names code of the user's own.
        BaseMismatchError: names or shapes of the file are not those of the network; all differences are listed.
    """
    return model_from(read_base(path).for_network(model, model_args))


def model_from(checkpoint: BaseCheckpoint) -> nn.Module:
    """Build the network of a checkpoint with its weights, as `load_base`; of `scan_base`'s, read the weights first."""
    if any(tensor.is_meta for tensor in checkpoint.state.values()):
        checkpoint = read_base(checkpoint.path).for_network(checkpoint.model, checkpoint.model_args)
    network = network_for(checkpoint)
    checkpoint = fitted(checkpoint, network.state_dict())
    load_state(network, checkpoint.state, where=f"{str(checkpoint.path)!r}")
    names = {name: checkpoint.stripped + name for name in checkpoint.state}
    known = {name: checkpoint.digests[stated] for name, stated in names.items() if stated in checkpoint.digests}
    identity_of(network).learn(network.state_dict(), checkpoint.state, known)
    object.__setattr__(network, "loraio_stripped", checkpoint.stripped)
    return network


def network_for(checkpoint: BaseCheckpoint) -> nn.Module:
    """Build the network of a checkpoint with the weights of seed 0; errors as `load_base`.

    The file's own options belong to the network that the file names: they are not used for another ``model``.
    """
    where, model, model_args = f"{str(checkpoint.path)!r}", checkpoint.model, checkpoint.model_args
    if model is None and checkpoint.network is None:
        raise UnknownNameError(
            f"{where} does not say which network it is for",
            hint=f"--model NAME (model= in Python): {known(NETWORKS)}, or {NAME_FORMS}",
        )
    name = model or refuse_own_code(checkpoint.network or "", where=where)
    if model_args is None and name == checkpoint.network:
        model_args = checkpoint.network_args
    try:
        network = build_network(name, args=model_args, seed=0)
    except LoraioError as error:
        if model is not None:
            raise
        raise error.at(where) from error
    if checkpoint.heads:
        try:
            resize_heads(network, checkpoint.heads)
        except UnknownNameError as error:
            raise BaseMismatchError(f"the checkpoint does not fit the network: {error.message}", where=where) from error
    return network


def stripped_of(model: nn.Module) -> str:
    """What `load_base` took off the names of the file; empty for other models."""
    stripped = getattr(model, "loraio_stripped", "")
    return stripped if isinstance(stripped, str) else ""


def fitted(checkpoint: BaseCheckpoint, names: Iterable[str]) -> BaseCheckpoint:
    """The checkpoint with as much of its prefix put back as the names ask for.

    A network may itself keep everything in a field named ``model``; what looks like a wrapper's prefix is then its own.

    Args:
        checkpoint: from `read_base`.
        names: of a network's state dict, or of an adapter's targets.

    Returns:
        the checkpoint with the shortest names among which all of ``names`` are; as it was where there are none such.
    """
    wanted, rest, kept = set(names), checkpoint.stripped, ""
    while not wanted <= {kept + name for name in checkpoint.state}:
        if not rest:
            return checkpoint
        last = next(prefix for prefix in PREFIXES if rest.endswith(prefix))
        rest, kept = rest.removesuffix(last), last + kept
    return replace(checkpoint, state={kept + name: tensor for name, tensor in checkpoint.state.items()}, stripped=rest)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Copy a state dict into a model, or change nothing; parameters take the dtype of the state dict.

    Raises:
        BaseMismatchError: with a line for each name that is missing, left over or of another shape.
    """
    problems = _differences(model.state_dict(), state)
    if problems:
        raise BaseMismatchError("the checkpoint does not fit the network", problems=problems, where=where)
    tied = _tied(model)
    parted = [
        (name, first) for name, first in tied.items() if not tensor_bytes(state[name]).equal(tensor_bytes(state[first]))
    ]
    if parted:
        lines = [f"{name!r} and {first!r} are one tensor in the network, and two here" for name, first in parted]
        raise BaseMismatchError("the checkpoint does not fit the network", problems=lines, where=where)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    for name, first in tied.items():  # assign gives every name a tensor of its own
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, model.get_parameter(first))


def save_base(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    receipts: Sequence[Receipt] = (),
    overwrite: bool = False,
) -> None:
    """Write a model as a base checkpoint that names its network.

    Args:
        model: from `build_network` or `load_base`; other models are written without a network's name and options.
        path: the safetensors file to make.
        training: how it was trained, as plain JSON values.
        receipts: what was merged into it, in order: those of its file (`BaseCheckpoint.receipts`), and
            `loraio.receipt`. With them the bytes are those of `loraio.merge_file`, which says nothing of training.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file is there already, or cannot be written.
        StateError: a weight is parametrized, by an attached adapter for example.
        BaseMismatchError: the model is no longer the network whose name it carries.
    """
    state = model.state_dict()
    parametrized = [name for name, module in model.named_modules() if isinstance(module, ParametrizationList)]
    if parametrized:
        raise StateError(f"{parametrized[0]!r}: a parametrized model is no base model", hint="live.detach() first")
    network, args = network_of(model), network_args_of(model)
    if network is not None:
        fresh = build_network(network, args=args, seed=0)
        resize_heads(fresh, heads_of(model))
        problems = _differences(fresh.state_dict(), state)
        if problems:
            raise BaseMismatchError(f"the model is no longer a {network!r}", problems=problems)
    entries: dict[str, Any] = {"merged": [one.document() for one in receipts]} if receipts else {"training": {}}
    if training:
        entries["training"] = training
    write_base(
        state,
        path,
        network=network,
        network_args=args,
        heads=heads_of(model),
        overwrite=overwrite,
        **entries,
    )


def write_base(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    network: str | None,
    network_args: Mapping[str, Any] | None = None,
    heads: Mapping[str, int] | None = None,
    overwrite: bool = False,
    inputs: tuple[str | os.PathLike[str], ...] = (),
    check: Callable[[Path], None] | None = None,
    **entries: Any,
) -> None:
    """Write a state dict as a base checkpoint; `save_base` for callers without a model.

    Args:
        state: names and tensors.
        path: the safetensors file to make.
        network: the network's name, or None.
        network_args: the keyword options that it is built with, as plain JSON values.
        heads: its layers with another number of outputs.
        overwrite, inputs, check: as `loraio.files.tensorfile.write`.
        entries: further keys of the metadata, as plain JSON values.
    """
    document = base_document(state_sha256(state), network=network, network_args=network_args, heads=heads, **entries)
    tensorfile.write(state, path, document=document, overwrite=overwrite, inputs=inputs, check=check)


def base_document(
    sha256: str,
    *,
    network: str | None,
    network_args: Mapping[str, Any] | None = None,
    heads: Mapping[str, int] | None = None,
    **entries: Any,
) -> dict[str, Any]:
    """The metadata of a base checkpoint; arguments as `write_base`, and the digest of its state dict."""
    document = {"format_version": FORMAT_VERSION, "sha256": sha256, **entries}
    if network is not None:
        document["network"] = network
        if network_args:
            document["network_args"] = dict(network_args)
    if heads:
        document["heads"] = dict(heads)
    return document


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are the same tensor as an earlier one, and the name of that."""
    firsts: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first for name, tensor in names if (first := firsts.setdefault(id(tensor), name)) != name}


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor of ``state`` that a network with the state dict ``own`` cannot take."""
    lines = [f"{name!r} is missing{nearest(name, state.keys() - own.keys())}" for name in own if name not in state]
    lines += [f"{name!r} is not in the network{nearest(name, own)}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        found, needed = state[name], own[name]
        if found.shape != needed.shape:
            lines.append(f"{name!r} is {tuple(found.shape)}, the network has {tuple(needed.shape)}")
        elif found.is_floating_point() != needed.is_floating_point():
            lines.append(f"{name!r} is {found.dtype}, the network has {needed.dtype}")
    return lines


def _stated(document: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """What the metadata of a base checkpoint says of its network; everything in it is checked."""
    version = document.get("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FormatError(
            f"format version {version!r}, this loraio reads versions up to {FORMAT_VERSION}",
            where=where,
            hint="a newer loraio",
        )
    network = document.get("network")
    if network is not None and not isinstance(network, str):
        raise FormatError(f"the network is {network!r}, not a name", where=where)
    receipts = document.get("merged", [])
    if not isinstance(receipts, list) or not all(isinstance(receipt, dict) for receipt in receipts):
        raise FormatError(f"what was merged is {receipts!r}, not a list of objects", where=where)
    args = document.get("network_args", {})
    if not isinstance(args, dict):
        raise FormatError(f"the network's options are {args!r}, not an object", where=where)
    heads = document.get("heads", {})
    try:
        check_heads(heads, what="the network's heads")
    except AdapterError as error:
        raise FormatError(error.message, where=where) from error
    return {"network": network, "network_args": args, "heads": heads}


def _without_prefix(checkpoint: BaseCheckpoint) -> BaseCheckpoint:
    state, stripped = checkpoint.state, ""
    while True:
        shared = [prefix for prefix in PREFIXES if all(name.startswith(prefix) and name != prefix for name in state)]
        if not shared:
            return replace(checkpoint, state=state, stripped=stripped)
        state = {name.removeprefix(shared[0]): tensor for name, tensor in state.items()}
        stripped += shared[0]
