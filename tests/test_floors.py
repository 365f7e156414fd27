"""What `make test-floors` installs: read from pyproject.toml, every floor and nothing else."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import REPO
from tests.floors import floor, floors, lines, pins


def project(*dependencies: str, **extras: list[str]) -> dict[str, Any]:
    return {
        "build-system": {"requires": ["builder>=3"]},
        "project": {"name": "my-toys", "dependencies": list(dependencies), "optional-dependencies": extras},
    }


@pytest.mark.parametrize(
    ("text", "lowest"),
    [
        ("a>=1.2", "1.2"),
        ("a[x,y]>=4.40,<5", "4.40"),
        ("a<5,>=4.40,!=4.41", "4.40"),
        ("a>=1.2; python_version >= '3.11'", "1.2"),
        ("a>=2.0rc1", "2.0rc1"),
    ],
)
def test_a_floor(text: str, lowest: str) -> None:
    assert floor(Requirement(text)) == Version(lowest)


@pytest.mark.parametrize("text", ["a", "a<5", "a==1.2", "a>1", "a>=1,>=2"])
def test_a_requirement_without_one_lowest_version_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="one lowest version"):
        floor(Requirement(text))


@pytest.mark.parametrize("text", ["a>=1.2,!=1.2", "a>=2,<1"])
def test_a_lowest_version_that_is_not_allowed_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not allowed by the rest"):
        floor(Requirement(text))


def test_build_package_and_extras_are_read_and_the_package_itself_is_not() -> None:
    read = floors(project("Some_Thing>=1", one=["other[x]>=2"], dev=["My.Toys[one]", "builder>=3"]))
    assert read == {"builder": Version("3"), "some-thing": Version("1"), "other": Version("2")}


@pytest.mark.parametrize("order", [("1.9", "1.10"), ("1.10", "1.9")])
def test_of_two_floors_the_higher(order: tuple[str, str]) -> None:
    assert floors(project(f"a>={order[0]}", dev=[f"A>={order[1]}"]))["a"] == Version("1.10")


def test_pins_are_read_by_their_canonical_name() -> None:
    assert pins("# torch==1\nTorch==2.13.0  # the pin\n\ntypes_PyYAML==6.0.1\n") == {
        "torch": Version("2.13.0"),
        "types-pyyaml": Version("6.0.1"),
    }


def test_torch_alone_stays_at_its_pin() -> None:
    pinned = "torch==2.13.0\na==9\n"
    assert lines(project("torch>=2.10", "a>=1"), pinned) == ["a==1", "builder==3", "torch==2.13.0"]
    with pytest.raises(ValueError, match=r"torch: the pin 2\.13\.0 is below the floor 2\.14"):
        lines(project("torch>=2.14"), pinned)


def test_ours_has_a_floor_and_a_pin_for_every_dependency() -> None:
    read = floors(tomllib.loads((REPO / "pyproject.toml").read_text()))
    pinned = pins((REPO / "constraints.txt").read_text())
    assert {"torch", "lightning", "gguf", "gymnasium", "optuna", "pytest", "hatchling"} <= read.keys()
    assert "lightning-toys" not in read
    assert read.keys() <= pinned.keys()
    assert not {name: (read[name], pinned[name]) for name in read if pinned[name] < read[name]}
