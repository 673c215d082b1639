"""The targets of `scripts/fuzz` in short, without its guidance: seeds, and seeds with a few bytes changed."""

from __future__ import annotations

import pytest
from fuzz_targets import SEEDS, TARGETS, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_to_their_end(name: str) -> None:
    for seed in SEEDS[name]():
        TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_seeds_are_read_or_refused(name: str, data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(list(SEEDS[name]())))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, min(len(content), begin + 8)))
        piece = data.draw(st.binary(max_size=4) | st.sampled_from(WORDS).map(str.encode))
        content = content[:begin] + piece + content[end:]
    TARGETS[name](content)
