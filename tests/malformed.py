"""What the corpus of malformed inputs shares: a run to start from, and what is asked of every refusal."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

from lightning_toys.cli import main

# the same examples on every machine and in every run; fixtures are shared by the examples of a test, which is meant
CORPUS = settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

GOOD: dict[str, Any] = {
    "model": {
        "class_path": "FlowVsRegression",
        "init_args": {"mode": "flow", "seeds": [0, 1], "network": {"hidden": 8}, "evaluation": {"draws": 2}},
    },
    "data": {"class_path": "InterpolationData", "init_args": {"num_train": 20, "num_eval": 101}},
    "trainer": {"max_steps": 2},
    "figures": {"enabled": False},
}


def changed(**changes: Any) -> dict[str, Any]:
    """Return the good configuration with values put in at ``a__b__c``; ``...`` takes a key out."""
    tree = copy.deepcopy(GOOD)
    for place, value in changes.items():
        *heads, last = place.split("__")
        node = tree
        for head in heads:
            node = node.setdefault(head, {})
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return tree


def at(path: str, value: Any) -> dict[str, Any]:
    """Return the good configuration with one value changed, the path written with dots."""
    return changed(**{path.replace(".", "__"): value})


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what puts a value at a path, or takes it away."""

    def act(tree: dict[str, Any]) -> None:
        *heads, last = path.split("/")
        node: Any = tree
        for head in heads:
            node = node[int(head) if isinstance(node, list) or head.isdigit() else head]
        key: Any = int(last) if isinstance(node, list) or last.isdigit() else last
        if value is ...:
            del node[key]
        else:
            node[key] = value

    return act


def canary_command(canary: Path) -> str:
    """Return a shell command that leaves a trace."""
    return f"touch '{canary}'"


class Trap:
    """Leaves a trace where a reader of pickles builds it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (canary_command(self.canary),)


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Return everything below a folder, with what tells whether it was touched."""
    found = {}
    for p in sorted(root.rglob("*")):
        at_all = p.lstat()
        regular = stat.S_ISREG(at_all.st_mode)
        digest = hashlib.blake2b(p.read_bytes()).hexdigest() if regular else os.readlink(p) if p.is_symlink() else ""
        found[str(p)] = (at_all.st_mtime_ns if regular else 0, digest)
    return found


class Refusal:
    """Runs command lines that have to be refused, in a folder of their own."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capture = folder, capture
        self.root, self.canary = folder / "lightning_logs", folder / "canary"

    def file(self, content: str | bytes | dict[str, Any], name: str = "wrong.yaml") -> Path:
        """Write a file to be read."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, sort_keys=False) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def fit(self, config: Path | str, *parts: str, flags: Sequence[str] = (), verb: str = "fit") -> str:
        """Hold a configuration to :meth:`__call__`."""
        return self([verb, "-c", str(config), *flags], *parts)

    def __call__(self, words: Sequence[str], *parts: str) -> str:
        """Run a line: it is one line of error that says the parts, exit code 2, and nothing in the folder changes."""
        before = tree(self.folder)
        self.capture.readouterr()
        code = main(list(words))
        out, err = self.capture.readouterr()
        assert not self.canary.exists(), f"code was run: {err}"
        assert code == 2, (code, out, err)
        assert "Traceback" not in out + err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert err.endswith("\n"), err
        assert "\r" not in err
        for part in parts:
            assert part in err, (part, err)
        after = tree(self.folder)
        assert after == before, sorted(set(after.items()) ^ set(before.items()))
        return err
