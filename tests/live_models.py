"""Help tests of live models: outputs, adapters, writes past the handle, threads, and comparisons of whole models."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import loraio
from loraio.files.tensors import tensor_bytes
from loraio.live.parametrization import FoldedWeight
from loraio.live.places import Place


def outputs(model: Any, x: Tensor) -> Tensor:
    """Run a pass without gradients, in the model's dtype."""
    with torch.no_grad():
        result: Tensor = model(x.to(next(model.parameters()).dtype))
    return result


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))


def adapter_for(model: nn.Module, *targets: str, seed: int = 1, **options: Any) -> loraio.Adapter:
    """Make an adapter with random factors, large enough to change every answer."""
    config = loraio.TrainConfig(**{"targets": targets or ("all",), "rank": 2, **options})
    fresh = loraio.new_adapter(model, config)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: factor * 1.25 if name.endswith("magnitude") else 0.25 * torch.randn(factor.shape, generator=generator)
        for name, factor in fresh.factors.items()
    }
    return replace(fresh, factors=factors)


def base_weight(model: nn.Module, name: str = "conv2") -> nn.Parameter:
    weight: nn.Parameter = model.get_submodule(name).parametrizations.weight.original  # type: ignore[assignment,union-attr]
    return weight


def write(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def step(model: nn.Module, *, fused: bool = False) -> None:
    """Make a step of an optimizer with all parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    model(torch.ones(1, 1, 28, 28)).sum().backward()
    optimizer.step()


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "write to a base weight": lambda model: write(base_weight(model)),
    "write to a factor": lambda model: write(next(model.conv2.parametrizations.buffers())),
    "load_state_dict": lambda model: model.load_state_dict({n: t * 1.5 for n, t in model.state_dict().items()}),
    "load_state_dict that assigns": lambda model: model.load_state_dict(
        {name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True
    ),
    "other memory": lambda model: setattr(base_weight(model), "data", base_weight(model).data * 1.5),
    "a cast and back": lambda model: model.half().float(),
    "a step of an optimizer": step,
    "a step of a fused optimizer": lambda model: step(model, fused=True),
}
"""Changes past the handle, each of which must be noticed."""


class Everything:
    """Every fact about a model that must be the same after detach."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        self.facts = self._facts()

    def _facts(self) -> list[Any]:
        modules = list(self.model.modules())
        flags = [(id(module), type(module), sorted(vars(module)), module.training) for module in modules]
        sizes = [getattr(module, "out_features", None) for module in modules]
        parameters = [
            (name, id(parameter), parameter.requires_grad, parameter.data_ptr(), parameter._version)
            for name, parameter in self.model.named_parameters()
        ]
        return [flags, sizes, parameters]

    def assert_same(self) -> None:
        now = self.model.state_dict(keep_vars=True)
        assert list(now) == list(self.state), "other keys, or another order"
        for name, (identity, tensor) in self.state.items():
            assert id(now[name]) == identity, name
            assert same_bits(now[name], tensor), name
        assert self._facts() == self.facts


class Passes:
    """Threads that run ``forward`` until the block ends. Collects each answer once."""

    def __init__(self, forward: Callable[[], Tensor], threads: int = 8) -> None:
        self.forward = forward
        self.answers: set[tuple[float, ...]] = set()
        self.errors: list[BaseException] = []
        self.counts = [0] * threads
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def _run(self, number: int) -> None:
        try:
            while not self._done.is_set():
                self.answers.add(answer(self.forward()))
                self.counts[number] += 1
        except BaseException as error:
            self.errors.append(error)
            raise

    def wait_for_some(self) -> None:
        """Wait until each thread has begun a pass and ended it."""
        goal = [count + 2 for count in self.counts]
        while any(map(int.__lt__, self.counts, goal)) and not self.errors:
            time.sleep(0)

    def __enter__(self) -> Passes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self.errors


def answer(output: Tensor) -> tuple[float, ...]:
    return tuple(output.flatten().tolist())


COMPILED = {"rtol": 1e-5, "atol": 1e-4}
"""Compiled kernels sum float32 in another order than eager ones; logits are up to 100."""


def adapted_state(live: loraio.Attachment) -> dict[str, Tensor]:
    """Merge the adapter into the base, as both are now."""
    state = loraio.base_state_dict(live.model)
    return loraio.merge(state, live.adapter, live.strength, allow_base_mismatch=True) if live.enabled else state


def places(live: loraio.Attachment) -> dict[str, Place]:
    return live._places


def merged_outputs(live: loraio.Attachment, x: Tensor) -> Tensor:
    """Return the outputs of a plain digit-cnn with `adapted_state`."""
    other = loraio.build_network("digit-cnn").to(next(live.model.parameters()).dtype)
    other.load_state_dict(adapted_state(live), assign=True)
    return outputs(other, x)


def assert_fresh(compiled: Any, live: loraio.Attachment, x: Tensor) -> Tensor:
    """Compare a compiled model with the eager one and with the merged bits; return its outputs."""
    found = outputs(compiled, x)
    torch.testing.assert_close(found, outputs(live.model, x), **COMPILED)
    state = adapted_state(live)
    for name, place in places(live).items():
        assert isinstance(place.part, FoldedWeight)
        assert place.part.slot is not None
        assert same_bits(place.part.slot.tensor, state[name]), name
    torch.testing.assert_close(found, merged_outputs(live, x), **COMPILED)
    return found


def assert_threads_see_one_strength_or_the_other(model: Any, live: loraio.Attachment, x: Tensor) -> None:
    allowed = []
    for strength in (0.5, 1.0):
        live.strength = strength
        allowed.append(outputs(model, x))
    assert not allowed[0].equal(allowed[1])
    with Passes(lambda: outputs(model, x), 4) as passes:
        for number in range(200):
            live.strength = (0.5, 1.0)[number % 2]
            outputs(model, x)
    assert passes.answers <= {*map(answer, allowed)}


needs_cpp = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
INDUCTOR = pytest.param("inductor", marks=[needs_cpp, pytest.mark.slow])


def adapters_of_every_form(model: nn.Module, kind: str = "lora") -> list[loraio.Adapter]:
    """Make adapters that differ in rank, alpha, scale rule and targets."""
    forms: list[tuple[str, int, float, tuple[str, ...]]] = [
        ("alpha/r", 1, 3, ("conv1",)),
        ("alpha/sqrt(r)", 4, 6.5, ("conv",)),
        ("alpha/r", 8, 2, ("conv2", "fc")),
        ("alpha/r", 3, 9, ("all",)),
        ("alpha/sqrt(r)", 5, 0.5, ("fc",)),
    ]
    return [adapter_for(model, *on, seed=r, kind=kind, rank=r, alpha=a, scale_rule=rule) for rule, r, a, on in forms]


def compiled_once(model: nn.Module, backend: str = "eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


class Attentive(nn.Module):
    """A module with several weights of its own and a submodule behind them, in front of normalisation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        result: Tensor = self.head(self.norm(attended.mean(1)))
        return result


def one_layer() -> tuple[nn.Module, Tensor]:
    """Make a frozen model of one convolution, and an input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3)).requires_grad_(False), torch.randn(2, 4, 6, 6)


def graph_names(functions: Any) -> Iterator[str]:
    """Yield the names of the functions of a graph."""
    seen, left = set(), [functions]
    while left:
        function = left.pop()
        if function is not None and function not in seen:
            seen.add(function)
            yield type(function).__name__
            left += [parent for parent, _ in function.next_functions]


def is_cheap(result: Tensor) -> bool:
    """Return True if a result came from a training step of our own."""
    assert result.grad_fn is not None
    return any(name in ("ConvolutionBackward", "ProjectionBackward") for name in graph_names(result.grad_fn))
