"""Raise at any line of any change: model and handle stay as they were, and the change can still be made.

A trace function raises at one line of the package after another. By default it uses a quarter of the lines in the
modules that make changes. With the environment variable ``EVERY_LINE`` it uses every line that a change reaches, the
first and the last time.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from small import outputs
from torch import Tensor, nn

import loraio
from loraio.adapter import folding
from loraio.files.tensors import tensor_bytes
from loraio.live import module_classes

PACKAGE = str(Path(loraio.__file__).parent)
CHANGING = (
    "attachment.py",
    "weight_cache.py",
    "swap_cache.py",
    "parametrization.py",
    "places.py",
    "snapshots.py",
    "rollback.py",
    "compiled.py",
    "bank.py",
    "in_memory.py",
)
Line = tuple[str, int]


class Tracer:
    """Follows the package line by line, and raises at one of them.

    Args:
        at: the line's number in the order of execution; None only counts.
        error: the exception to raise.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = MemoryError) -> None:
        self.at = at
        self.error = error
        self.lines: list[Line] = []

    def __enter__(self) -> Tracer:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        last = 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                where = frame.f_code.co_filename, frame.f_lineno
                text = linecache.getline(*where).strip()
                # nothing comes between the end of a with block and its release: Python looks for signals after calls
                released = frame.f_lineno < last and text.startswith("with ")
                if not released and text != "return live":  # when a bank has swapped, and has nothing more to do
                    self._at(where)
                last = frame.f_lineno
            return line

        return line

    def _at(self, where: Line) -> None:
        self.lines.append(where)
        if self.at == len(self.lines) - 1:
            raise self.error(f"at {where[0]}, line {where[1]}")

    def moments(self) -> list[int]:
        """Choose moments to raise at from the lines that were counted."""
        last = {where: moment for moment, where in enumerate(self.lines)}
        if os.environ.get("EVERY_LINE"):
            first = {where: moment for moment, where in reversed(list(enumerate(self.lines)))}
            return sorted({*first.values(), *last.values()})
        return sorted(moment for where, moment in last.items() if Path(where[0]).name in CHANGING)[-1::-4]


class Everything:
    """Every fact about a model and its handle."""

    def __init__(self, model: nn.Module, live: loraio.Attachment | None) -> None:
        self.objects: list[tuple[str, object]] = []
        for path, module in model.named_modules():
            self._add(f"{path} itself", module)
            self._add(f"{path}'s class", type(module))
            for name, value in vars(type(module)).items():
                self._add(f"{path}'s class: {name}", value)
            for name, value in sorted(vars(module).items()):
                for key, inside in (value if isinstance(value, dict) else {"": value}).items():
                    self._add(f"{path}.{name}[{key!r}]", inside)
            if getattr(module, "slot", None) is not None:
                self._add(f"{path}'s slot", module.slot.tensor)
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._add(name, tensor)
        if live is not None:
            for name, value in vars(live).items():
                if name not in ("_swap_cache", "_known_fit"):
                    self._add(f"handle.{name}", value)
            self._add("the snapshot", live._snapshots.current)
            for name, place in live._places.items():
                self._add(f"place of {name}", place)
        tensors = [*model.parameters(), *model.buffers()]
        self.facts: list[Any] = [(t.requires_grad, t._version, t.data_ptr(), t.dtype, t.shape) for t in tensors]
        self.bits: list[Tensor] = [tensor_bytes(tensor).clone() for tensor in (*tensors, outputs(model))]

    def _add(self, name: str, found: object) -> None:
        self.objects.append((name, found))

    def assert_same(self, before: Everything) -> None:
        assert [name for name, _ in self.objects] == [name for name, _ in before.objects]
        for (name, now), (_, then) in zip(self.objects, before.objects, strict=True):
            plain = isinstance(then, bool | int | float | str | tuple | dict | list)
            assert now is then or (plain and now == then), name
        assert self.facts == before.facts
        assert all(now.equal(then) for now, then in zip(self.bits, before.bits, strict=True))


def assert_all_or_nothing(
    model: nn.Module, live: loraio.Attachment | None, change: Callable[[], Any], back: Callable[[], Any]
) -> None:
    """Raise at every moment of ``change``; each time compare the model, then make the change and undo it with ``back``.

    ``back`` may leave new objects in the place of old ones.
    """
    change()
    expected = outputs(model)
    back()
    plain = outputs(model)
    with Tracer() as tracer:
        change()
    back()
    moments = tracer.moments()
    assert moments
    for moment in moments:
        error = (MemoryError, KeyboardInterrupt)[moment % 2]
        before = Everything(model, live)
        with Tracer(moment, error) as tracer, pytest.raises(error):
            change()
        assert len(tracer.lines) == moment + 1
        Everything(model, live).assert_same(before)
        change()
        assert outputs(model).equal(expected)
        back()
        assert outputs(model).equal(plain)


