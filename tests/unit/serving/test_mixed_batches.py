"""Mixed batches: the same outputs as one by one, by either route, on every layer type and in odd networks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loraio
from loraio.errors import BaseMismatchError, ConfigError, ShapeError, StateError, UnknownNameError
from loraio.serving import convolutions, mixed_batches
from loraio.serving.layer_route import LayerRoute

TOLERANCE = 1e-5
"""Of the largest output: float32 sums of some hundred terms, in another order. The adapters' effect is over a tenth."""

NAMES = ["a", None, "b", "a", "c", "b", None, "c", "a", "b", "a", "c"]


def adapter_for(model: nn.Module, seed: int, *, targets: Sequence[str] = ("all",), **options: Any) -> loraio.Adapter:
    """Random factors with an effect that shows."""
    config = loraio.TrainConfig(targets=tuple(targets), seed=seed, clamp_rank=True, **options)
    plain = loraio.new_adapter(model, config)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: factor * 1.5
        if name.endswith("magnitude")
        else torch.randn(factor.shape, generator=generator) * 0.4 / factor.shape[1] ** 0.5
        for name, factor in plain.factors.items()
    }
    return replace(plain, factors=factors)


def bank_for(model: nn.Module, **options: Any) -> loraio.Bank:
    return loraio.Bank({name: adapter_for(model, seed, rank=seed + 1, **options) for seed, name in enumerate("abc")})


def one_by_one(
    model: nn.Module, bank: loraio.Bank, x: Tensor, names: Sequence[str | None], strengths: Sequence[float] = (1,) * 12
) -> list[Any]:
    """Run each sample alone, with its adapter attached."""
    found = []
    for row, name in enumerate(names):
        with torch.no_grad(), bank.attach(model, name, strengths[row]) if name else nullcontext():
            found.append(model(x[row : row + 1]))
    return found


def assert_mixed_is_one_by_one(
    model: nn.Module, bank: loraio.Bank, x: Tensor, names: Sequence[str | None] = NAMES
) -> None:
    expected = torch.cat(one_by_one(model, bank, x, names))
    with torch.no_grad():
        plain = model(x)
    largest = expected.abs().max()
    assert (expected - plain).abs().max() > 0.1 * largest, "the adapters do nothing"
    parameters = [*model.parameters()]
    for _ in range(2):  # the second time with everything resident
        found = bank.forward(model, x, names)
        assert (found - expected).abs().max() <= TOLERANCE * largest
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The route that each batch has taken to its end."""
    taken: list[str] = []

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def runs(*args: Any, **options: Any) -> Any:
            outputs = run(*args, **options)
            taken.append(name)
            return outputs

        return runs

    for name in ("layers", "groups"):
        monkeypatch.setattr(mixed_batches, f"run_{name}", noted(name, getattr(mixed_batches, f"run_{name}")))
    return taken


@pytest.fixture
def by_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Takes the layer route from now on wherever it can, or never."""
    return lambda layers: monkeypatch.setattr(mixed_batches, "takes_layers", lambda *_: layers)


