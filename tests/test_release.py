"""What is published, and what does it: wheel and sdist, the public CI's workflow, forms of issues, the Makefile."""

from __future__ import annotations

import os
import re
import shlex
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from lightning_toys import __version__
from lightning_toys.cli import main
from tests.conftest import REPO
from tests.dist import problems, tracked

GITHUB = REPO / ".github"
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
MAKEFILE = (REPO / "Makefile").read_text()
(PHONY,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
TARGETS = set(PHONY.split())
WORKFLOW: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text())
VERBS = {"list", "fit", "compare", "new"}


# the archives


def a_release(folder: Path, wheel: dict[str, bytes], sdist: list[str]) -> Path:
    """A folder with a made-up wheel and sdist."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "a-1-py3-none-any.whl", "w") as z:
        for name, content in {**wheel, "a-1.dist-info/METADATA": b""}.items():
            z.writestr(name, content)
    with tarfile.open(folder / "a-1.tar.gz", "w:gz") as t:
        for name in [*sdist, "PKG-INFO"]:
            t.addfile(tarfile.TarInfo(f"a-1/{name}"))
    return folder


def test_what_is_missing_too_much_or_too_large_is_found(tmp_path: Path) -> None:
    files = ["README.md", "configs/x/y.yaml", "lightning_toys/a.py"]
    good: dict[str, bytes] = dict.fromkeys(("lightning_toys/a.py", "lightning_toys/configs/x/y.yaml"), b"1")
    assert problems(a_release(tmp_path / "good", good, files), files) == []
    assert "less than 100 are wanted" in problems(tmp_path / "good", files, most=100)[0]
    found = problems(a_release(tmp_path / "bad", {"lightning_toys/b.py": b""}, [*files[:2], "z"]), files)
    assert [line.partition(": ")[2] for line in found] == [
        "lightning_toys/a.py is missing",
        "lightning_toys/configs/x/y.yaml is missing",
        "lightning_toys/b.py does not belong there",
        "lightning_toys/a.py is missing",
        "z is not in git",
    ]
    (tmp_path / "good" / "b-1-py3-none-any.whl").write_bytes(b"")
    assert "2 wheels and 1 sdists" in problems(tmp_path / "good", files)[0]


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="git knows what belongs there")
def test_wheel_and_sdist_are_whole_and_the_wheel_is_small(tmp_path: Path) -> None:
    for builder, version in ((WheelBuilder, "standard"), (SdistBuilder, "standard")):
        assert len(list(builder(str(REPO)).build(directory=str(tmp_path), versions=[version]))) == 1
    files = tracked()
    assert len(files) > 400
    new = ("is not in git", "does not belong there")  # in a tree with work in progress
    assert [line for line in problems(tmp_path, files) if not line.endswith(new)] == []


# the workflow


def steps(job: str) -> list[str]:
    """The lines that a job runs."""
    return [
        line.strip()
        for step in WORKFLOW["jobs"][job]["steps"]
        for line in step.get("run", "").splitlines()
        if line.strip()
    ]


def made(lines: list[str]) -> list[str]:
    """Targets that lines make."""
    return [line.split()[1] for line in lines if line.startswith("make ")]


def test_the_workflow_runs_what_ci_runs() -> None:
    run = REPO / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert ".ci/run" in steps("gate")
    local = made(run.read_text().splitlines())
    assert local[-1] == "test"
    assert {t for t in local if not t.startswith(".venv")} <= TARGETS


def test_the_workflow_makes_what_the_makefile_has() -> None:
    assert set(WORKFLOW["jobs"]) == {"gate", "floors", "docs", "wheel"}
    every = {job: made(steps(job)) for job in WORKFLOW["jobs"]}
    assert every == {"gate": [], "floors": ["test-floors"], "docs": ["docs"], "wheel": ["dist"]}
    assert {t for targets in every.values() for t in targets} <= TARGETS
    for job in WORKFLOW["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert any(step.get("uses", "").startswith("actions/checkout@") for step in job["steps"])
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_the_workflow_s_pythons() -> None:
    tested = WORKFLOW["jobs"]["gate"]["strategy"]["matrix"]["python"]
    assert tested == ["3.11", "3.12", "3.13", "3.14"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert tested[0] == oldest
    listed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".* :: 3\.\d+", c)]
    assert listed
    assert set(listed) <= set(tested)
    assert f"python:{oldest}-" in WORKFLOW["jobs"]["floors"]["container"]
    assert set(WORKFLOW["jobs"]["wheel"]["strategy"]["matrix"]["python"]) == {tested[0], tested[-1]}


def test_the_workflow_s_commands_of_ours_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an empty folder; with one pass, which changes nothing of what is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = [shlex.split(line)[1:] for line in steps("wheel") if line.startswith("lightning-toys ")]
    assert {words[0] for words in ours} == VERBS
    for words in ours:
        # another name: a module of this one may have been imported by another test
        small = ["spring_of_ci" if word == "spring" else "1" if word.isdigit() else word for word in words]
        small += ["--figures.enabled", "false"] if words[0] == "fit" else []
        assert main(small) == 0, capsys.readouterr().err


# the Makefile and the forms


def test_every_target_is_in_the_help() -> None:
    helped = re.findall(r"^([a-z-]+):.*  ## \S", MAKEFILE, re.MULTILINE)
    assert set(helped) == TARGETS
    assert helped[0] == "demo"  # what `make` alone does


@pytest.mark.parametrize("name", ["bug", "finding", "question"])
def test_issue_forms(name: str) -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "labels", "body"} == set(form)
    fields = form["body"]
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids)) > 1
    for field in fields:
        assert field["type"] in ("textarea", "input", "dropdown")
        assert field["attributes"]["label"]
        assert field["type"] != "dropdown" or len(field["attributes"]["options"]) > 1
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_forms_are_all() -> None:
    names = {p.stem for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert names == {"bug", "finding", "question", "config"}
    contact = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text())["contact_links"]
    assert all(link["url"].startswith(PROJECT["urls"]["Homepage"]) for link in contact)


def test_the_citation_file() -> None:
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= set(cited)
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Homepage"]
    assert [a["name"] for a in cited["authors"]] == [a["name"] for a in PROJECT["authors"]]


def test_one_version() -> None:
    """The package's is the one; what cannot read it agrees."""
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert "version" in PROJECT["dynamic"]
