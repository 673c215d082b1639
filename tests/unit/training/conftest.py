"""Share a few images among the tests of training: most of them need no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

import loraio


@pytest.fixture(scope="session")
def few(digits: loraio.Dataset) -> loraio.Dataset:
    """The first 120 of the embedded digits that train."""
    return replace(digits, images=digits.images[:120], labels=digits.labels[:120])