class Convolutions(nn.Module):
    """Every convolution that the layer route knows, with other layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=8, padding="same", bias=False)
        self.c = nn.Conv2d(8, 12, (3, 1), stride=(2, 1), dilation=2, groups=4, padding_mode="circular", padding=2)
        self.norm = nn.BatchNorm2d(12)
        self.d = nn.Conv1d(12, 6, 3, stride=2)
        self.e = nn.Conv3d(1, 4, 2)
        self.f = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.c(F.hardswish(self.b(self.a(x))))))
        x = self.d(x.flatten(2))
        x = self.e(x.reshape(len(x), 1, 3, 2, -1)).sum((2, 3))
        x = self.f(x[:, :, :6])
        return x.flatten(1)


class Calls(nn.Module):
    """A network around one function, for odd uses of its layers."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def ready(model: nn.Module, seed: int = 1) -> nn.Module:
    """In eval mode, with weights and statistics of a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def samples(*shape: int) -> Tensor:
    return torch.randn(len(NAMES), *shape, generator=torch.Generator().manual_seed(0))


SPARED = [0, convolutions.SPARED_BYTES, 1 << 40]
"""No convolution as a product of matrices, those of the rule, all that can be."""


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("route", "spared", "reordered"),
    [("groups", 0, True), *(("layers", spared, reordered) for spared in SPARED for reordered in (True, False))],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_route_gives_what_one_by_one_gives(
    kind: str,
    route: str,
    spared: int,
    reordered: bool,
    layout: torch.memory_format,
    routes: list[str],
    by_layers: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if route == "groups":
        by_layers(False)
    monkeypatch.setattr(convolutions, "SPARED_BYTES", spared)
    if not reordered:
        monkeypatch.setattr(convolutions, "_HAS_REORDERING", False)
    model = ready(Convolutions())
    for layer in (model.a, model.b, model.c):
        layer.to(memory_format=layout)  # type: ignore[operator,union-attr]
    assert_mixed_is_one_by_one(model, bank_for(model, kind=kind), samples(2, 12, 5))
    assert routes == [route] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "padding", "stride", "dilation"),
    [((3, 3), [0, 0], [1, 1], [1, 1]), ((3, 2), [1, 2], [2, 1], [2, 3]), ((1, 1), [0, 0], [3, 2], [1, 1])],
)
def test_windows_are_what_unfold_copies_and_bounded(
    kernel: tuple[int, int], padding: list[int], stride: list[int], dilation: list[int], layout: torch.memory_format
) -> None:
    x, weight = samples(3, 7, 8).to(memory_format=layout), torch.ones(5, 3, *kernel)
    expected = F.unfold(x, kernel, dilation, padding, stride)
    size = expected.nbytes + len(x) * weight.nbytes
    found = convolutions._windows(x, weight, padding, stride, dilation, 1, most=size)
    assert found is not None
    assert found.reshape(expected.shape).equal(expected)
    assert convolutions._windows(x, weight, padding, stride, dilation, 1, most=size - 1) is None
    assert convolutions._windows(x, weight, padding, stride, dilation, 3, most=size) is None  # groups
    assert convolutions._windows(x[:, :, : kernel[0] - 1], weight, [0, 0], stride, dilation, 1, most=size) is None


def test_groups_compute_the_bits_of_the_attached_model(
    digits_test: loraio.Dataset, base: nn.Module, by_layers: Callable[[bool], None]
) -> None:
    by_layers(False)
    bank, x = bank_for(base), digits_test.images[:12]
    found = bank.forward(base, x, NAMES)
    for name in "abc":
        rows = [row for row, own in enumerate(NAMES) if own == name]
        with torch.no_grad(), bank.attach(base, name):
            assert found[rows].equal(base(x[rows]))


ODD: dict[str, tuple[nn.Module, Tensor]] = {
    "transposed": (Calls(lambda m, x: m.t(x).flatten(1), t=nn.ConvTranspose2d(3, 4, 3, groups=1)), samples(3, 4, 4)),
    "bilinear": (Calls(lambda m, x: m.b(x, x.flip(1)), b=nn.Bilinear(5, 5, 4)), samples(5)),
    "attention": (
        Calls(lambda m, x: m.a(x, x, x)[0].flatten(1), a=nn.MultiheadAttention(8, 2, batch_first=True)),
        samples(3, 8),
    ),
    "attention, sequence first, as long as the batch": (
        Calls(lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1).flatten(1), a=nn.MultiheadAttention(8, 2)),
        samples(len(NAMES), 8),
    ),
    "linear, sequence first, as long as the batch": (
        Calls(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1).flatten(1), a=nn.Linear(8, 4)),
        samples(len(NAMES), 8),
    ),
    "linear, samples in reverse": (Calls(lambda m, x: m.a(x.flip(0)).flip(0), a=nn.Linear(8, 4)), samples(8)),
    "embedding": (
        Calls(lambda m, x: m.e((x * 3).long().abs() % 7).flatten(1), e=nn.Embedding(7, 3)),
        samples(4),
    ),
    "windows": (Calls(lambda m, x: m.l(x.reshape(-1, 4)).reshape(len(x), -1), l=nn.Linear(4, 3)), samples(2, 4)),
    "a weight read apart": (Calls(lambda m, x: m.l(x) + x @ m.l.weight.T, l=nn.Linear(5, 5)), samples(5)),
    "a weight as keyword": (Calls(lambda m, x: F.linear(input=x, weight=m.l.weight), l=nn.Linear(5, 5)), samples(5)),
    "one sample without a batch": (
        Calls(lambda m, x: torch.stack([m.l(row) for row in x]), l=nn.Linear(5, 4)),
        samples(5),
    ),
    "two calls of one layer": (Calls(lambda m, x: m.l(F.relu(m.l(x))), l=nn.Linear(5, 5)), samples(5)),
    "a view after a convolution": (
        Calls(lambda m, x: m.l(m.c(x).view(len(x), -1)), c=nn.Conv2d(2, 3, 2), l=nn.Linear(12, 4)),
        samples(2, 3, 3),
    ),
    "a shape read from the weight": (
        Calls(lambda m, x: m.l(x) * m.l.weight.shape[0] + m.l.weight.size(1), l=nn.Linear(5, 5)),
        samples(5),
    ),
}
BY_LAYERS = {"two calls of one layer", "a view after a convolution", "a shape read from the weight"}


@pytest.mark.parametrize("name", ODD)
def test_every_layer_and_odd_use_is_right_and_the_layers_route_only_where_it_can_be(
    name: str, routes: list[str]
) -> None:
    model, x = ODD[name]
    assert_mixed_is_one_by_one(ready(model), bank_for(model), x)
    assert routes == ["layers" if name in BY_LAYERS else "groups"] * 2


def test_a_target_that_a_batch_does_not_use_sends_it_by_groups(routes: list[str]) -> None:
    model = ready(Calls(lambda m, x: m.l(x) if len(x) < 4 else m.k(x), l=nn.Linear(5, 4), k=nn.Linear(5, 4)))
    bank = bank_for(model)
    for _ in range(2):
        bank.forward(model, samples(5), NAMES)
    assert routes == ["groups"] * 2


def test_adapters_of_other_targets_ranks_alphas_kinds_and_strengths_share_a_batch(routes: list[str]) -> None:
    model, x = ready(Convolutions()), samples(2, 12, 5)
    bank = loraio.Bank(
        {
            "a": adapter_for(model, 1, targets=("a", "f"), rank=2, alpha=3),
            "b": adapter_for(model, 2, targets=("b", "c", "d"), rank=4, scale_rule="alpha/sqrt(r)"),
            "c": adapter_for(model, 3, targets=("e",), rank=1, kind="dora"),
        }
    )
    strengths = [1.0, 5, 0.5, -1, 2, 1, 0, 1, 1, 0.5, 1, 2]
    found = bank.forward(model, x, NAMES, strength=strengths)
    expected = torch.cat(one_by_one(model, bank, x, NAMES, strengths))
    assert torch.allclose(found, expected, atol=TOLERANCE * float(found.abs().max()))
    assert routes == ["layers"]


def test_outputs_may_be_dicts_tuples_and_lists(by_layers: Callable[[bool], None]) -> None:
    plain = ready(nn.Linear(5, 4))
    nested = Calls(lambda m, x: {"out": (m.l(x), [m.l(x) * 2])}, l=plain)
    x, bank = samples(5), bank_for(nested)
    expected = torch.cat([part["out"][0] for part in one_by_one(nested, bank, x, NAMES)])
    for layers in (True, False):
        by_layers(layers)
        found = bank.forward(nested.eval(), x, NAMES)
        assert torch.allclose(found["out"][0], expected, atol=1e-5)
        assert torch.allclose(found["out"][1][0], 2 * expected, atol=1e-5)


@pytest.mark.parametrize("output", [lambda m, x: "text", lambda m, x: m.l(x).sum(), lambda m, x: m.l(x)[:1]])
def test_outputs_without_a_row_for_each_sample_are_refused(
    output: Callable[..., Any], by_layers: Callable[[bool], None]
) -> None:
    model = Calls(output, l=nn.Linear(5, 4)).eval()
    bank = bank_for(model)
    by_layers(False)
    with pytest.raises(StateError, match=r"no row for each|gives a str"):
        bank.forward(model, samples(5), NAMES)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_of_every_size(count: int, base: nn.Module, digits_test: loraio.Dataset) -> None:
    bank, x = bank_for(base), digits_test.images[:count]
    for names in (NAMES[:count], [None] * count, ["b"] * count):
        expected = one_by_one(base, bank, x, names)
        found = bank.forward(base, x, names)
        assert found.shape == (count, 10)
        assert torch.allclose(found, torch.cat([*expected, found[:0]]), atol=1e-4)


def test_everything_is_looked_up_before_the_model_runs(base: nn.Module, digits_test: loraio.Dataset) -> None:
    ran: list[int] = []
    base.register_forward_hook(lambda *_: ran.append(1))
    x = digits_test.images[:2]
    bank = bank_for(base)
    other = copy.deepcopy(base)
    other.get_parameter("conv1.weight").data += 1
    foreign = loraio.Bank({"a": bank["a"], "z": adapter_for(other, 5)})
    cases: list[tuple[loraio.Bank, Sequence[str | None], Any, type[Exception], str]] = [
        (bank, ["a", "aa"], 1.0, UnknownNameError, "no adapter 'aa'"),
        (bank, ["a", "base"], 1.0, UnknownNameError, "no adapter 'base'"),  # a name like any other
        (bank, ["a"], 1.0, ShapeError, "1 names for samples"),
        (bank, "ab", 1.0, ShapeError, "one name for samples"),
        (bank, ["a", "b"], [1.0], ShapeError, "1 strengths for 2 samples"),
        (bank, ["a", "b"], float("nan"), ConfigError, "finite"),
        (foreign, ["a", "z"], 1.0, BaseMismatchError, "'conv1.weight'"),
    ]
    for which, names, strength, error, message in cases:
        with pytest.raises(error, match=message):
            which.forward(base, x, names, strength=strength)
    with bank.attach(base, "a"), pytest.raises(StateError, match="carries an adapter"):
        bank.forward(base, x, ["a", "b"])
    with pytest.raises(StateError, match="training mode"):
        bank.forward(base.train(), x, ["a", "b"])
    assert ran == []


def test_an_adapter_with_whole_tensors_is_refused(base: nn.Module, digits_test: loraio.Dataset) -> None:
    whole = loraio.new_adapter(base, loraio.TrainConfig(heads={"fc": 12}))
    with pytest.raises(ConfigError, match=r"'head' brings whole tensors[\s\S]*bank.swap"):
        loraio.Bank({"head": whole}).forward(base, digits_test.images[:1], ["head"])


def test_an_error_inside_the_model_leaves_it_as_it_was(
    base: nn.Module, digits_test: loraio.Dataset, by_layers: Callable[[bool], None]
) -> None:
    bank, x = bank_for(base), digits_test.images[:12]
    before = dict(base.named_parameters())
    for layers in (True, False):
        calls: list[int] = []

        def fail(*_: object, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("own")

        hook = base.fc.register_forward_hook(fail)  # type: ignore[union-attr,operator]
        by_layers(layers)
        with pytest.raises(KeyError, match="own"):
            bank.forward(base, x, NAMES)
        hook.remove()
        assert all(parameter is before[name] for name, parameter in base.named_parameters())
    expected = torch.cat(one_by_one(base, bank, x, NAMES))
    assert torch.allclose(bank.forward(base, x, NAMES), expected, atol=1e-4)


def test_a_base_that_was_changed_is_noticed_by_the_next_batch(base: nn.Module, digits_test: loraio.Dataset) -> None:
    bank, x = bank_for(base), digits_test.images[:12]
    changes: list[Callable[[Any], object]] = [
        lambda model: model.conv1.weight.detach().mul_(1.5),
        lambda model: setattr(model, "conv2", nn.Conv2d(32, 64, 3, stride=2, padding=1).eval()),
        lambda model: setattr(model.fc, "weight", nn.Parameter(model.fc.weight.detach() * 2)),
        lambda model: setattr(model.conv1.weight, "data", model.conv1.weight.data.transpose(2, 3)),
        lambda model: model.double(),
    ]
    for change in changes:
        model = copy.deepcopy(base)
        bank.forward(model, x, NAMES)
        change(model)
        with pytest.raises(BaseMismatchError):
            bank.forward(model, x, NAMES)
        plain = x.to(model.get_parameter("fc.bias").dtype)
        assert bank.forward(model, plain, [None] * 12).equal(model(plain).detach())


def test_a_bank_keeps_no_model_alive_that_its_own_modules_refer_to(
    base: nn.Module, digits_test: loraio.Dataset
) -> None:
    bank, model = bank_for(base), copy.deepcopy(base)
    model.fc.whole = [model]  # type: ignore[union-attr]
    before, gone = bank.resident_bytes, weakref.ref(model)
    bank.forward(model, digits_test.images[:12], NAMES)
    folded = bank.resident_bytes - before
    del model
    gc.collect()
    assert gone() is None
    assert folded > 0
    assert bank.resident_bytes == sum(tensor.nbytes for name in "abc" for tensor in bank[name].all_tensors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_right_and_half_precision_goes_by_groups(dtype: torch.dtype, routes: list[str]) -> None:
    model, x = ready(Convolutions()).to(dtype), samples(2, 12, 5).to(dtype)
    bank = bank_for(model)
    found, expected = bank.forward(model, x, NAMES), torch.cat(one_by_one(model, bank, x, NAMES))
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max() * 12
    assert routes == ["layers" if dtype == torch.float64 else "groups"]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_it_runs_inside_inference_mode_and_never_keeps_a_graph(
    context: Callable[[], Any], base: nn.Module, digits_test: loraio.Dataset
) -> None:
    bank, x = bank_for(base), digits_test.images[:12]
    with context():
        found = bank.forward(base, x, NAMES)
        assert not found.requires_grad
    assert torch.allclose(bank.forward(base, x, NAMES), found, atol=1e-5)
    assert torch.allclose(found, torch.cat(one_by_one(base, bank, x, NAMES)), atol=1e-4)


def test_the_cheaper_route_is_taken() -> None:
    """Largest input or output of a target against weights: the figures are digit-cnn's and resnet50's."""
    for row_bytes, weight_bytes, layers in (
        (25_088, 452_000, True),
        (3_211_264, 102_000_000, False),  # 224 pixels
        (262_144, 102_000_000, True),  # 64 pixels
    ):
        assert mixed_batches.takes_layers(LayerRoute(row_bytes, True), 64, weight_bytes) == layers
