"""A cache bounded in bytes, which evicts the least recently used value first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by key, of at most ``limit`` bytes together; the least recently used one goes first.

    It has no lock. Callers in several threads bring their own.

    Attributes:
        limit: in bytes.
        total: bytes of the values that are cached now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return a value, now the most recently used one; None where there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Cache a value of ``size`` bytes in place of an older one, unless it is larger than the limit by itself."""
        self.discard(key)
        if size > self.limit:
            return
        while self.total + size > self.limit:
            self.discard(next(iter(self._entries)))
        self._entries[key] = value, size
        self.total += size

    def discard(self, key: Hashable) -> None:
        """Remove a value if it is there."""
        if key in self._entries:
            self.total -= self._entries.pop(key)[1]

    def discard_where(self, chosen: Callable[[Hashable], bool]) -> None:
        """Remove the values of all chosen keys."""
        for key in [key for key in self._entries if chosen(key)]:
            self.discard(key)

    def clear(self) -> None:
        """Remove everything."""
        self._entries.clear()
        self.total = 0
