"""The cache bounded in bytes."""

from __future__ import annotations

from loraio.bases.byte_cache import ByteCache


def test_the_least_recently_used_value_goes_first_and_a_larger_one_than_the_limit_is_not_cached() -> None:
    cache: ByteCache[str] = ByteCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 4)
    assert [cache.get(key) for key in "abc"] == [None, "B", "C"]
    assert cache.get("b") == "B"
    cache.put("d", "D", 4)
    assert (cache.get("c"), cache.get("b"), cache.total) == (None, "B", 8)
    cache.put("b", "larger", 11)
    assert (cache.get("b"), cache.get("d"), cache.total) == (None, "D", 4)


def test_values_are_replaced_removed_and_cleared_with_their_bytes() -> None:
    cache: ByteCache[int] = ByteCache(10)
    for key, size in (("a", 3), ("a", 5), ("b", 2)):
        cache.put(key, size, size)
    assert (cache.get("a"), cache.total) == (5, 7)
    cache.discard("b")
    cache.discard("none")
    cache.put("c", 0, 0)
    cache.discard_where(lambda key: key == "a")
    assert (cache.get("a"), cache.get("c"), cache.total) == (None, 0, 0)
    cache.clear()
    assert (cache.get("c"), cache.total) == (None, 0)
