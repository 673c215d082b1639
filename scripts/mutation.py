"""Mutation testing: small faults are put into a module, one at a time, and its tests must notice each.

The mutants are those of mutmut's operators, of functions, methods, properties and constants alike. Left alone are
annotations, decorators, docstrings, arguments of ``len`` and ``isinstance``, and texts with a space, which are prose.

The tests of a module run once without a mutant, under a trace that says which test comes to which lines. Then each
mutant gets a forked copy of that process, with the fixtures of the session as they are; there the code of the module
is exchanged, and the tests that come to its line run, the fastest first, until one fails. A mutant that lets tests
run for far too long is killed too.

``tests/mutants.md`` argues why certain mutants need not be noticed; they count as survivors, and run with ``--all``
only. All others that survive are printed, in the form of that file, and so is what it argues in vain; then the exit
code is 3.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import importlib
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import hypothesis
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parent.parent
ARGUED = ROOT / "tests/mutants.md"

TESTS = {
    "merging": (
        "unit/test_merging.py",
        "unit/test_landing.py",
        "unit/test_receipts.py::test_in_memory_the_receipts_are_the_caller_s_to_give",
        "unit/test_whole.py::test_attached_computes_what_merged_computes_and_verify_says_so",
    ),
    "verification": (
        "unit/test_verification.py",
        "unit/test_bases.py::test_a_file_alone_never_makes_code_run",
        "unit/test_bases.py::test_random_inputs_have_the_shape_that_the_network_takes",
        "unit/test_merging.py::test_a_fast_merge_is_wrong_only_by_what_float32_sums_are_unsure_of",
        "unit/test_landing.py::test_a_mismatch_that_is_allowed_is_merged_verified_and_recorded",
        "unit/test_streaming.py::test_the_first_look_in_float32_changes_no_result",
        "unit/test_whole.py::test_attached_computes_what_merged_computes_and_verify_says_so",
        "unit/test_whole.py::test_a_merge_that_lost_a_whole_tensor_is_caught",
        "property/test_merge.py::test_a_merge_of_any_kind_is_verified_and_an_unmerged_state_is_not",
    ),
    "container": (
        "unit/test_container.py",
        "unit/test_limits.py",
        "unit/test_firstbytes.py",
        "unit/test_outputs.py::test_an_existing_file_is_kept_without_overwrite",
        "unit/test_outputs.py::test_an_existing_file_is_replaced_with_overwrite",
        "unit/test_outputs.py::test_an_output_that_is_an_input_is_refused_even_with_overwrite",
        "unit/test_outputs.py::test_a_check_that_raises_leaves_no_trace",
        "property/test_hostile_files.py::test_every_truncation_is_refused",
    ),
    "strictjson": ("unit/test_strictjson.py", "unit/test_limits.py", "unit/test_container.py"),
    "firstbytes": ("unit/test_firstbytes.py", "unit/test_container.py"),
}
"""The tests of each module, under ``tests/``: those that notice most, in little time."""

ELSEWHERE = ("--deselect", "tests/unit/test_container.py::test_processes_with_other_hash_seeds_write_the_same_bytes")
"""Tests that run the module in another process, which sees no mutant."""

SURVIVING = ("survived", "no test comes to it", "not exchangeable")

MEMORY_BYTES = 2**34
"""Address space that the tests of a mutant may ask for."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    Attributes:
        place: the function it is in, by its qualified name; empty for a constant or a class attribute.
        lines: first and last line of the statement in it, without the statements inside; None outside of functions.
        source: the whole module, with the fault.
        change: the lines that differ, without their indent, after ``-`` and ``+``.
    """

    place: str
    lines: tuple[int, int] | None
    source: str
    change: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((f"@@ {self.place or 'module'} @@", *self.change))


class _Visitor(cst.CSTVisitor):
    """Collects what the operators make of each node."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, int] | None, int, cst.CSTNode, cst.CSTNode]] = []
        self._statements: list[cst.CSTNode] = []
        self._at = -1
        self._classes: list[str] = []
        self._functions: list[cst.FunctionDef] = []
        self._inner: list[cst.CSTNode] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Module):
            self._statements = list(node.body)
        elif self._at + 1 < len(self._statements) and node is self._statements[self._at + 1]:
            self._at += 1
        if isinstance(node, cst.Annotation | cst.Decorator | cst.ImportFrom | cst.Import):
            return False
        if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
            return False
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in ("len", "isinstance"):
            return False
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return False
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement | cst.ExceptHandler):
            self._inner.append(node)
        if isinstance(node, cst.FunctionDef):
            self._functions.append(node)
        elif isinstance(node, cst.ClassDef):
            self._classes.append(node.name.value)
        for type_, operator in mutation_operators:
            if isinstance(node, type_):
                self.found += [
                    (self._place(), self._lines(node), self._at, node, changed) for changed in operator(node)
                ]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._inner and original_node is self._inner[-1]:
            self._inner.pop()
        if isinstance(original_node, cst.FunctionDef):
            self._functions.pop()
        elif isinstance(original_node, cst.ClassDef):
            self._classes.pop()

    def _place(self) -> str:
        return ".".join((*self._classes, *(function.name.value for function in self._functions[:1])))

    def _lines(self, node: cst.CSTNode) -> tuple[int, int] | None:
        """A test that comes to none of these lines cannot notice."""
        if not self._functions:
            return None
        statement = self._inner[-1]
        place = self.get_metadata(PositionProvider, statement)
        if isinstance(statement, cst.SimpleStatementLine | cst.FunctionDef):  # of a function: its defaults
            return place.start.line, place.end.line
        return place.start.line, self.get_metadata(PositionProvider, node, place).end.line


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = _Visitor()
    wrapper.visit(visitor)
    module = wrapper.module
    texts = [module.code_for_node(node) for node in (*module.header, *module.body)]
    found = []
    for place, lines, at, node, changed in visitor.found:
        text = module.code_for_node(module.body[at].deep_replace(node, changed))  # type: ignore[arg-type]
        at += len(module.header)
        mutated = "".join((*texts[:at], text, *texts[at + 1 :]))
        delta = difflib.unified_diff(texts[at].splitlines(), text.splitlines(), n=0, lineterm="")
        change = tuple(line[0] + line[1:].strip() for line in list(delta)[2:] if line[0] in "-+")
        if change and not _means_the_same(texts[at], text):
            found.append(Mutant(place=place, lines=lines, source=mutated, change=change))
    return found


