"""Run forward passes in threads while the handle changes the adapter: each pass sees one adapter whole."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_models import Passes, answer
from small import INPUT, Small, outputs, small_adapter, small_base
from torch import Tensor, nn

import loraio
from loraio.errors import StateError
from loraio.live.places import Place
from loraio.live.rollback import Rollback
from loraio.live.snapshots import Snapshot, Snapshots


class Pause(nn.Module):
    """Lets other threads go on between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0)
        return x


def expected(model: nn.Module, *changes: Callable[[], Any]) -> set[tuple[float, ...]]:
    """Return the model's answer after each of some changes."""
    found = set()
    for change in changes:
        change()
        found.add(answer(outputs(model)))
    return found


def test_eight_threads_see_one_adapter_or_the_other_in_ten_thousand_swaps() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), Pause(), nn.Linear(2, 2))
    first, second = (small_adapter(model, seed, "all", rank=seed) for seed in (1, 2))
    x = torch.ones(1, 2)
    live = loraio.attach(model, second)
    allowed = {answer(outputs(model, x))}
    live.swap(first)
    allowed.add(answer(outputs(model, x)))
    assert len(allowed) == 2
    with Passes(lambda: outputs(model, x)) as passes:
        for number in range(10_000):
            live.swap((second, first)[number % 2])
    assert passes.answers == allowed
    assert min(passes.counts) > 0


