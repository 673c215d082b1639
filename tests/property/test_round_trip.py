"""Any adapter comes back from its file as it was, and the same adapter always gives the same bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from strategies import states_and_adapters
from torch import Tensor

import loraio
from loraio.adapter import Adapter

FILES = settings(max_examples=80, deadline=None)


@FILES
@given(states_and_adapters(with_extras=True))
def test_what_is_loaded_is_what_was_saved(drawn: tuple[dict[str, Tensor], Adapter]) -> None:
    _, adapter = drawn
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        loraio.save(adapter, one)
        read = loraio.load(one)
        assert read == adapter
        for name, target in adapter.targets.items():
            assert type(read.targets[name].alpha) is type(target.alpha)
        loraio.save(read, two)
        assert two.read_bytes() == one.read_bytes()
