"""Constraints for `make test-floors`: of everything that pyproject.toml names the oldest version that it allows."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).resolve().parent.parent
# stays at its pin of constraints.txt: on most machines the wheels of one more torch are gigabytes
PINNED = ("torch",)


def requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    """All that the build, the package and its extras ask for; the package itself is left out."""
    table = project["project"]
    named = [*project["build-system"]["requires"], *table["dependencies"]]
    for extra in table["optional-dependencies"].values():
        named += extra
    own = canonicalize_name(table["name"])
    for text in named:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != own:
            yield requirement


def floor(requirement: Requirement) -> Version:
    """The one version that the requirement names as its lowest."""
    lowest = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    if len(lowest) != 1:
        raise ValueError(f"{requirement}: one lowest version (>=) is wanted")
    if not requirement.specifier.contains(lowest[0], prereleases=True):
        raise ValueError(f"{requirement}: its lowest version is not allowed by the rest")
    return lowest[0]


def floors(project: dict[str, Any]) -> dict[str, Version]:
    """Every package's floor; of two for the same package the higher, which is what pip may install."""
    found: dict[str, Version] = {}
    for requirement in requirements(project):
        name = canonicalize_name(requirement.name)
        found[name] = max(floor(requirement), found.get(name, Version("0")))
    return found


def pins(constraints: str) -> dict[str, Version]:
    """What constraints.txt pins."""
    found: dict[str, Version] = {}
    for line in constraints.splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, _, version = text.partition("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def lines(project: dict[str, Any], constraints: str) -> list[str]:
    """Constraints for pip: torch at its pin, everything else at its floor."""
    chosen = floors(project)
    pinned = pins(constraints)
    for name in PINNED:
        if pinned[name] < chosen[name]:
            raise ValueError(f"{name}: the pin {pinned[name]} is below the floor {chosen[name]}")
        chosen[name] = pinned[name]
    return [f"{name}=={version}" for name, version in sorted(chosen.items())]


def main() -> None:
    """Print the constraints."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    sys.stdout.write("\n".join(lines(project, (REPO / "constraints.txt").read_text())) + "\n")


if __name__ == "__main__":
    main()