def _means_the_same(a: str, b: str) -> bool:
    try:
        return ast.dump(ast.parse(a)) == ast.dump(ast.parse(b))
    except SyntaxError:
        return True  # no mutant at all


def argued() -> dict[str, set[str]]:
    """The mutants of `ARGUED`, as printed, by module."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", ARGUED.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name, _, rest = section.partition("\n")
        blocks = re.findall(r"^```diff\n(.*?)^```$", rest, flags=re.MULTILINE | re.DOTALL)
        found[name.strip()] = {
            hunk.strip() for block in blocks for hunk in re.split(r"^(?=@@ )", block, flags=re.MULTILINE) if hunk
        }
    return found


# Exchanging code


def load(source: str, like: ModuleType) -> ModuleType:
    """A module of its own that holds what a source says."""
    fresh = ModuleType(like.__name__)
    fresh.__dict__.update(__file__=like.__file__, __package__=like.__package__, __spec__=like.__spec__)
    exec(compile(source, str(like.__file__), "exec"), fresh.__dict__)
    return fresh


def exchange(module: ModuleType, fresh: ModuleType) -> None:
    """Make a module, and all that has imported from it, what another is: functions keep their identity."""
    for name, new in vars(fresh).items():
        old = vars(module).get(name)
        if callable(new):
            if new.__module__ == module.__name__:
                for inner, value in vars(new).items() if isinstance(new, type) else ():
                    _exchange_code(vars(old).get(inner), value)
                _exchange_code(old, new)
        elif not name.startswith("__") and not isinstance(new, ModuleType) and repr(new) != repr(old):
            for other in list(sys.modules.values()):
                if getattr(other, "__dict__", {}).get(name) is old:
                    setattr(other, name, new)


def _exchange_code(old: Any, new: Any) -> None:
    for part in ("fget", "__func__", "__wrapped__"):
        if hasattr(new, part):
            _exchange_code(getattr(old, part), getattr(new, part))
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


# Running


class Runner:
    """A plugin of pytest that runs the collected tests, then once more for each mutant."""

    def __init__(self, name: str, only: list[str] | None, known: set[str], report: Callable[[str], None]) -> None:
        self.module = importlib.import_module(f"loraio.{name}")
        self.file = str(self.module.__file__)
        source = Path(self.file).read_text("utf-8")
        self.mutants = [mutant for mutant in mutants(source) if only is None or (mutant.place or "module") in only]
        self.known = known
        self.report = report
        self.survivors: list[Mutant] = []
        self.endings: Counter[str] = Counter()
        self._failed = False
        self._failure = ""
        self._seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed
        if report.when == "call":
            self._seconds = report.duration
        if report.failed:
            self._failure = f"{report.nodeid}: {report.longreprtext}"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        session.config.pluginmanager.unregister(terminal)
        calls, seconds = self._first_run(session)
        self.report(f"{len(seconds)} tests in {sum(seconds.values()):.1f} s; {len(self.mutants)} mutants")
        self._check_that_nothing_is_noticed(session, list(seconds))
        gc.freeze()  # a collection in a fork would copy all memory
        for number, mutant in enumerate(self.mutants):
            if number % 50 == 49:
                self.report(f"{number + 1} of {len(self.mutants)}")
            if str(mutant) in self.known:
                self.endings["not run, as argued"] += 1
                self.survivors.append(mutant)
                continue
            first, last = mutant.lines or (0, sys.maxsize)
            chosen = [item for item in seconds if any(first <= line <= last for line in calls[item])]
            chosen.sort(key=seconds.__getitem__)
            limit = 10 + 5 * sum(seconds[item] for item in chosen)
            ending = self._run(session, mutant, chosen, limit) if chosen else "no test comes to it"
            self.endings[ending] += 1
            if ending in SURVIVING:
                self.survivors.append(mutant)
                self.report(f"{ending}:\n{mutant}")
        self._check_that_nothing_is_noticed(session, list(seconds))
        return True

    def _check_that_nothing_is_noticed(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Put the module itself in its place, before the mutants and after: else all would count as noticed."""
        original = Mutant(place="", lines=None, source=Path(self.file).read_text("utf-8"), change=())
        ending = self._run(session, original, items, 600)
        if ending != "survived":
            raise pytest.UsageError(f"{ending}, though nothing was changed")

    def _first_run(self, session: pytest.Session) -> tuple[dict[pytest.Item, set[int]], dict[pytest.Item, float]]:
        """Which lines of the module each test comes to, and how long it takes."""
        calls: dict[pytest.Item, set[int]] = {}
        seconds: dict[pytest.Item, float] = {}
        lines: set[int] = set()

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename != self.file:
                return None
            lines.add(frame.f_lineno)
            return trace

        for item in session.items:
            lines.clear()
            sys.settrace(trace)
            threading.settrace(trace)
            self._run_one(session, item)
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]  # as its documentation says
            calls[item] = set(lines)
            if self._failed:
                raise pytest.UsageError(f"without a mutant: {self._failure}")
            if lines:
                seconds[item] = self._seconds
        return calls, seconds

    def _run_one(self, session: pytest.Session, item: pytest.Item) -> None:
        """As pytest does, but nothing of the session is torn down, even when no item follows."""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=session)

    def _run(self, session: pytest.Session, mutant: Mutant, chosen: list[pytest.Item], limit: float) -> str:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                for kind, timer, seconds in (
                    (signal.SIGPROF, signal.ITIMER_PROF, limit),
                    (signal.SIGALRM, signal.ITIMER_REAL, 20 * limit),  # others may need the processor
                ):
                    signal.signal(kind, signal.SIG_DFL)
                    signal.setitimer(timer, seconds)
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
                fresh = load(mutant.source, self.module)
                code = 3
                exchange(self.module, fresh)
                code = 1
                for item in chosen:
                    self._run_one(session, item)
                    if self._failed:
                        if not mutant.change:
                            self.report(self._failure)
                        break
                else:
                    code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "stopped" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else "crashed"
        return ("survived", "noticed", "not importable", "not exchangeable")[os.WEXITSTATUS(status)]


