"""The exception tree: one root, fitting builtins, a text built from its parts."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from loraio import errors
from loraio.errors import LoraioError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LoraioError)]

BUILTINS = {
    "FormatError": ValueError,
    "MissingFileError": FileNotFoundError,
    "OutputExistsError": FileExistsError,
    "OutputError": OSError,
    "AdapterError": ValueError,
    "ShapeError": ValueError,
    "BaseMismatchError": ValueError,
    "AlreadyMergedError": ValueError,
    "ConfigError": ValueError,
    "UnknownNameError": LookupError,
    "StateError": RuntimeError,
    "DataError": RuntimeError,
    "TrainingError": RuntimeError,
    "VerificationError": RuntimeError,
}


def test_every_class_is_known_here_with_its_builtin() -> None:
    assert {cls.__name__ for cls in CLASSES} == {"LoraioError", *BUILTINS}
    for name, builtin in BUILTINS.items():
        assert issubclass(getattr(errors, name), builtin)
    assert issubclass(errors.ShapeError, errors.AdapterError)
    assert issubclass(errors.AlreadyMergedError, errors.BaseMismatchError)


def test_an_error_is_bounded_whatever_a_file_says() -> None:
    error = LoraioError("m" * 10_000, problems=["p" * 10_000] + [str(number) for number in range(2000)])
    assert error.message == f"{'m' * 2000}... (10,000 characters)"
    assert error.problems[0] == f"{'p' * 2000}... (10,000 characters)"
    assert error.problems[999:] == ("998", "and 1,001 more")
    assert errors.quoted("x" * 1_000_000) == f"'{'x' * 47}...{'x' * 48}'"


def test_an_error_gets_a_place_and_keeps_the_one_it_has() -> None:
    error = errors.ShapeError("wrong", problems=["a"], hint="b").at("here")
    assert (type(error), error.problems, error.where, error.hint) == (errors.ShapeError, ("a",), "here", "b")
    assert error.at("there").where == "here"


def test_the_tree_in_the_docstring_names_every_class_with_its_builtin() -> None:
    for cls in CLASSES:
        assert cls.__name__ in (errors.__doc__ or "")
    for name, builtin in BUILTINS.items():
        if name not in ("ShapeError", "AlreadyMergedError"):  # under a class that has it
            assert f"{name} ({builtin.__name__})" in (errors.__doc__ or "")


@pytest.mark.parametrize("cls", CLASSES)
def test_the_text_has_the_fault_then_all_problems_then_the_place_then_a_hint(cls: type[LoraioError]) -> None:
    made = cls("two things are wrong", problems=["this", "that"], where="'a.file'", hint="another file")
    for error in (made, copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert type(error) is cls
        assert str(error) == "two things are wrong\n  this\n  that\n  in 'a.file'\n  try: another file"
        assert (error.message, error.problems) == ("two things are wrong", ("this", "that"))
        assert (error.where, error.hint) == ("'a.file'", "another file")
    bare = cls("just this")
    assert (str(bare), bare.problems, bare.where, bare.hint) == ("just this", (), None, None)


@pytest.mark.parametrize(
    ("error", "line"),
    [(KeyError("a"), "KeyError: 'a'"), (ValueError("\n one\ntwo"), "ValueError: one"), (OSError(), "OSError")],
)
def test_the_first_line_of_a_foreign_error_has_its_class(error: Exception, line: str) -> None:
    assert errors.first_line(error) == line
