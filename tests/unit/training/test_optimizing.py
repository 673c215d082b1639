"""Options of the training loop: warm-up, decay, accumulation, clipping, LoRA+, mixed precision, compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.errors import ConfigError, TrainingError
from loraio.training import optimizing
from loraio.training.optimizing import Moment, Optimization, Plan, optimize


def plan(*, steps: int = 10, on_progress: Any = None, **settings: Any) -> Plan:
    config = loraio.TrainConfig(**{"lr": 0.1, **settings})
    return Plan(settings=config, steps=steps, label="x", on_progress=on_progress)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def run(
    model: nn.Module, batches: Iterable[Tensor], dataset: loraio.Dataset, plan: Plan, *observers: Any
) -> Optimization:
    return optimize(model, dict(model.named_parameters()), batches, dataset, plan, observers=observers)


def trained(base: nn.Module, few: loraio.Dataset, **settings: Any) -> loraio.Adapter:
    return loraio.train(base, loraio.TrainConfig(**{"digit": 3, "steps": 3, "batch_size": 8, **settings}), few)


def test_the_warm_up_rises_evenly_and_the_schedule_covers_the_rest() -> None:
    assert [plan().rate(done) for done in range(10)] == [1.0] * 10
    cosine = [plan(schedule="cosine").rate(done) for done in range(10)]
    assert cosine == [optimizing.SCHEDULES["cosine"](done / 10) for done in range(10)]
    rates = [plan(warmup=4, schedule="cosine").rate(done) for done in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    with pytest.raises(ConfigError, match="a warm-up of 10 steps leaves nothing of a run of 10"):
        plan(warmup=10)


def test_the_optimizer_uses_the_rate_that_is_logged(few: loraio.Dataset) -> None:
    seen: list[tuple[float, float]] = []

    def look(run: Optimization, moment: Moment) -> bool:
        seen.append((run.optimizer.param_groups[0]["lr"], moment.lr))
        return False

    run(linear(), torch.arange(40).split(8), few, plan(steps=5, warmup=2), look)
    assert seen == [(0.05, 0.05), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1)]


def test_progress_is_reported_every_hundred_steps(few: loraio.Dataset) -> None:
    reports: list[loraio.Progress] = []
    batches = torch.arange(120).repeat(23).split(12)
    run(linear(), batches, few, plan(steps=230, lr=1e-3, on_progress=reports.append))
    assert [report.step for report in reports] == [100, 200, 230]
    assert reports[0].loss > reports[1].loss > reports[2].loss > 0


def groups(**settings: Any) -> dict[str, dict[str, float]]:
    """The optimizer's group of each parameter, by name."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in
                  {"w.lora_A": (2, 3), "w.lora_B": (4, 2), "w.magnitude": (4,)}.items()}  # fmt: skip
    run = Optimization(parameters, plan(**settings), torch.device("cpu"))
    where = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    return {name: where[id(parameter)] for name, parameter in parameters.items()}


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    found = groups(lora_plus=16)
    assert {name: group["lr"] for name, group in found.items()} == {
        "w.lora_A": 0.1, "w.lora_B": pytest.approx(1.6), "w.magnitude": 0.1,
    }  # fmt: skip
    assert len({id(group) for group in groups().values()}) == 1


def test_lora_plus_moves_b_further_and_warm_up_scales_both(base: nn.Module, few: loraio.Dataset) -> None:
    plain, plus = (trained(copy.deepcopy(base), few, lora_plus=ratio, steps=2) for ratio in (1, 8))
    for name, factor in plain.factors.items():
        if name.endswith("lora_B"):
            assert float(plus.factors[name].norm()) > 3 * float(factor.norm())


def test_weights_decay_apart_from_the_gradient_and_vectors_do_not() -> None:
    found = groups(weight_decay=0.1)
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "w.lora_A": 0.1, "w.lora_B": 0.1, "w.magnitude": 0.0,
    }  # fmt: skip
    parameter = nn.Parameter(torch.ones(2, 2))
    run = Optimization({"w.lora_A": parameter}, plan(weight_decay=0.5), torch.device("cpu"))
    assert isinstance(run.optimizer, torch.optim.AdamW)
    parameter.grad = torch.zeros(2, 2)
    run.optimizer.step()
    assert parameter.unique().tolist() == [pytest.approx(1 - 0.1 * 0.5)]  # lr * decay, and nothing else


def test_accumulated_batches_are_one_large_batch(few: loraio.Dataset) -> None:
    gradients = []
    for accumulate, size in ((1, 32), (4, 8)):
        model = linear().double()
        run(model, torch.arange(32).split(size), few, plan(steps=1, accumulate=accumulate, lr=1e-9))
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-9, atol=1e-12)


def test_steps_are_optimizer_steps_when_batches_are_accumulated(base: nn.Module, few: loraio.Dataset) -> None:
    reports: list[loraio.Progress] = []
    config = loraio.TrainConfig(digit=3, accumulate=3, batch_size=8)
    adapter = loraio.train(base, config, few, on_progress=reports.append)
    assert adapter.training["steps"] == 5  # 120 images in batches of 8, three at a time
    assert reports[-1].steps == 5
    assert adapter.training["hyperparameters"]["accumulate"] == 3


def test_gradients_are_clipped_to_the_norm(few: loraio.Dataset) -> None:
    norms = []

    def look(run: Optimization, moment: Moment) -> bool:
        parts = [p.grad.norm() for p in run.parameters.values() if p.grad is not None]
        norms.append(float(torch.stack(parts).norm()))
        return False

    for clip in (None, 1e-3):
        run(linear(), torch.arange(24).split(8), few, plan(steps=3, clip_norm=clip), look)
    assert min(norms[:3]) > 1e-2
    assert norms[3:] == [pytest.approx(1e-3, rel=1e-2)] * 3


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_factors(base: nn.Module, few: loraio.Dataset) -> None:
    seen = []
    hook = base.get_submodule("conv2").register_forward_hook(
        lambda module, args, output: seen.append((module.training, output.dtype))
    )
    adapter = trained(base, few, amp="bf16")
    hook.remove()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}  # results are counted as used
    assert {factor.dtype for factor in adapter.factors.values()} == {torch.float32}
    assert adapter.training["hyperparameters"]["amp"] == "bf16"
    with pytest.raises(ConfigError, match="fp16 mixed precision is for CUDA, the model is on cpu"):
        trained(base, few, amp="fp16")


def test_compilation_goes_through_the_same_graph(few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    plain, compiled = (trained(linear(), few, targets=("all",), compile=way) for way in (False, True))
    for name, factor in plain.factors.items():
        torch.testing.assert_close(compiled.factors[name], factor)
    assert compiled.training["hyperparameters"]["compile"] is True


def test_a_machine_without_a_compiler_is_told_so(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler found")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=broken))
    with pytest.raises(TrainingError, match=r"torch\.compile does not work here: ") as caught:
        trained(base, few, compile=True)
    assert "--compile" in str(caught.value)
    loraio.attach(base, loraio.new_adapter(base, loraio.TrainConfig())).detach()


def test_an_observer_can_end_the_run(few: loraio.Dataset) -> None:
    reports: list[loraio.Progress] = []
    plans = plan(on_progress=reports.append)
    ended = run(linear(), torch.arange(80).split(8), few, plans, lambda run, moment: moment.step == 3)
    assert ended.done == 3
    assert [report.step for report in reports] == [3]
