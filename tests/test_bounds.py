"""Every number that a configuration can give has bounds, and is refused beyond them before anything is made of it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from lightning_toys.commands.experiments import EXPERIMENTS, exported
from lightning_toys.commands.template.mine import Mine, MineData
from lightning_toys.errors import LARGEST, ToyError, bounded, check_settings, lists_words, words_in
from lightning_toys.imports import load_class
from lightning_toys.nets import Network
from lightning_toys.training.callbacks import RescueCheckpoint
from lightning_toys.training.reporting import FigureWriter

WRONG: dict[type, list[Any]] = {
    int: [2**63, 10**30, -(2**70), -1],
    float: [math.nan, math.inf, -math.inf, 1e300, -1e300],
}
NEEDED: dict[str, dict[str, Any]] = {  # what a class cannot be made without
    "FlowVsRegression": {"mode": "flow", "seeds": [0]},
    "Mixture": {"means": [[0.0, 0.0]], "stds": 0.1},
    "WordProblemData": {"tokens": "."},
    "Reflow": {"teacher": "none"},
    **{name: {"problem": None} for name in ("Predictor", "BestOfN", "SVDD", "TemperedSMC")},
    "SoftValue": {"joint": None, "reward": None, "lambda_scale": 1.0},
}
GIVEN = ("Problem",)  # what the program hands over, no setting
HANDED_OVER = (("SoftValue", "lambda_scale"),)  # likewise, of a class that has settings too
MAY_BE_NEGATIVE = {("every_n_train_steps", -1)}


def kinds_in(annotation: Any) -> set[type]:
    """The types that an annotation allows, those within lists and unions too."""
    if typing.get_origin(annotation) is Literal:
        return set()
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) or inner:
        return {kind for part in inner for kind in kinds_in(part)}
    return {annotation} if isinstance(annotation, type) else set()


def in_a_list(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(in_a_list(part) for part in typing.get_args(annotation))
    return isinstance(origin, type) and issubclass(origin, typing.Sequence | tuple)  # type: ignore[arg-type]


SIZES = {  # of lists whose length is not free, innermost last
    ("BanditData", "heights"): (3,),
    ("GaussianMixture", "weights"): (2,),
    ("GaussianMixture", "means"): (2, 2),
    ("GaussianMixture", "covariances"): (2, 2, 2),
}


def depth(annotation: Any) -> int:
    """How many lists lie around a number."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return max(map(depth, inner))
    return in_a_list(annotation) and 1 + max(depth(part) for part in inner if part is not Ellipsis)


def listed(kind: type, name: str, annotation: Any, value: Any) -> Any:
    """A value as deep in lists as the annotation has it, each of a length that is allowed."""
    for size in reversed(SIZES.get((kind.__name__, name), (1,) * depth(annotation))):
        value = [value] * size
    return value


def classes() -> Iterator[type]:
    """Every class that a configuration may name, and the dataclasses of their settings."""
    todo: list[Any] = [*(load_class(path) for _, path in exported()), FigureWriter, RescueCheckpoint]
    seen: set[type] = set()
    while todo:
        kind = todo.pop(0)
        if kind in seen or not isinstance(kind, type):
            continue
        seen.add(kind)
        yield kind
        for annotation in typing.get_type_hints(kind.__init__).values():
            found = (k for k in kinds_in(annotation) if dataclasses.is_dataclass(k))
            todo += [k for k in found if k.__name__ not in GIVEN]


def settings() -> Iterator[tuple[type, str, Any]]:
    """Every setting that is a number, with its class and annotation."""
    for kind in classes():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            if {int, float} & kinds_in(hints.get(name)) and (kind.__name__, name) not in HANDED_OVER:
                yield kind, name, hints[name]


SETTINGS = list(settings())


def test_there_are_settings_of_every_experiment() -> None:
    assert len(SETTINGS) > 150
    assert len({kind.__module__.split(".")[1] for kind, _, _ in SETTINGS}) >= 6