def test_module(name: str, only: list[str] | None, everything: bool, tests: list[str]) -> bool:
    """Whether each mutant of a module is noticed or argued, and each argument needed."""
    with tempfile.TemporaryDirectory() as folder:  # one of pytest's own can be cleaned up by another run of it
        return _test_module(name, only, everything, tests, folder)


def _test_module(name: str, only: list[str] | None, everything: bool, tests: list[str], folder: str) -> bool:
    out = os.fdopen(os.dup(1), "w", buffering=1)  # pytest takes the streams
    start = time.perf_counter()
    known = argued().get(f"loraio/{name}.py", set())
    runner = Runner(name, only, set() if everything else known, lambda text: print(text, file=out))
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--basetemp", folder]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of hypothesis, imported before pytest starts
    options += ["--import-mode=importlib", "--rootdir", str(ROOT), "--tb=native", "--assert=plain"]
    code = pytest.main([*options, *ELSEWHERE, *tests], plugins=[runner])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or not runner.endings:
        print(f"loraio/{name}.py: the tests did not run", file=out)
        return False
    survivors = {str(mutant) for mutant in runner.survivors}
    idle = known - survivors if only is None else set()
    total, killed = len(runner.mutants), len(runner.mutants) - len(runner.survivors)
    print(f"\nloraio/{name}.py: {killed} of {total} mutants killed, {killed / total:.1%}", file=out)
    print(f"  {dict(runner.endings)}, {time.perf_counter() - start:.0f} s", file=out)
    print(f"  {len(survivors & known)} survivors argued in {ARGUED.relative_to(ROOT)}", file=out)
    for title, group in (("new", survivors - known), ("argued, and yet killed or gone", idle)):
        print(f"  {len(group)} {title}", file=out)
        print(*sorted(group), sep="\n", end="\n" if group else "", file=out)
    return not (survivors - known or idle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}; default all")
    parser.add_argument(
        "--only",
        metavar="FUNCTION",
        action="append",
        help="mutants of these functions alone; Class.method; module for constants",
    )
    parser.add_argument(
        "--all", action="store_true", help="run the argued mutants too, to see which are argued in vain"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.module) - set(TESTS):
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,  # the same score each time
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    hypothesis.settings.load_profile("mutation")
    codes = []
    for name in arguments.module:
        child = os.fork()  # of its own, as pytest runs once in a process
        if child == 0:
            good = test_module(name, arguments.only, arguments.all, [f"tests/{file}" for file in TESTS[name]])
            sys.stdout.flush()
            os._exit(0 if good else 3)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
