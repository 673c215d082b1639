"""Forward passes in threads see an adapter whole, whatever the handle does meanwhile."""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import INPUT, Small, outputs, small_adapter, small_adapters, small_base
from torch import Tensor, nn

import loraio
from loraio.errors import StateError
from loraio.live.locking import Sharing
from loraio.live.rollback import Undo


@pytest.fixture
def model() -> Small:
    return small_base()


@pytest.fixture
def adapters(model: nn.Module) -> dict[str, loraio.Adapter]:
    return small_adapters(model)


class Passes:
    """Threads that run forward passes until told to stop, and what came out, each answer once.

    Args:
        forward: a pass.
        threads: how many.
    """

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


class Pause(nn.Module):
    """Lets other threads go on between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0)
        return x


def answer(output: Tensor) -> tuple[float, ...]:
    return tuple(output.flatten().tolist())


def expected(model: nn.Module, *changes: Callable[[], Any]) -> set[tuple[float, ...]]:
    """What the model says after each of some changes."""
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
        for _ in range(200):
            for change in changes:
                change()
        live.detach()
    assert passes.answers == allowed | {answer(outputs(plain))}


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


def test_a_pass_inside_of_a_pass_does_not_wait_for_a_change(model: Small, adapters: dict[str, loraio.Adapter]) -> None:
    live = loraio.attach(model, adapters["lora"])
    inside, go_on = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def again(*_: Any) -> None:
        if not inside.is_set():
            inside.set()
            go_on.wait(60)
            found.append(outputs(model))

    model.fc.register_forward_hook(again)
    passing = threading.Thread(target=lambda: found.append(outputs(model)))
    passing.start()
    assert inside.wait(60)
    swapping = threading.Thread(target=lambda: live.swap(adapters["other"]))
    swapping.start()
    swapping.join(0.2)
    assert swapping.is_alive()  # waits for the pass
    go_on.set()
    for thread in (passing, swapping):
        thread.join(60)
        assert not thread.is_alive()
    assert found[0].equal(found[1])
    assert not outputs(model).equal(found[0])


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


def test_an_exception_after_the_release_is_taken_back_too() -> None:
    """A signal can come when the change is done and its turn is over, before the caller gets an answer."""
    sharing = Sharing()
    held = {"value": 1}

    class Turn:
        """The lock, which is interrupted once, when it is free already."""

        def __init__(self) -> None:
            self.lock: Any = threading.RLock()
            self.interrupts = 1
            self.acquire, self._is_owned = self.lock.acquire, self.lock._is_owned

        def release(self) -> None:
            self.lock.release()
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt

    def change(undo: Undo) -> None:
        undo.note(held)
        held["value"] = 2

    sharing._turn = Turn()
    with pytest.raises(KeyboardInterrupt):
        sharing.change(change)
    assert held == {"value": 1}
    sharing.change(change)
    assert held == {"value": 2}
    assert sharing.during(lambda: INPUT.shape) == (2, 1, 5, 5)
