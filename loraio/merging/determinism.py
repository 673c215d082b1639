"""Find the layer that makes a network give two answers for one input.

Some kernels do. On CPUs with AMX, a bfloat16 Conv3d of some shapes reads memory that nobody wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraio.files.tensors import tensor_bytes

ATTEMPTS = 3
"""Searches for the layer: by chance, both runs of one of them may agree."""

SCRIBBLES = tuple(1 << power for power in range(6, 23, 2))
"""Lengths of the float32 tensors that are filled with noise: 256 bytes to 16 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NondeterministicLayer:
    """A layer that gave two answers for one input.

    Attributes:
        name: dotted name in the network; empty if only the network itself can be to blame.
        type: name of the layer's class.
    """

    name: str
    type: str

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.type})" if self.name else f"the network itself ({self.type})"


def scribble(device: torch.device | None = None) -> None:
    """Leave noise in freed memory, so that a kernel that reads it gives another answer."""
    noise = [torch.full((length,), 1e9 + number, device=device) for number, length in enumerate(SCRIBBLES)]
    del noise


def find_nondeterministic(network: nn.Module, run: Callable[[], object]) -> NondeterministicLayer:
    """Return the first layer with the same inputs and other outputs in a second run.

    Layers are compared in the order in which they finish, innermost first. A layer whose inputs already differ is not
    to blame. If no layer differs in `ATTEMPTS` searches, the network itself is returned. ``run`` must be a forward
    pass of the network, always on the same inputs.
    """
    for _ in range(ATTEMPTS):
        before = _calls(network, run)
        scribble()
        for (name, inputs, outputs), now in zip(before, _calls(network, run), strict=False):
            if (name, inputs) == now[:2] and outputs != now[2]:
                return NondeterministicLayer(name=name, type=type(network.get_submodule(name)).__name__)
    return NondeterministicLayer(name="", type=type(network).__name__)


def _calls(network: nn.Module, run: Callable[[], object]) -> list[tuple[str, str, str]]:
    """Return name, digest of inputs and digest of outputs of each module call, in the order in which calls end."""
    calls: list[tuple[str, str, str]] = []
    running: list[str] = []  # digests of inputs: a module may overwrite them

    def enter(_: nn.Module, words: Any, options: Any) -> None:
        running.append(_digest((words, options)))

    def leave(name: str, _: nn.Module, _inputs: Any, outputs: Any) -> None:
        calls.append((name, running.pop(), _digest(outputs)))

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _digest(value: Any) -> str:
    whole = hashlib.sha256()
    for tensor in _tensors(value):
        whole.update(tensor_bytes(tensor).numpy().data)
    return whole.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
