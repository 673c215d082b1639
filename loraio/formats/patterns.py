"""Regular expressions of strangers: matched with Python's meaning, in bounded time.

Python's ``re`` goes back and tries again: ``(a+)+$`` against thirty letters takes minutes, and nothing stops it. So a
pattern is parsed and looked at first. One that cannot cost much is left to ``re``. Any other is matched here by sets of
places, in which nothing is tried twice: for every part of the pattern, from the places where it may begin to all places
where it may end. That is bounded by the lengths of pattern and text. What this has no form for, such as references to
groups, and what goes beyond `loraio.files.limits`, is refused by an error.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from loraio.errors import FormatError, quoted
from loraio.files.limits import limits, raising

_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_TAME = 20_000
"""Steps that ``re`` may take for one text at the worst."""

_PLAIN = re.compile(r"[A-Za-z0-9_.]*")  # no more than names of modules, as most patterns are

_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.ASCII | re.LOCALE
"""Flags of whose patterns the sets of places know nothing."""

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class Budget:
    """Steps that all patterns of one file may still take together."""

    def __init__(self) -> None:
        self._left = limits().pattern_steps

    def spend(self, steps: int) -> None:
        """Take some.

        Raises:
            FormatError: there are none left.
        """
        self._left -= steps
        if self._left < 0:
            raise FormatError("its regular expressions take too long to match", hint=raising("pattern_steps"))


class Pattern:
    """One pattern.

    Args:
        text: in the syntax of Python's ``re``.
        budget: that it takes its steps from.

    Raises:
        FormatError: it is no pattern, or too long.

    >>> Pattern(r"(a+)+b", Budget()).matches("a" * 100)
    False
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self._budget = budget
        most = limits().pattern_bytes
        if len(text) > most:
            raise FormatError(
                f"a regular expression of {len(text):,} characters, at most {most:,} are read",
                hint=raising("pattern_bytes"),
            )
        self._plain = _PLAIN.fullmatch(text) is not None
        if self._plain:
            budget.spend(1)
            return
        budget.spend(2000 + len(text))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that may change
                self._tree = _PARSER.parse(text)
                self._compiled = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            reason = str(error) if isinstance(error, re.error) else "nested or repeated too often"
            raise FormatError(f"{quoted(text)} is no regular expression: {reason}") from error

    def matches(self, name: str, starts: list[int] | None = None) -> bool:
        """Whether it matches a whole name, from its beginning or from one of several places on.

        Raises:
            FormatError: it would take too long, or needs what only ``re`` has.
        """
        starts = [0] if starts is None else starts
        if self._plain:
            return self._is(name, len(name) - len(self.text), starts)
        cost = _cost(self._tree, len(name) + 1) * len(starts)
        if cost <= _TAME:
            self._budget.spend(1 + cost // 100)
            return any(self._compiled.fullmatch(name, start) for start in starts)
        if self._tree.state.flags & _FLAGS:
            raise self._refusal("has flags")
        return _Places(name, self).ends(self._tree, sum(1 << start for start in set(starts))) >> len(name) & 1 == 1

    def _is(self, name: str, start: int, starts: list[int]) -> bool:
        """Whether a plain text is what begins there: its dots stand for any character."""
        if start not in starts:
            return False
        end = name[start:]
        return end == self.text or all(
            char == wanted or (wanted == "." and char != "\n") for char, wanted in zip(end, self.text, strict=True)
        )

    def spend(self, steps: int) -> None:
        """Take steps from the budget."""
        self._budget.spend(steps)

    def _refusal(self, what: str) -> FormatError:
        return FormatError(
            f"the regular expression {quoted(self.text)} may take very long, and {what}, which is not matched in "
            "bounded time here",
            hint="the names of the modules as a list",
        )

    def unknown(self, part: str) -> FormatError:
        """The error for a part of the pattern that sets of places have no form for."""
        return self._refusal(f"has a part of the kind {part.lower()}")


class PatternTable:
    """Values by patterns for the ends of modules' names, as PEFT looks them up: the first that matches has it.

    Args:
        patterns: a setting of a configuration; what is not an object has no values.
        budget: that the patterns take their steps from.

    Raises:
        FormatError: one of the patterns is none.
    """

    def __init__(self, patterns: Any, budget: Budget) -> None:
        self._budget = budget
        given = patterns.items() if isinstance(patterns, Mapping) else ()
        self._values = [(Pattern(text, budget), value) for text, value in given]

    def value(self, path: str, otherwise: Any) -> Any:
        """The value for a module.

        Raises:
            FormatError: as `Pattern.matches`.
        """
        self._budget.spend(1 + len(self._values) // 8)
        starts = [0, *(place + 1 for place, char in enumerate(path) if char == ".")] if self._values else []
        return next((value for pattern, value in self._values if pattern.matches(path, starts)), otherwise)


def _cost(tree: Any, length: int) -> int:
    """At least the number of ways that ``re`` may try, up to a bound that no tame pattern reaches."""
    total = 1
    for code, value in tree:
        total = min(total * _cost_of(str(code), value, length) + 1, 1 << 40)
    return total


def _cost_of(code: str, value: Any, length: int) -> int:
    if code == "BRANCH":
        return sum(_cost(part, length) for part in value[1])
    if code == "SUBPATTERN":
        return _cost(value[3], length)
    if code in ("ASSERT", "ASSERT_NOT"):
        return _cost(value[1], length)
    if code == "ATOMIC_GROUP":
        return _cost(value, length)
    if code == "GROUPREF_EXISTS":
        return sum(_cost(part, length) for part in value[1:] if part is not None)
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, part = value
        inner = _cost(part, length)
        if most <= 1:
            return inner + 1
        choices = min(most - least, length) + 1
        return choices + min(least, length) if inner <= 2 else 1 << 40
    return 1


class _Places:
    """Sets of places in one name, as the bits of an integer."""

    def __init__(self, name: str, pattern: Pattern) -> None:
        self._name = name
        self._pattern = pattern
        self._known: dict[tuple[str, Any], int] = {}

    def ends(self, tree: Any, starts: int) -> int:
        """Where a sequence may end that begins at one of these places."""
        for code, value in tree:
            if not starts:
                break
            starts = self._after(str(code), value, starts)
        return starts

    def _after(self, code: str, value: Any, starts: int) -> int:
        self._pattern.spend(1 + len(self._name) // 64)
        if code == "BRANCH":
            ends = 0
            for part in value[1]:
                ends |= self.ends(part, starts)
            return ends
        if code == "SUBPATTERN":
            if value[1] or value[2]:
                raise self._pattern.unknown("flags")
            return self.ends(value[3], starts)
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, part = value
            return self._repeated(least, most, part, starts)
        if code in ("ASSERT", "ASSERT_NOT") and value[0] == 1:
            return self._looked_ahead(value[1], starts, wanted=code == "ASSERT")
        if code == "AT":
            return starts & self._anchors(str(value))
        return (starts & self._characters(code, value)) << 1

    def _repeated(self, least: int, most: int, part: Any, starts: int) -> int:
        for _ in range(least):
            ends = self.ends(part, starts)
            if ends == starts:  # and so for ever
                break
            starts = ends
        found = fresh = starts
        count = least
        while fresh and count < most:
            fresh = self.ends(part, fresh) & ~found
            found |= fresh
            count += 1
        return found

    def _looked_ahead(self, part: Any, starts: int, *, wanted: bool) -> int:
        kept = 0
        for place in range(len(self._name) + 1):
            if starts >> place & 1 and bool(self.ends(part, 1 << place)) == wanted:
                kept |= 1 << place
        return kept

    def _anchors(self, kind: str) -> int:
        end = len(self._name)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind == "AT_END_STRING":
            return 1 << end
        if kind == "AT_END":
            return 1 << end | (1 << end - 1 if self._name.endswith("\n") else 0)
        if kind not in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            raise self._pattern.unknown(kind)
        is_word = _CATEGORIES["CATEGORY_WORD"]
        words = [False, *map(is_word, self._name), False]
        return sum(
            1 << place for place in range(end + 1) if (words[place] != words[place + 1]) == (kind == "AT_BOUNDARY")
        )

    def _characters(self, code: str, value: Any) -> int:
        """The places of the characters that one character of the pattern stands for."""
        key = (code, id(value) if code == "IN" else value)
        if key not in self._known:
            self._pattern.spend(len(self._name) * (len(value) if code == "IN" else 1))
            self._known[key] = sum(
                1 << place for place, char in enumerate(self._name) if self._stands_for(code, value, char)
            )
        return self._known[key]

    def _stands_for(self, code: str, value: Any, char: str) -> bool:
        if code == "LITERAL":
            return bool(ord(char) == value)
        if code == "NOT_LITERAL":
            return bool(ord(char) != value)
        if code == "ANY":
            return char != "\n"
        if code == "RANGE":
            return bool(value[0] <= ord(char) <= value[1])
        if code == "CATEGORY":
            name = str(value)
            negated = name.replace("_NOT_", "_")
            return _CATEGORIES[negated](char) != (negated != name)
        if code == "IN":
            negated_set = str(value[0][0]) == "NEGATE"
            return any(self._stands_for(str(c), v, char) for c, v in value[negated_set:]) != negated_set
        raise self._pattern.unknown(code)
