"""Models of base checkpoints: load the weights of a file into its network, and save a model as a base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from loraio.bases.checkpoints import BaseCheckpoint, base_document, fitted, read_base
from loraio.bases.identity import identity_of, state_sha256
from loraio.bases.networks import (
    NAME_FORMS,
    NETWORKS,
    build_network,
    heads_of,
    network_args_of,
    network_of,
    resize_heads,
)
from loraio.bases.own_code import refuse_own_code
from loraio.bases.receipts import Receipt
from loraio.errors import BaseMismatchError, LoraioError, StateError, UnknownNameError
from loraio.files import tensorfile
from loraio.files.tensors import tensor_bytes
from loraio.registry import known, nearest


def load_base(
    path: str | os.PathLike[str], *, model: str | None = None, model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Load a base checkpoint into its network, in eval mode, on the CPU.

    Args:
        path: our checkpoint, or a plain state dict; see `read_base`.
        model: the network's name, see `loraio.bases.networks.find_network`; needed only if the file has none.
        model_args: keyword options of the network, in place of the file's.

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
    digests = {name: checkpoint.digests[stated] for name, stated in names.items() if stated in checkpoint.digests}
    identity_of(network).learn(network.state_dict(), checkpoint.state, digests)
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
    try:
        resize_heads(network, checkpoint.heads)
    except UnknownNameError as error:
        raise BaseMismatchError(f"the checkpoint does not fit the network: {error.message}", where=where) from error
    return network


def stripped_of(model: nn.Module) -> str:
    """Return the prefix that `load_base` took off the names of the file; empty for other models."""
    stripped = getattr(model, "loraio_stripped", "")
    return stripped if isinstance(stripped, str) else ""


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Copy a state dict into a model, or change nothing; parameters take the dtype of the state dict.

    Raises:
        BaseMismatchError: with a line for each name that is missing, left over or of another shape.
    """
    tied = _tied(model)
    problems = _differences(model.state_dict(), state) or [
        f"{name!r} and {first!r} are one tensor in the network, and two here"
        for name, first in tied.items()
        if not tensor_bytes(state[name]).equal(tensor_bytes(state[first]))
    ]
    if problems:
        raise BaseMismatchError("the checkpoint does not fit the network", problems=problems, where=where)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    for name, first in tied.items():  # assign gives every name a tensor of its own
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, model.get_parameter(first))


def _tied(model: nn.Module) -> dict[str, str]:
    """Return each name of a parameter that is the same tensor as an earlier one, and the earlier one's name."""
    firsts: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first for name, tensor in names if (first := firsts.setdefault(id(tensor), name)) != name}


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each tensor of ``state`` that a network with the state dict ``own`` cannot take."""
    lines = [f"{name!r} is missing{nearest(name, state.keys() - own.keys())}" for name in own if name not in state]
    lines += [f"{name!r} is not in the network{nearest(name, own)}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        found, needed = state[name], own[name]
        if found.shape != needed.shape:
            lines.append(f"{name!r} is {tuple(found.shape)}, the network has {tuple(needed.shape)}")
        elif found.is_floating_point() != needed.is_floating_point():
            lines.append(f"{name!r} is {found.dtype}, the network has {needed.dtype}")
    return lines


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
        receipts: of the merges into it, in order: those of its file (`BaseCheckpoint.receipts`), and `loraio.receipt`.
            With them the bytes are those of `loraio.merge_file`, which states no training.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file is there already, or cannot be written.
        StateError: a weight is parametrized, by an attached adapter for example.
        BaseMismatchError: the model is no longer the network that it was built as.
    """
    state, heads = model.state_dict(), heads_of(model)
    parametrized = [name for name, module in model.named_modules() if isinstance(module, ParametrizationList)]
    if parametrized:
        raise StateError(f"{parametrized[0]!r}: a parametrized model is no base model", hint="live.detach() first")
    network, args = network_of(model), network_args_of(model)
    if network is not None:
        fresh = build_network(network, args=args, seed=0)
        resize_heads(fresh, heads)
        problems = _differences(fresh.state_dict(), state)
        if problems:
            raise BaseMismatchError(f"the model is no longer a {network!r}", problems=problems)
    entries: dict[str, Any] = {"merged": [one.document() for one in receipts]} if receipts else {"training": {}}
    if training:
        entries["training"] = training
    write_base(state, path, network=network, network_args=args, heads=heads, overwrite=overwrite, **entries)


def write_base(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    network: str | None,
    network_args: Mapping[str, Any] | None = None,
    heads: Mapping[str, int] | None = None,
    overwrite: bool = False,
    **entries: Any,
) -> None:
    """Write a state dict as a base checkpoint; arguments as `save_base` and `base_document`."""
    document = base_document(state_sha256(state), network=network, network_args=network_args, heads=heads, **entries)
    tensorfile.write(state, path, document=document, overwrite=overwrite)
