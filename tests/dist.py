"""`make dist`: whether a wheel and an sdist hold what they should, and the wheel is small.

Run by an environment that has nothing of ours installed: standard library alone.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MOST = 1_000_000  # bytes of the wheel
WHEEL = {"lightning_toys/": "lightning_toys/", "configs/": "lightning_toys/configs/"}  # what it ships, and as what


def tracked() -> list[str]:
    """Return the files that git knows."""
    listed = subprocess.run(["git", "-C", str(REPO), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def problems(folder: Path, files: Sequence[str], most: int = MOST) -> list[str]:
    """Return one line for each thing that is wrong with the one wheel and the one sdist of a folder."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder}: {len(wheels)} wheels and {len(sdists)} sdists; one of each is wanted"]
    (wheel,), (sdist,) = wheels, sdists
    out = []
    if wheel.stat().st_size >= most:
        out.append(f"{wheel.name}: {wheel.stat().st_size} bytes, and less than {most} are wanted")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {there + f.removeprefix(here) for here, there in WHEEL.items() for f in files if f.startswith(here)}
    out += [f"{wheel.name}: {name} is missing" for name in sorted(wanted - shipped)]
    out += [f"{wheel.name}: {name} does not belong there" for name in sorted(shipped - wanted)]
    with tarfile.open(sdist) as source:
        packed = {name.partition("/")[2] for name in source.getnames()} - {"PKG-INFO"}
    out += [f"{sdist.name}: {name} is missing" for name in sorted(set(files) - packed)]
    out += [f"{sdist.name}: {name} is not in git" for name in sorted(packed - set(files))]
    return out


def main() -> int:
    """Print what is wrong; return the exit code."""
    found = problems(Path(sys.argv[1]), tracked())
    print("\n".join(found) or "the wheel and the sdist are whole, and the wheel is small")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
