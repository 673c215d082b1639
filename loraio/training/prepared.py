"""A training step that is laid out once and run many times: forward and backward, without modules and autograd between.

A network is traced into its calls. A convolution with an adapter computes in the blocks of channels in which oneDNN's
kernels work: its input is brought into them once for the forward pass and both factors' gradients, and the gradient
that goes back comes out of them by oneDNN's own copy. Rectifiers go along. Every other call is what it was, with an
autograd of its own. The kernels, and the order in which they sum, are those of the ordinary step: so are the bits, and
`PreparedStep.agrees` looks whether they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from loraio.backward import FORWARDS, Geometry, Pair, convolution_gradients

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of torch whose modules are traced into; all others of torch are called as a whole."""

RECTIFIERS = (F.relu, torch.relu, "relu")
"""Functions and methods that are `torch.nn.ReLU`."""

IN_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul}
"""What is called instead of an operator that writes to its first operand, which would change what is kept here."""


class _Blocked(Geometry):
    """A convolution whose input is in oneDNN's blocks; all else comes and goes as ordinary tensors."""

    def blocks(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, in blocks."""
        sizes = self.padding, self.stride, self.dilation, self.groups
        result: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, *sizes)
        return result

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution."""
        return self.blocks(x, weight, bias).to_dense()

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input; of the input only the shape counts.

        oneDNN's kernel writes channels last. Told to leave it so, torch does not copy it point by point.
        """
        like = torch.empty(x.shape, memory_format=torch.channels_last)
        return self._gradients(grad, like, weight, (True, False, False))[0].contiguous()

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight; of the weight only the shape counts."""
        return _plain(self._gradients(grad, x, weight, (False, True, False))[1])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


class _Value:
    """A tensor between two calls, in whichever of its forms was asked for, and its gradient.

    Attributes:
        needed: whether a gradient has to go through it.
        gradient: the sum of those that came so far; ordinary form.
    """

    def __init__(self, *, plain: Tensor | None = None, blocks: Tensor | None = None, needed: bool) -> None:
        self._plain, self._blocks = plain, blocks
        self.needed = needed
        self.gradient: Tensor | None = None

    @property
    def plain(self) -> Tensor:
        """As an ordinary tensor."""
        if self._plain is None:
            assert self._blocks is not None
            self._plain = self._blocks.to_dense()
        return self._plain

    @property
    def blocks(self) -> Tensor:
        """In oneDNN's blocks."""
        if self._blocks is None:
            assert self._plain is not None
            self._blocks = self._plain.to_mkldnn()
        return self._blocks

    @property
    def in_blocks(self) -> bool:
        """Whether it came in blocks."""
        return self._blocks is not None

    def add(self, gradient: Tensor | None) -> None:
        """Add to the gradient, if one is needed."""
        if self.needed and gradient is not None:
            self.gradient = gradient if self.gradient is None else self.gradient + gradient


Values = dict[fx.Node, Any]
"""What each call gave: a `_Value`, or something that is no tensor."""

Gradients = dict[nn.Parameter, Tensor]


class _Call(Protocol):
    """One call of the network."""

    def forward(self, values: Values) -> None:
        """Put the result among the values."""
        ...

    def backward(self, values: Values, gradients: Gradients) -> None:
        """Add to the gradients of what it was called with, and of its parameters."""
        ...


class _Convolution:
    """A convolution with an adapter that is trained."""

    def __init__(self, node: fx.Node, module: Any) -> None:
        self._node = node
        (self._source,) = node.all_input_nodes
        self._module = module
        self._geometry = _Blocked(module.stride, module.padding, module.dilation, module.groups)
        weight = module.parametrizations["weight"].original.detach()
        self._channels_last = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether it is such a convolution, of the kind that gains by it."""
        return (
            isinstance(module, nn.Conv2d)
            and getattr(type(module), "forward", None) is FORWARDS[nn.Conv2d.forward]
            and "parametrizations" in module._modules
            and list(module.parametrizations) == ["weight"]  # type: ignore[arg-type]
            and module.parametrizations["weight"].original.dtype == torch.float32  # type: ignore[index,union-attr]
            and module.padding_mode == "zeros"
            and isinstance(module.padding, tuple)
            and module.groups == 1
            and module.kernel_size != (1, 1)
            and torch.backends.mkldnn.is_available()
        )

    def forward(self, values: Values) -> None:
        stack = self._module.parametrizations["weight"]
        part = stack[0]
        pair = Pair(stack.original, part.lora_A, part.lora_B, part.target.scale * part.strength)
        self._pair = pair
        x = values[self._source].blocks
        blocks = self._geometry.blocks(x, pair.fold(torch.float32), self._module.bias)
        values[self._node] = _Value(blocks=blocks, needed=True)

    def backward(self, values: Values, gradients: Gradients) -> None:
        x, grad = values[self._source], values[self._node].gradient
        if grad is None:
            return
        folded = self._folded_last() if x.needed else None
        grad_x, grad_A, grad_B = convolution_gradients(self._pair, self._geometry, grad, x.blocks, folded)
        x.add(grad_x)
        for factor, gradient in ((self._pair.lora_A, grad_A), (self._pair.lora_B, grad_B)):
            _collect(gradients, factor, gradient)

    def _folded_last(self) -> Tensor:
        """The folded weight channels last, as the input's gradient takes it; to fold anew is less than to copy."""
        pair, (out, channels, *kernel) = self._pair, self._pair.weight.shape
        lora_A = pair.lora_A.view(-1, channels, *kernel).permute(0, 2, 3, 1).flatten(1)
        folded: Tensor = self._channels_last.addmm(pair.lora_B, lora_A, alpha=pair.scale)
        return folded.view(out, *kernel, channels).permute(0, 3, 1, 2)


class _Rectifier:
    """A rectifier, in the form in which its input comes."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        (self._source,) = node.all_input_nodes
        self._alone = len(self._source.users) == 1

    def forward(self, values: Values) -> None:
        x = values[self._source]
        if x.in_blocks:
            rectified = torch.relu_(x.blocks) if self._alone else torch.relu(x.blocks)
            values[self._node] = _Value(blocks=rectified, needed=x.needed)
        else:
            values[self._node] = _Value(plain=torch.relu(x.plain), needed=x.needed)

    def backward(self, values: Values, gradients: Gradients) -> None:
        x, y = values[self._source], values[self._node]
        if x.needed and y.gradient is not None:
            x.add(torch.ops.aten.threshold_backward(y.gradient, y.plain, 0))


class _Other:
    """Any other call, with an autograd of its own."""

    def __init__(self, node: fx.Node, function: Callable[..., Any], module: nn.Module | None) -> None:
        self._node = node
        self._function = function
        self._module = module

    def forward(self, values: Values) -> None:
        self._inputs: dict[fx.Node, Tensor] = {}
        arguments = fx.node.map_arg((self._node.args, dict(self._node.kwargs)), lambda node: self._input(node, values))
        self._parameters = [] if self._module is None else [p for p in self._module.parameters() if p.requires_grad]
        with torch.enable_grad():
            self._result = self._function(*arguments[0], **arguments[1])
        if isinstance(self._result, Tensor):
            values[self._node] = _Value(plain=self._result.detach(), needed=self._result.requires_grad)
        else:
            values[self._node] = self._result

    def _input(self, node: fx.Node, values: Values) -> Any:
        value = values[node]
        if not isinstance(value, _Value):
            return value
        if node not in self._inputs:
            self._inputs[node] = value.plain.detach().requires_grad_(value.needed)
        return self._inputs[node]

    def backward(self, values: Values, gradients: Gradients) -> None:
        value = values[self._node]
        if not isinstance(value, _Value) or value.gradient is None:
            return
        asked = {node: tensor for node, tensor in self._inputs.items() if tensor.requires_grad}
        sources = [*asked.values(), *self._parameters]
        found = torch.autograd.grad(self._result, sources, value.gradient, allow_unused=True)
        for node, gradient in zip(asked, found, strict=False):
            values[node].add(gradient)
        for parameter, gradient in zip(self._parameters, found[len(asked) :], strict=True):
            _collect(gradients, parameter, gradient)


def _collect(gradients: Gradients, parameter: Any, gradient: Tensor | None) -> None:
    if gradient is not None:  # contiguous: a fused optimizer goes through memory and not by strides
        known = gradients.get(parameter)
        gradients[parameter] = gradient.contiguous() if known is None else known + gradient


class _Tracer(fx.Tracer):
    """Calls torch's own layers as a whole, parametrized and frozen ones too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = next(cls for cls in type(m).__mro__ if cls.__module__.startswith("torch.nn.modules"))
        return own not in CONTAINERS


class Batch(NamedTuple):
    """Images and labels, on the model's device and the images in its dtype."""

    images: Tensor
    labels: Tensor


class PreparedStep:
    """Loss and gradients of a network with an adapter that is attached for training, on a CPU.

    What parameters the network has when it is called counts, not what it had when this was made.

    Args:
        model: in the mode in which it is trained.
        blocked: whether convolutions compute in oneDNN's blocks. torch itself does so for all but the smallest.

    Raises:
        Exception: of any class, where it cannot be traced: its forward method looks at values, or does what torch.fx
            does not follow.
    """

    def __init__(self, model: nn.Module, *, blocked: bool = True) -> None:
        graph = _Tracer().trace(model)
        self._calls: list[_Call] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self._entry = node
            elif node.op == "output":
                (self._exit,) = node.all_input_nodes
            else:
                self._calls.append(_call_of(node, model, blocked))

    def __call__(self, batches: Sequence[Batch]) -> tuple[Tensor, Gradients]:
        """Mean loss over batches, and its gradients.

        Args:
            batches: of one optimizer step.

        Returns:
            the loss, and the gradient of each parameter that is trained.
        """
        loss = torch.zeros(())
        total: Gradients = {}
        for images, labels in batches:
            values: Values = {self._entry: _Value(plain=images, needed=False)}
            gradients: Gradients = {}
            with torch.no_grad():
                for call in self._calls:
                    call.forward(values)
                end = values[self._exit]
                outputs = end.plain.detach().requires_grad_()
                with torch.enable_grad():
                    part = F.cross_entropy(outputs, labels)
                    part = part / len(batches) if len(batches) > 1 else part
                end.add(*torch.autograd.grad(part, [outputs]))
                for call in reversed(self._calls):
                    call.backward(values, gradients)
            loss = loss + part.detach()
            for parameter, gradient in gradients.items():
                _collect(total, parameter, gradient)
        return loss, total

    def agrees(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch) -> bool:
        """Whether loss and all gradients have the bits of the ordinary step.

        Factors are random meanwhile, since nothing goes through those that are zero.

        Args:
            model: the one that was traced.
            parameters: what is trained.
            batch: like those that will follow.
        """
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            with torch.random.fork_rng(devices=[]):
                loss, found = self([batch])
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                expected = F.cross_entropy(model(batch.images), batch.labels)
                gradients = torch.autograd.grad(expected, list(parameters.values()))
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
        pairs = zip(parameters.values(), gradients, strict=True)
        return len(found) == len(parameters) and all(
            own is not None and own.equal(other)
            for own, other in [(loss, expected), *((found.get(parameter), other) for parameter, other in pairs)]
        )


def _call_of(node: fx.Node, model: nn.Module, blocked: bool) -> _Call:
    """How a call of the traced network is made here."""
    target: Any = node.target
    if node.op == "call_module":
        module = model.get_submodule(target)
        if blocked and _Convolution.takes(module):
            return _Convolution(node, module)
        return _Rectifier(node) if type(module) is nn.ReLU else _Other(node, module, module)
    if target in RECTIFIERS:
        return _Rectifier(node)
    if node.op == "call_method":
        return _Other(node, lambda owner, *args, **options: getattr(owner, target)(*args, **options), None)
    if node.op == "get_attr":
        return _Other(node, lambda: operator.attrgetter(target)(model), None)
    return _Other(node, IN_PLACE.get(target, target), None)
