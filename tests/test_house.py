"""The rules of the house, walked through: who imports whom, and what a light verb must not import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_toys.commands.experiments import EXPERIMENTS
from tests.conftest import REPO, SAMPLED_FILES, SAMPLED_TESTS

PACKAGE = REPO / "lightning_toys"
COMMANDS = ("cli", "__main__", "commands")
# the rooms, in the order in which each may import those before it
SHARED = ("errors", "imports", "stats", "plotting", "training", "flows", "nets", "manual_steps")


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, inside_functions: bool) -> Iterator[str]:
    """The package's modules that a module imports, those of type checking alone left out."""
    tree = ast.parse(MODULES[name].read_text())
    nodes: list[ast.AST] = list(ast.walk(tree)) if inside_functions else list(tree.body)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_toys"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "lightning_toys"


def test_the_walk_sees_the_package() -> None:
    assert len(MODULES) > 100
    assert "lightning_toys.training.module" in set(imports("lightning_toys.flow_vs_regression.prediction", False))
    assert {room(n) for n in MODULES} == {"lightning_toys", *SHARED, *EXPERIMENTS, *COMMANDS}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_experiment_imports_another_or_a_command(experiment: str) -> None:
    others = {e for e in EXPERIMENTS if e != experiment} | set(COMMANDS)
    own = [n for n in MODULES if room(n) == experiment]
    assert own
    for name in own:
        assert not {i for i in imports(name, True) if room(i) in others}, name


@pytest.mark.parametrize("shared", SHARED)
def test_the_shared_rooms_import_no_experiment_and_no_command(shared: str) -> None:
    own = [n for n in MODULES if room(n) == shared]
    assert own
    for name in own:
        assert not {i for i in imports(name, True) if room(i) in (*EXPERIMENTS, *COMMANDS)}, name


def circle(inside_functions: bool) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    graph = {n: {i for i in imports(n, inside_functions) if i != n} for n in MODULES}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((c for n in sorted(graph) if (c := walk(n, []))), [])


def test_no_circle_of_imports() -> None:
    assert circle(inside_functions=False) == []


def test_no_circle_of_imports_in_functions_either() -> None:
    assert circle(inside_functions=True) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_an_experiment_exports_is_there(experiment: str) -> None:
    """Names that configurations may give, and names for scripts, such as base classes for classes of one's own."""
    package = importlib.import_module(f"lightning_toys.{experiment}")
    names: list[str] = package.__all__
    assert set(package.PLACES) < set(names) <= set(dir(package))
    for name in names:
        found = getattr(package, name)
        assert found.__module__.startswith(f"lightning_toys.{experiment}."), name
        assert package.PLACES.get(name) in (None, found.__module__), name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = package.Nothing


HEAVY = ("torch", "lightning", "transformers", "torchmetrics", "jsonargparse")
LIGHT = {
    "help": ("--help",),
    "nothing": (),
    "version": ("--version",),
    "unknown": ("fitt",),
    "fit_help": ("fit", "--help"),
    "test_help": ("test", "--help"),
    "sweep_help": ("sweep", "--help"),
    "compare_help": ("compare", "--help"),
    "list": ("list",),
    "show": ("show", "flow_vs_regression/flow"),
    "no_class": ("fit", "--model.help"),
    "no_file": ("fit", "-c", "nowhere.yaml"),
    "no_file_of_a_sweep": ("sweep", "-c", "nowhere.yaml", "--grid.model.mode", "[flow]"),
}
SCRIPT = """
import sys
from lightning_toys.cli import main
code = main(sys.argv[1:])
heavy = sorted(set({heavy}) & set(sys.modules))
print("HEAVY", *heavy)
"""


def imported(words: tuple[str, ...], folder: Path, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """What a command line has imported of some packages, by its end."""
    script = SCRIPT.format(heavy=heavy)
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "HEAVY"
    return last[1:]


@pytest.mark.parametrize("name", LIGHT)
def test_light_verbs_import_nothing_heavy(name: str, tmp_path: Path) -> None:
    assert imported(LIGHT[name], tmp_path, (*HEAVY, "numpy", "scipy", "matplotlib")) == []


def test_a_training_does_not_import_transformers(tmp_path: Path) -> None:
    """torchmetrics would, as soon as it is installed."""
    pytest.importorskip("transformers")
    small = ("--trainer.max_steps", "1", "--figures.enabled", "false", "--model.network.hidden", "4")
    found = imported(("fit", "-c", "flow_vs_regression/flow", *small), tmp_path)
    assert "transformers" not in found
    assert "lightning" in found


@pytest.mark.slow
def test_reading_a_configuration_imports_lightning(tmp_path: Path) -> None:
    shown = imported(("fit", "-c", "update_entropy/arithmetic", "--print_config"), tmp_path)
    assert "lightning" in shown


@pytest.mark.slow
def test_what_was_imported_is_left_out_of_collections(tmp_path: Path) -> None:
    """Garbage is collected again after the imports; a process that has Lightning already freezes nothing."""
    script = (
        "import gc\nfrom lightning_toys.commands.trainer.start import prepare\nprepare()\n"
        "frozen = gc.get_freeze_count()\nprepare()\n"
        "print(gc.isenabled(), frozen > 100_000, gc.get_freeze_count() <= frozen)"
    )
    env = {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


def test_the_tests_that_the_gate_plays_a_part_of_are_there() -> None:
    """One that had got another name would be played whole, and nobody told."""
    text = "".join(p.read_text() for p in (REPO / "tests").rglob("test_*.py"))
    names = {p.name for p in (REPO / "tests").rglob("test_*.py")}
    assert [n for n in SAMPLED_TESTS if f"def {n}(" not in text] == []
    assert [n for n in SAMPLED_FILES if not any(name.startswith(n) for name in names)] == []
