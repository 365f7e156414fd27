"""Every shipped configuration x every verb x precision x one process or two: it runs, or is refused in one line.

The gate runs one configuration of each module by every verb, that one in another precision and all others by `fit`; and
on two ranks the modules of :data:`PAIRED`. ``LIGHTNING_TOYS_MATRIX=all`` (`make test-all`) runs all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_toys.cli import main
from tests.conftest import REPO
from tests.processes import two_ranks
from tests.shipped import FIRST, PRECISIONS, SHIPPED, VERBS, WHOLE, kind_of, module_class, precisions, refusal, tiny

FEW = ("fit", "test")
# after two steps, one process and two differ by rounding; the second factor is what a sum over ranks in bf16 may do
CLOSE = {"32-true": 2e-3, "bf16-mixed": 5e-2, "64-true": 1e-6}


class Cell(NamedTuple):
    """A configuration in a precision."""

    config: Path
    precision: str

    @property
    def label(self) -> str:
        """Name of the test."""
        return f"{self.config.parent.name}-{self.config.stem}-{self.precision}"

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; if not, each verb makes a run of its own."""
        return module_class(self.config).trains

    def words(self, verb: str, root: Path, *flags: str) -> list[str]:
        """The command line of a verb."""
        steps = ("--trainer.max_steps", "2") if verb == "fit" and self.trains else ()
        name = self.folder(verb).name
        return [
            *(verb, "-c", str(self.config.relative_to(REPO)), "--run.root", str(root), "--run.name", name),
            *("--trainer.accelerator", "cpu", "--trainer.precision", self.precision, "--figures.enabled", "false"),
            *(*tiny(self.config), *steps, *flags),
        ]

    def folder(self, verb: str) -> Path:
        """A verb's run folder below the root."""
        return Path(self.config.parent.name, self.config.stem, "cell" if self.trains else verb)

    def plan(self, root: Path, *flags: str, verbs: Sequence[str] = VERBS) -> list[tuple[Cell, str, Path, list[str]]]:
        """Verbs' command lines; where a precision is refused, verbs after `fit` are asked of a run in another."""
        out = [(self, v, root, self.words(v, root, *flags)) for v in verbs]
        if self.trains and self.precision in (refusal(self.config, "fit", self.precision) or ""):
            other = self._replace(precision="32-true")
            out.insert(1, (other, "fit", root, other.words("fit", root, *flags)))
        return out


def cells(two_ranks: bool) -> list[Cell]:
    """The gate's share of the cells, or all."""
    out = [Cell(c, p) for c, p in product(SHIPPED, PRECISIONS)]
    if WHOLE:
        return out
    if not two_ranks:
        other = dict(zip(sorted(FIRST.values()), cycle(PRECISIONS[1:])))
        return [c for c in out if c.precision in ("32-true", other.get(c.config))]
    first = sorted(FIRST.values())
    return [Cell(c, precisions(c)[i % len(precisions(c))]) for i, c in enumerate(first)]


def check(cell: Cell, verb: str, code: int, said: str, root: Path) -> None:
    """Check what a verb did against what the configuration's module declares."""
    reason = refusal(cell.config, verb, cell.precision)
    if reason is None:
        assert code == 0, f"{cell.label} {verb}: {said}"
        written = {"fit": "results.json", "validate": "validation.json", "test": "results.json"}
        name = written.get(verb, "predictions.npz")
        assert (root / cell.folder(verb) / name).is_file(), f"{cell.label} {verb}: no {name}"
        return
    assert code == 2, f"{cell.label} {verb}: {said}"
    assert reason in said, f"{cell.label} {verb}: {said}"
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize("cell", cells(False), ids=lambda c: c.label)
def test_one_process(cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = cell.config == FIRST[module_class(cell.config)] and cell.precision == "32-true"
    verbs = VERBS if WHOLE or first else FEW[:1] if cell.trains else FEW
    for done, verb, root, words in cell.plan(tmp_path, verbs=verbs):
        capsys.readouterr()
        code = main(words)
        check(done, verb, code, capsys.readouterr().err, root)


def metrics(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["metrics"]
    return found


def same(a: float | None, b: float | None, tolerance: float) -> bool:
    """Whether two numbers are close; one that is not finite is written as null."""
    return a is b is None or (
        a is not None and b is not None and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    )


KINDS = sorted({kind_of(c) for c in SHIPPED})
# in the gate: one that trains, one that does not; tests/training/test_replica_parallel.py has a third
PAIRED = ["flow_vs_regression", "mirror_descent"]


@pytest.mark.parametrize("kinds", [[k] for k in KINDS] if WHOLE else [PAIRED], ids=lambda k: "-".join(k))
def test_two_ranks(kinds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two gloo processes do every verb (in the gate the first), and find what one process finds."""
    mine = [c for c in cells(True) if kind_of(c.config) in kinds]
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    verbs = {c: VERBS if WHOLE else FEW[:1] if c.trains else FEW[1:] for c in mine}
    plan = [line for c in mine for line in c.plan(tmp_path / "two" / c.precision, *ddp, verbs=verbs[c])]
    ranks = two_ranks([words for *_, words in plan], tmp_path)
    for (cell, verb, root, _), (code, said), (other, _) in zip(plan, *ranks, strict=True):
        assert code == other, f"{cell.label} {verb}: rank 0 ends with {code}, rank 1 with {other}"
        check(cell, verb, code, said, root)
    for cell in mine:
        if refusal(cell.config, "test", cell.precision):
            continue
        for verb in [v for v in FEW if v in verbs[cell]]:
            if not refusal(cell.config, verb, cell.precision):
                capsys.readouterr()
                assert main(cell.words(verb, tmp_path / "one" / cell.precision)) == 0, capsys.readouterr().err
        paths = (tmp_path / n / cell.precision / cell.folder("test") for n in ("one", "two"))
        one, two = (metrics(p / "results.json") for p in paths)
        assert one.keys() == two.keys()
        for name in one:
            for a, b in zip(one[name]["values"], two[name]["values"], strict=True):
                assert same(a, b, CLOSE[cell.precision]), f"{cell.label} {name}: {a} and {b}"


def test_every_experiment_is_in_the_gate() -> None:
    """The sample leaves no module out, in any precision; nor does the whole on two ranks."""
    modules = {module_class(c) for c in SHIPPED}
    found = {(module_class(c.config), c.precision) for c in cells(False)}
    assert len(found) == (len(PRECISIONS) if WHOLE else 2) * len(modules)
    assert {m for m, _ in found} == modules
    assert {p for _, p in found} == set(PRECISIONS)
    assert {module_class(c.config) for c in cells(True)} == modules
    assert {c.precision for c in cells(True)} == set(PRECISIONS)
    assert set(PAIRED) < set(KINDS)
    assert not same(1.0, 1.01, CLOSE["32-true"])
    assert not same(1.0, None, CLOSE["32-true"])