@pytest.fixture(autouse=True)
def lasting_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep shared classes alive: otherwise the garbage collector decides when they go."""
    monkeypatch.setattr(module_classes, "_PARAMETRIZED", {})
    monkeypatch.setattr(module_classes, "_ON_TOP", {})


ATTACH: dict[str, tuple[str, dict[str, Any]]] = {
    "as usual": ("lora", {}),
    "whole tensors": ("head", {}),
    "reserved": ("dora", {"reserve": "all"}),
    "for training": ("head", {"trainable": True}),
    "for training, compiled": ("dora", {"trainable": True, "max_rank": 3, "reserve": ("conv", "fc")}),
}


@pytest.mark.parametrize("case", ATTACH)
def test_attach(model: nn.Module, adapters: dict[str, loraio.Adapter], case: str) -> None:
    name, options = ATTACH[case]
    assert_all_or_nothing(
        model,
        None,
        lambda: loraio.attach(model, adapters[name], 0.5, **options),
        lambda: loraio.attachment_of(model).detach(),
    )


@pytest.mark.parametrize(
    ("old", "new", "reserve"),
    [
        *(("lora", new, None) for new in ("other", "dora", "head")),
        *(("dora", "lora", None), ("head", "dora", None)),
        *(("lora", "other", "all"), ("lora", "dora", "all"), ("dora", "lora", ("conv", "fc"))),
    ],
)
def test_swap(model: nn.Module, adapters: dict[str, loraio.Adapter], old: str, new: str, reserve: Any) -> None:
    live = loraio.attach(model, adapters[old], reserve=reserve)
    assert_all_or_nothing(model, live, lambda: live.swap(adapters[new]), lambda: live.swap(adapters[old]))


def test_swap_to_what_was_never_there_on_a_base_that_was_written_to(
    model: nn.Module, adapters: dict[str, loraio.Adapter]
) -> None:
    live = loraio.attach(model, adapters["lora"], allow_base_mismatch=True)
    with torch.no_grad():
        model.get_parameter("conv.bias").add_(1)
    assert_all_or_nothing(
        model, live, lambda: live.swap(adapters["head"]), lambda: (live.refresh(), live.swap(adapters["lora"]))
    )


@pytest.mark.parametrize("case", ["lora", "head", "reserved"])
def test_strength_on_and_off_and_refresh(model: nn.Module, adapters: dict[str, loraio.Adapter], case: str) -> None:
    reserve = "all" if case == "reserved" else None
    live = loraio.attach(model, adapters["dora" if reserve else case], reserve=reserve)
    assert_all_or_nothing(model, live, lambda: setattr(live, "strength", -0.5), lambda: setattr(live, "strength", 1))
    assert_all_or_nothing(model, live, live.disable, live.enable)
    live.disable()
    assert_all_or_nothing(model, live, live.enable, live.disable)


@pytest.mark.parametrize("case", ATTACH)
def test_detach(model: nn.Module, adapters: dict[str, loraio.Adapter], case: str) -> None:
    name, options = ATTACH[case]
    loraio.attach(model, adapters[name], **options).detach()  # makes the classes
    handles = [loraio.attach(model, adapters[name], **options)]
    before = outputs(model)
    with Tracer() as tracer:
        handles[0].detach()
    handles = [loraio.attach(model, adapters[name], **options)]
    for moment in tracer.moments():
        found = Everything(model, handles[-1])
        with Tracer(moment, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            handles[-1].detach()
        assert handles[-1].attached
        Everything(model, handles[-1]).assert_same(found)
        handles[-1].detach()
        handles.append(loraio.attach(model, adapters[name], **options))
        assert outputs(model).equal(before)


def test_bank_swap(model: nn.Module, adapters: dict[str, loraio.Adapter]) -> None:
    bank = loraio.Bank(adapters)
    assert_all_or_nothing(model, None, lambda: bank.swap(model, "lora"), lambda: loraio.attachment_of(model).detach())
    live = bank.swap(model, "lora")
    assert_all_or_nothing(model, live, lambda: bank.swap(model, "head"), lambda: live.swap(adapters["lora"]))


def test_merge(model: nn.Module, adapters: dict[str, loraio.Adapter]) -> None:
    state = model.state_dict()
    assert_all_or_nothing(model, None, lambda: loraio.merge(state, adapters["head"]), lambda: None)


def test_merge_in_place_is_done_to_the_end_or_not_begun(
    model: nn.Module, adapters: dict[str, loraio.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "BLOCK", 8)  # some slices for each weight
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = loraio.merge(base, adapters["lora"])
    assert not expected["fc.weight"].equal(base["fc.weight"])
    with Tracer() as tracer:
        loraio.merge({name: tensor.clone() for name, tensor in base.items()}, adapters["lora"], in_place=True)
    outcomes = []
    for moment, (file, _) in enumerate(tracer.lines):
        if Path(file).name in ("in_memory.py", "folding.py"):
            state = {name: tensor.clone() for name, tensor in base.items()}
            with Tracer(moment, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                loraio.merge(state, adapters["lora"], in_place=True)
            merged, untouched = ([state[n].equal(other[n]) for n in state] for other in (expected, base))
            assert all(merged) or all(untouched), tracer.lines[moment]
            outcomes.append(all(merged))
    assert {True, False} == set(outcomes)
