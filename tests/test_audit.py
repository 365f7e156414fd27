"""No call in the package, the launcher or the benchmarks can run code out of a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

SOURCES = sorted([REPO / "cli.py", *(REPO / "lightning_toys").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")])
UNPICKLERS = ("load", "loads", "Unpickler")
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve")
NEVER = {
    *(f"{m}.{f}" for m in PICKLES for f in UNPICKLERS),
    *(f"yaml.{f}{all_}" for f in ("unsafe_load", "full_load") for all_ in ("", "_all")),
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "marshal.load", "marshal.loads"),
    *("os.system", "os.popen", "runpy.run_path", "runpy.run_module", "shelve.open", "pandas.read_pickle"),
    *("tarfile.open", "shutil.unpack_archive", "tempfile.mktemp"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url"),
    # archives of programs, and an index of weights that may name any path: advisories of 2026, without a fix as yet
    *("torch.export.load", "torch.jit.load", "torch._inductor.aoti_load_package", "torch.package.PackageImporter"),
    *("accelerate.load_checkpoint_in_model", "accelerate.load_checkpoint_and_dispatch"),
}
OPTIONS = ("trust_remote_code", "shell", "allow_pickle")
LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader", "StrictLoader")  # the last is a SafeLoader: see strict_yaml.py


def names(tree: ast.Module) -> dict[str, str]:
    """Return what imports call things: {"np": "numpy", "loads": "pickle.loads"}."""
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return out


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """Return a callee's full name, as far as imports tell it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def findings(source: str) -> Iterator[str]:
    """Yield the line and the name of each call that is not allowed."""
    tree = ast.parse(source)
    known = names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, known)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        wrong = name in NEVER
        wrong |= name in ("torch.load", "torch.serialization.load") and given.get("weights_only") != "True"
        wrong |= name in ("numpy.load", "numpy.lib.format.read_array") and given.get("allow_pickle") != "False"
        wrong |= name in ("yaml.load", "yaml.load_all") and given.get("Loader") not in LOADERS
        wrong |= name.endswith("load_from_checkpoint") and given.get("weights_only") != "True"
        wrong |= given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False"
        wrong |= given.get("weights_only", "True") == "False" or given.get("allow_pickle", "False") == "True"
        wrong |= name.endswith((".extractall", ".extract"))
        if wrong:
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"
    for node in ast.walk(tree):  # options written out before they are handed on
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value in OPTIONS
                if named and ast.unparse(value) != "False":
                    yield f"{value.lineno}: {ast.unparse(key or value)}: {ast.unparse(value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_no_call_runs_code_out_of_a_file(path: Path) -> None:
    assert list(findings(path.read_text())) == []


FLAGGED = [
    "import pickle; pickle.load(f)",
    "import torch; torch.export.load(f)",
    "from torch.export import load; load(f)",
    "from accelerate import load_checkpoint_in_model; load_checkpoint_in_model(m, f)",
    "import pickle as p; p.loads(b)",
    "from pickle import loads as read; read(b)",
    "from pickle import Unpickler; Unpickler(f)",
    "import torch; torch.load(f)",
    "import torch; torch.load(f, weights_only=False)",
    "import torch; torch.load(f, weights_only=flag)",
    "from torch import load; load(f)",
    "import numpy as np; np.load(f)",
    "import numpy; numpy.load(f, allow_pickle=True)",
    "import yaml; yaml.load(t)",
    "import yaml; yaml.load(t, yaml.Loader)",
    "import yaml; yaml.load(t, Loader=yaml.UnsafeLoader)",
    "import yaml; yaml.unsafe_load(t)",
    "eval('1')",
    "exec(text)",
    "import os; os.system('ls')",
    "import subprocess; subprocess.run('ls', shell=True)",
    "import subprocess as s; s.Popen(words, shell=flag)",
    "import tarfile; tarfile.open(f)",
    "import zipfile; zipfile.ZipFile(f).extractall(d)",
    "import zipfile; zipfile.ZipFile(f).extract(n, d)",
    "archive.extractall(d)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "AutoModel.from_pretrained(p, trust_remote_code=ours)",
    "options = {'trust_remote_code': True}",
    "Module.load_from_checkpoint(p)",
    "import torch; torch.hub.load('a', 'b')",
]
ALLOWED = [
    "import torch; torch.load(f, map_location='cpu', weights_only=True)",
    "import numpy as np; np.load(f, allow_pickle=False)",
    "import yaml; yaml.safe_load(t)",
    "import yaml; yaml.load(t, Loader=yaml.SafeLoader)",
    "import subprocess; subprocess.run(['ls'])",
    "import json; json.load(f); model.eval(); re.compile('x')",
    "import zipfile; zipfile.ZipFile(f).infolist()",
    "options = {'trust_remote_code': False}",
]


@pytest.mark.parametrize("source", FLAGGED)
def test_the_scan_sees_what_it_is_for(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize("source", ALLOWED)
def test_the_scan_lets_the_rest_pass(source: str) -> None:
    assert not list(findings(source))