def test_threads_see_layers_and_heads_come_and_go_as_a_whole(
    model: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    live = loraio.attach(model, adapters["dora"])
    allowed = expected(model, *(lambda name=name: live.swap(adapters[name]) for name in ("head", "dora")))
    with Passes(lambda: outputs(model)) as passes:
        for number in range(100):
            live.swap(adapters[("head", "dora")[number % 2]])
    assert passes.answers == allowed


def test_whatever_the_handle_does_is_seen_as_a_whole(model: nn.Module, adapters: dict[str, loraio.Adapter]) -> None:
    def set_strength(value: float) -> Callable[[], None]:
        return lambda: setattr(live, "strength", value)

    live = loraio.attach(model, adapters["lora"])
    changes = [set_strength(0.5), live.disable, live.enable, set_strength(1.0)]
    allowed = expected(model, *changes)
    plain = small_base()
    with Passes(lambda: outputs(model)) as passes:
        for _ in range(10):
            for change in changes:
                change()
                passes.wait_for_some()
            for change in changes * 10:
                change()
        live.detach()
        passes.wait_for_some()
    assert passes.answers == allowed | {answer(outputs(plain))}


def test_threads_see_new_targets_come_and_all_of_them_go_as_a_whole(adapters: dict[str, loraio.Adapter]) -> None:
    plain = small_base()
    with loraio.attach(plain, adapters["dora"]) as live:
        allowed = expected(plain, lambda: None, lambda: live.swap(adapters["head"]))
    allowed.add(answer(outputs(plain)))
    for _ in range(20):
        model = small_base()
        live = loraio.attach(model, adapters["dora"])
        with Passes(lambda model=model: outputs(model)) as passes:  # type: ignore[misc]
            passes.wait_for_some()
            live.swap(adapters["head"])
            passes.wait_for_some()
            live.detach()
            passes.wait_for_some()
        assert passes.answers == allowed


def test_two_threads_change_while_others_look_and_read_the_adapter(
    model: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    bank = loraio.Bank(adapters)
    live = bank.attach(model, "lora")
    names = ("lora", "dora", "other")
    allowed = expected(model, *(lambda name=name: live.swap(adapters[name]) for name in names))

    def change() -> Tensor:
        name = names[int(torch.randint(3, ()))]
        assert bank.swap(model, name) is live
        found = live.adapter
        assert any(found is adapters[each] for each in names)  # its own tensors, not another one's
        return outputs(model)

    with Passes(lambda: outputs(model), 3) as looking, Passes(change, 2) as changing:
        while min(changing.counts) < 100 and not changing.errors:
            threading.Event().wait(0.01)
    assert looking.answers | changing.answers == allowed


def test_a_change_from_within_a_pass_is_refused(model: Small, adapters: dict[str, loraio.Adapter]) -> None:
    live = loraio.attach(model, adapters["lora"])
    before = outputs(model)
    hook = model.fc.register_forward_hook(lambda *_: live.swap(adapters["dora"]))
    with pytest.raises(StateError, match="from within a forward pass"):
        outputs(model)
    hook.remove()
    assert live.adapter is adapters["lora"]
    assert outputs(model).equal(before)
    live.swap(adapters["dora"])
    live.detach()


def test_a_swap_does_not_wait_for_a_pass_and_the_pass_keeps_its_adapter_to_the_end(
    model: Small, adapters: dict[str, loraio.Adapter]
) -> None:
    live = loraio.attach(model, adapters["lora"])
    before = outputs(model)
    with paused_pass(model) as found:
        live.swap(adapters["other"])
        live.disable()
        live.enable()
        live.strength = 0.5
        after = outputs(model)
    assert all(each.equal(before) for each in found)
    assert len(found) == 2
    assert not after.equal(before)
    assert outputs(model).equal(after)


def test_a_pass_reads_whole_tensors_from_its_snapshot_and_not_from_the_module_tree(
    model: Small, adapters: dict[str, loraio.Adapter]
) -> None:
    """A change can replace the part in the tree at any moment of a pass, here just before the tree computes it."""
    live = loraio.attach(model, adapters["head"])
    before = outputs(model)

    def change(*_: Any) -> None:
        changing = threading.Thread(target=live.disable)
        changing.start()
        changing.join(60)

    stacks: Any = model.fc.parametrizations
    stacks.bias.register_forward_pre_hook(change)
    assert outputs(model).equal(before)


def test_a_pass_reads_the_base_of_a_tensor_that_is_being_put_on(
    model: Small, adapters: dict[str, loraio.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap puts an adapter on the bias just after the pass looked if one is there, and before the pass reads it."""
    live = loraio.attach(model, adapters["dora"])
    before = outputs(model)
    class_is_on, has_looked = threading.Event(), threading.Event()
    is_occupied, set_stacks = inspect.getattr_static(Place, "occupied").fget, Place._set_stacks

    def slow_set_stacks(place: Place, *args: Any) -> None:
        if place.parameter == "bias":
            class_is_on.set()
            has_looked.wait(60)
        set_stacks(place, *args)

    def look(place: Place) -> bool:
        found: bool = is_occupied(place)
        if place.parameter == "bias" and not found:
            has_looked.set()
            while not is_occupied(place):
                time.sleep(0.001)
        return found

    def start_swap(*_: Any) -> None:
        swapping.start()
        class_is_on.wait(60)

    swapping = threading.Thread(target=live.swap, args=[adapters["head"]])
    monkeypatch.setattr(Place, "_set_stacks", slow_set_stacks)
    monkeypatch.setattr(Place, "occupied", property(look))
    hook = model.fc.register_forward_pre_hook(start_swap)
    assert outputs(model).equal(before)
    hook.remove()
    has_looked.set()
    swapping.join(60)
    assert live.adapter == adapters["head"]


@contextmanager
def paused_pass(model: Small) -> Iterator[list[Tensor]]:
    """Hold a pass of another thread in the middle, where it makes a second pass; yield the answers of both."""
    inside, go_on = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def again(*_: Any) -> None:
        if threading.current_thread() is passing and not inside.is_set():
            inside.set()
            go_on.wait(60)
            found.append(outputs(model))

    hook = model.conv.register_forward_hook(again)
    passing = threading.Thread(target=lambda: found.append(outputs(model)))
    passing.start()
    assert inside.wait(60)
    yield found
    go_on.set()
    passing.join(60)
    assert not passing.is_alive()
    hook.remove()


@pytest.mark.parametrize("change", ["detach", "new targets"])
def test_a_change_of_classes_waits_for_the_passes_that_run_and_not_for_later_ones(
    model: Small, adapters: dict[str, loraio.Adapter], change: str
) -> None:
    live = loraio.attach(model, adapters["dora"])
    before = outputs(model)
    work = live.detach if change == "detach" else lambda: live.swap(adapters["head"])
    with paused_pass(model) as found:
        changing = threading.Thread(target=work)
        changing.start()
        changing.join(0.2)
        assert changing.is_alive()
        meanwhile = outputs(model)
    changing.join(60)
    assert not changing.is_alive()
    assert all(each.equal(before) for each in found)
    assert outputs(model).equal(before) is False
    assert meanwhile.equal(outputs(small_base()) if change == "detach" else before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_holds_nothing_back(
    model: Small, adapters: dict[str, loraio.Adapter], error: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    live = loraio.attach(model, adapters["lora"])
    hook = model.fc.register_forward_hook(fail)
    with pytest.raises(error):
        outputs(model)
    hook.remove()
    live.swap(adapters["other"])
    live.detach()


def test_a_copy_is_held_back_by_its_own_changes_only(model: Small, adapters: dict[str, loraio.Adapter]) -> None:
    loraio.attach(model, adapters["lora"])
    twin = copy.deepcopy(model)
    assert not vars(model).keys() ^ vars(twin).keys()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(60)

    model.fc.register_forward_hook(wait)
    passing = threading.Thread(target=lambda: outputs(model))
    passing.start()
    assert inside.wait(60)
    loraio.attachment_of(twin).swap(adapters["other"])
    go_on.set()
    passing.join(60)
    assert not outputs(twin).equal(outputs(model))


def test_nothing_of_it_is_left_and_signatures_stay(model: Small, adapters: dict[str, loraio.Adapter]) -> None:
    before = type(model), list(vars(model)), inspect.signature(model.forward)
    hooks = [(vars(module)[name], dict(vars(module)[name])) for module in model.modules() for name in HOOKS]
    with loraio.attach(model, adapters["lora"]):
        assert inspect.signature(model.forward) == before[2]
        assert isinstance(model, before[0])
        assert outputs(model).equal(outputs(nn.DataParallel(model)))
    assert (type(model), list(vars(model)), inspect.signature(model.forward)) == before
    assert all(now == then for now, then in hooks)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")


def test_an_exception_after_the_release_is_taken_back_too(adapters: dict[str, loraio.Adapter]) -> None:
    """A signal can come when the change is published and its lock released, before the caller gets an answer."""
    snapshots = Snapshots(Snapshot(adapter=adapters["lora"], strength=1.0))
    held, first = {"value": 1}, snapshots.current

    class Lock:
        """A lock that is interrupted once, after its release."""

        def __init__(self) -> None:
            self.lock, self.interrupts = threading.RLock(), 1

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt

    def make(before: Snapshot, rollback: Rollback) -> Snapshot:
        rollback.set(held, "value", 2)
        return replace(before, strength=2.0)

    snapshots._changes = Lock()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        snapshots.change(make)
    assert held == {"value": 1}
    assert snapshots.current is first
    snapshots.change(make)
    assert held == {"value": 2}
    assert snapshots.current.strength == 2
    assert snapshots.run(lambda: INPUT.shape) == (2, 1, 5, 5)


# forked children


@pytest.mark.skipif(not hasattr(os, "fork"), reason="of POSIX alone")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
@pytest.mark.parametrize("busy", ["changing", "passing"])
def test_a_forked_child_runs_and_changes_the_model(
    model: Small, adapters: dict[str, loraio.Adapter], busy: str
) -> None:
    live = loraio.attach(model, adapters["dora"])
    allowed = expected(model, *(lambda name=name: live.swap(adapters[name]) for name in ("head", "dora", "lora")))
    plain = answer(outputs(small_base()))

    def work() -> Tensor:
        if busy == "changing":
            for name in ("head", "dora", "lora"):
                live.swap(adapters[name])
        return outputs(model)

    def child() -> None:
        assert answer(outputs(model)) in allowed
        for name in ("dora", "lora"):
            live.swap(adapters[name])
            assert live.adapter is adapters[name]
            assert answer(outputs(model)) in allowed
        live.detach()
        assert answer(outputs(model)) == plain

    with Passes(work, 3):
        children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(4)]
        for process in children:
            process.start()
        for process in children:
            process.join(60)
    assert [process.exitcode for process in children] == [0] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="of POSIX alone")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_child_takes_back_the_change_that_another_thread_was_making(
    model: Small, adapters: dict[str, loraio.Adapter]
) -> None:
    live = loraio.attach(model, adapters["dora"])
    before = outputs(model)

    def child() -> None:
        assert live.attached
        assert list(model.fc._parameters) == ["bias"]
        assert outputs(model).equal(before)
        live.swap(adapters["head"])
        live.detach()
        assert outputs(model).equal(outputs(small_base()))

    with paused_pass(model):
        changing = threading.Thread(target=live.detach)  # has let the base through, and waits
        changing.start()
        while live._snapshots._pass_ended is None:
            time.sleep(0.01)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
    changing.join(60)
    assert process.exitcode == 0
    assert not live.attached