@pytest.mark.parametrize(("kind", "name", "annotation"), SETTINGS, ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_a_number_out_of_bounds(kind: type, name: str, annotation: Any) -> None:
    number = int if int in kinds_in(annotation) and float not in kinds_in(annotation) else float
    for value in WRONG[number]:
        given = listed(kind, name, annotation, value)
        with pytest.raises(ToyError) as caught:
            kind(**{**NEEDED.get(kind.__name__, {}), name: given})
        said = str(caught.value)
        assert name in said, (value, said)
        assert str(value)[:40] in said or "twice" in said, (value, said)
        assert " not allowed with " not in said, (value, said)  # a length, where the number was to be looked at


def words() -> Iterator[tuple[type, str, Any]]:
    """Every setting that is one of some words, with its class and annotation."""
    for kind in classes():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            if name in hints and lists_words(hints[name]):
                yield kind, name, hints[name]


WORDS = list(words())


def test_there_are_words_of_every_experiment() -> None:
    assert len(WORDS) >= 66
    assert len({kind.__module__.split(".")[1] for kind, _, _ in WORDS}) >= 6


@pytest.mark.parametrize(("kind", "name", "annotation"), WORDS, ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_a_word_that_is_none_of_those_allowed(kind: type, name: str, annotation: Any) -> None:
    """From Python too, where nothing else would say so: another branch would be taken."""
    known = words_in(annotation)
    for word in ("none of them", known[0].upper(), 7, object()):
        given = [word] if in_a_list(annotation) else word
        with pytest.raises(ToyError) as caught:
            kind(**{**NEEDED.get(kind.__name__, {}), name: given})
        said = str(caught.value)
        assert f"{name}: {word!r}"[: len(name) + 42] in said, said
        assert all(x in said for x in known), said
        assert "\n" not in said


class Solo:
    """A class of somebody's, with words in a union and in a list."""

    def __init__(
        self,
        kind: Literal["plain", "cubic"] = "plain",
        compile: bool | Literal["auto"] = "auto",
        x0: Literal["zeros", "gaussian"] | None = None,
        solvers: Sequence[Literal["euler", "rk4", "dopri5"]] | None = ("euler",),
        own: str = "any",
    ) -> None:
        check_settings(Solo, locals(), "--model.")


class Further(Solo):
    def __init__(self, kind: int, own: str = "kind", **kwargs: Any) -> None:
        self.kind = kind
        super().__init__(own=own, **kwargs)


@dataclasses.dataclass
class Wider(Network):
    kind: str = "of my own"  # type: ignore[assignment]


def test_words_in_unions_and_lists() -> None:
    for name, value, says in (
        ("kind", "Cubic", "--model.kind: 'Cubic' is not allowed; give plain or cubic; did you mean 'cubic'?"),
        ("compile", "always", "--model.compile: 'always' is not allowed; give one of true, false, auto"),
        ("x0", "gausian", "--model.x0: 'gausian' is not allowed; give one of zeros, gaussian, null; did you mean "
         "'gaussian'?"),
        ("solvers", ["rk4", "heun"], "--model.solvers: 'heun' is not allowed; give some of euler, rk4, dopri5"),
        ("solvers", "x" * 99, f"--model.solvers: 'x{'x' * 38}... is not allowed; give a list of some of euler, rk4, "
         "dopri5"),
    ):  # fmt: skip
        with pytest.raises(ToyError) as caught:
            Solo(**{name: value})
        assert str(caught.value) == says
    Solo("cubic", True, "zeros", ["rk4", "euler"], "whatever")
    Solo(compile=False, solvers=None)
    Solo(solvers=())
    assert Further(3).kind == 3  # what a subclass calls by the same name is its own
    assert Wider().kind == "of my own"


SINGLE = [(kind, name, annotation) for kind, name, annotation in SETTINGS if not in_a_list(annotation)]


@pytest.mark.parametrize(("kind", "name", "annotation"), SINGLE, ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_what_is_no_number(kind: type, name: str, annotation: Any) -> None:
    """A word, true and, for an integer, a fraction: none is taken for a number, nor for an error of Python's."""
    number = int if int in kinds_in(annotation) and float not in kinds_in(annotation) else float
    wrong: list[Any] = ["a", True, *([2.5] if number is int else [])]
    for value in [v for v in wrong if type(v) not in kinds_in(annotation)]:
        with pytest.raises(ToyError) as caught:
            kind(**{**NEEDED.get(kind.__name__, {}), name: value})
        assert name in str(caught.value), (value, caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        (MineData, "num_train", [0, -1, 1.5, True, "a", 2**63]), (MineData, "noise", [-0.1, math.nan, math.inf, "a"]),
        (MineData, "batch_size", [0]), (Mine, "hidden", [0, -1, 2.5, "a"]), (Mine, "lr", [0.0, math.nan]),
        (Mine, "seeds", [[], [True], [-1]]),
    ],
)  # fmt: skip
def test_what_new_hands_out_has_bounds(kind: type, name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ToyError, match=rf"^--(data|model)\.{name}: "):
            kind(**{name: value})


def test_what_is_allowed_is_said() -> None:
    for value, low, above, says in (
        (0, 1, False, "--x: 0 is not allowed; give an integer >= 1, at most 100000000"),
        (2**63, 1, False, "--x: 9223372036854775808 is not allowed; give an integer >= 1, at most 100000000"),
        (0.0, 0.0, True, "--x: 0.0 is not allowed; give a number > 0, at most 1e+30"),
        (1e300, -LARGEST, False, "--x: 1e+300 is not allowed; give a number from -1e+30 to 1e+30"),
        (10**4000, 1, False, f"--x: {'1' + '0' * 39}... is not allowed; give an integer >= 1, at most 100000000"),
        (None, 1, False, "--x: None is not allowed; give an integer >= 1, at most 100000000"),
        (True, 1, False, "--x: True is not allowed; give an integer >= 1, at most 100000000"),
        (2.5, 1, False, "--x: 2.5 is not allowed; give an integer >= 1, at most 100000000"),
        (2.0, 1, False, "--x: 2.0 is not allowed; give an integer >= 1, at most 100000000"),
        (True, 0.0, False, "--x: True is not allowed; give a number >= 0, at most 1e+30"),
        ("1", 0.0, False, "--x: 1 is not allowed; give a number >= 0, at most 1e+30"),
    ):
        with pytest.raises(ToyError) as caught:
            bounded("--x", value, low, above=above)  # type: ignore[arg-type]
        assert str(caught.value) == says
    for value, low, above in (
        (1, 1, False),
        (10**8, 1, False),
        (1e30, 0.0, True),
        (5e-324, 0.0, True),
        (0.0, 0.0, False),
        (np.int64(3), 1, False),
        (np.float32(0.5), 0.0, True),
        (3, 0.0, True),
    ):
        bounded("--x", value, low, above=above)


def switches() -> list[tuple[type, str]]:
    """Return every switch of the exported classes that can be made by their defaults."""
    found = []
    for name in EXPERIMENTS:
        package = importlib.import_module(f"lightning_toys.{name}")
        for public in package.__all__:
            cls = getattr(package, public)
            if not inspect.isclass(cls) or getattr(cls.__init__, "__module__", "") != cls.__module__:
                continue
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                hints = typing.get_type_hints(cls.__init__)
                found += [(cls, p.name) for p in parameters if hints.get(p.name) is bool]
    return found


def test_no_word_is_taken_for_a_switch() -> None:
    """From Python a word such as "no" would be true without an error."""
    found = switches()
    assert len(found) >= 20
    for cls, name in found:
        with pytest.raises(ToyError, match=f"{name}: 'no' is not allowed; give true or false"):
            cls(**{name: "no"})
