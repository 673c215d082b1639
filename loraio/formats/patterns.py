"""Match the regular expressions of strangers with Python's ``re``, in bounded time.

``re`` tries again from each place where it could have gone another way: ``(a+)+$`` against thirty letters takes
minutes, and nothing stops it. So each pattern is parsed first, and its cost is estimated. A pattern whose cost is a
polynomial of the text's length takes that many steps from the budget of its file. Any other pattern is refused.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loraio.errors import FormatError, quoted
from loraio.files.limits import limits, raising

_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_ENDLESS = 1 << 40
"""More steps than any pattern may take."""

_STEPS_PER_MICROSECOND = 100

_LENGTHS = 16
"""Costs are estimated for texts of a multiple of this length, so that there are few to estimate."""

_COMPILING = 2_000
"""Microseconds that it takes to compile a short pattern, at the worst."""

_PLAIN = re.compile(r"[A-Za-z0-9_.]*")
"""Patterns that are names of modules, as most are; they are compared without ``re``."""


class Budget:
    """The microseconds that all patterns of one file may still take together."""

    def __init__(self) -> None:
        self._left = limits().pattern_steps

    def spend(self, steps: int) -> None:
        """Take steps from the budget.

        Raises:
            FormatError: none are left.
        """
        self._left -= steps
        if self._left < 0:
            raise FormatError("its regular expressions take too long to match", hint=raising("pattern_steps"))


class Pattern:
    """A regular expression that was checked before use.

    Args:
        text: in the syntax of Python's ``re``.
        budget: pays for compiling and matching.

    Raises:
        FormatError: the text is too long, or no regular expression.

    >>> Pattern(r".*\\.(q|k)_proj", Budget()).matches("layer.0.q_proj")
    True
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self._budget = budget
        self._steps: dict[int, int] = {}  # by length of the text
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
        budget.spend(_COMPILING + len(text))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that may change
                self._tree = _PARSER.parse(text)
                self._compiled = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            reason = str(error) if isinstance(error, re.error) else "nested or repeated too often"
            raise FormatError(f"{quoted(text)} is no regular expression: {reason}") from error

    def matches(self, name: str, starts: Iterable[int] = (0,)) -> bool:
        """Return True if the pattern matches from one of the starts to the end of the name.

        Raises:
            FormatError: matching may take very long, or longer than the budget allows.
        """
        if self._plain:
            start = len(name) - len(self.text)
            return start in starts and _is_plain_match(self.text, name[start:])
        steps = self._steps_for(len(name))
        for start in starts:
            self._budget.spend(1 + steps // _STEPS_PER_MICROSECOND)
            if self._compiled.fullmatch(name, start):
                return True
        return False

    def _steps_for(self, length: int) -> int:
        length += -length % _LENGTHS
        if length not in self._steps:
            self._budget.spend(1 + len(self.text))
            self._steps[length] = _cost(self._tree, length).steps
        if self._steps[length] >= _ENDLESS:
            raise FormatError(
                f"the regular expression {quoted(self.text)} may take very long to match: it repeats a part that may "
                "match in several ways",
                hint="the names of the modules as a list",
            )
        return self._steps[length]


def _is_plain_match(text: str, name: str) -> bool:
    """Compare texts of one length; a dot of the first stands for any character."""
    return name == text or all(
        char == wanted or (wanted == "." and char != "\n") for char, wanted in zip(name, text, strict=True)
    )


class PatternTable:
    """Look up values by patterns for the ends of modules' names, as PEFT does: the first match counts.

    Args:
        patterns: a setting of a configuration, from pattern to value; ignored where it is no object.
        budget: pays for all patterns.

    Raises:
        FormatError: a pattern is no regular expression.
    """

    def __init__(self, patterns: Any, budget: Budget) -> None:
        self._budget = budget
        given = patterns.items() if isinstance(patterns, Mapping) else ()
        self._values = [(Pattern(text, budget), value) for text, value in given]

    def value(self, path: str, otherwise: Any) -> Any:
        """Return the value for a module.

        Raises:
            FormatError: as `Pattern.matches`.
        """
        self._budget.spend(1 + len(self._values) // 8)
        starts = [0, *(place + 1 for place, char in enumerate(path) if char == ".")] if self._values else []
        return next((value for pattern, value in self._values if pattern.matches(path, starts)), otherwise)


class _Cost(NamedTuple):
    """The most that ``re`` may do with a part of a pattern.

    Attributes:
        ways: in which the part may match from one place on.
        steps: to try them all.
    """

    ways: int
    steps: int


def _cost(tree: Any, length: int) -> _Cost:
    """Return the cost of parts that follow each other, against a text of this length."""
    ways, steps, repeats = 1, 0, 0
    for code, value in tree:
        part = _part_cost(str(code), value, length)
        steps += ways * part.steps
        if str(code) in ("MAX_REPEAT", "MIN_REPEAT") and value[1] - value[0] >= length:
            # the ends of k repeats come in order: there are (n + k over k) of them, not n to the power of k
            repeats += 1
            ways = ways * (part.ways + repeats - 1) // repeats
        else:
            ways *= part.ways
        ways, steps = min(ways, _ENDLESS), min(steps, _ENDLESS)
    return _Cost(ways, steps)


def _part_cost(code: str, value: Any, length: int) -> _Cost:
    if code == "BRANCH":
        return _branch_cost(value[1], length)
    if code == "SUBPATTERN":
        return _cost(value[3], length)
    if code in ("ASSERT", "ASSERT_NOT"):
        return _Cost(1, _cost(value[1], length).steps + 1)
    if code == "ATOMIC_GROUP":
        return _Cost(1, _cost(value, length).steps + 1)
    if code in ("GROUPREF", "GROUPREF_IGNORE"):
        return _Cost(1, length + 1)
    if code == "GROUPREF_EXISTS":
        return _sum_of(_cost(part, length) for part in value[1:] if part is not None)
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, part = value
        return _repeat_cost(int(least), int(most), _cost(part, length), length)
    return _Cost(1, 1)


def _branch_cost(branches: Any, length: int) -> _Cost:
    """Return the cost of alternatives; of those that begin with different letters only one can match."""
    by_letter: dict[str, list[_Cost]] = {}
    for branch in branches:
        by_letter.setdefault(_first_letter(branch), []).append(_cost(branch, length))
    anywhere = _sum_of(by_letter.pop("", []))
    groups = [_sum_of(costs) for costs in by_letter.values()]
    ways = anywhere.ways + max((group.ways for group in groups), default=0)
    return _Cost(ways, anywhere.steps + sum(group.steps for group in groups) + len(branches))


def _first_letter(branch: Any) -> str:
    """Return the ASCII letter that a branch begins with; empty for others, since case may make two of them one."""
    if len(branch) and str(branch[0][0]) == "LITERAL" and branch[0][1] < 128:
        return chr(branch[0][1]).lower()
    return ""


def _repeat_cost(least: int, most: int, part: _Cost, length: int) -> _Cost:
    """Return the cost of a repeat: of a part that matches in several ways it grows as a power of the count."""
    most = min(most, max(least, length + 1))  # each further one matches nothing
    if part.ways == 1:
        return _Cost(most - least + 1, most * part.steps + 1)
    if most * part.ways.bit_length() > _ENDLESS.bit_length():
        return _Cost(_ENDLESS, _ENDLESS)
    ways = 2 * part.ways**most
    return _Cost(ways, ways * part.steps)


def _sum_of(costs: Iterable[_Cost]) -> _Cost:
    costs = list(costs)
    return _Cost(sum(cost.ways for cost in costs), sum(cost.steps for cost in costs))
