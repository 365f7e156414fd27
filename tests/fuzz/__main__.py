"""The long form: `python -m tests.fuzz --cases 5000 --seed 0 --jobs 2` (`make fuzz`).

Case k of a seed is always the same case. What is done is kept in build/fuzz/seed-S.jsonl: the same command goes on
where it was stopped. A case that fails is made as small as it goes and written to build/fuzz/failed, from where it
moves to tests/fuzz/corpus once it is understood. Ends with a table of outcomes; exit code 1 where a case failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.mutations import Case
from tests.fuzz.play import PASSED, Outcome
from tests.fuzz.pool import LIMIT, Worker
from tests.fuzz.strategies import BATCH, drawn
from tests.fuzz.templates import CONFIGS
from tests.shipped import REPO

BUILD = REPO / "build" / "fuzz"
HERE = Path(__file__).resolve().parent


def templates() -> Path:
    """Return where the templates of this very code are kept; older ones are thrown away."""
    code = hashlib.blake2b(digest_size=6)
    for path in sorted([*REPO.glob("lightning_toys/**/*.py"), *REPO.glob("configs/**/*.yaml"), HERE / "templates.py"]):
        code.update(path.read_bytes())
    root = BUILD / f"templates-{code.hexdigest()}"
    for old in BUILD.glob("templates-*"):
        if old != root:
            shutil.rmtree(old)
    root.mkdir(parents=True, exist_ok=True)
    return root


def smaller(worker: Worker, case: Case, outcome: Outcome, limit: float) -> tuple[Case, Outcome]:
    """Return a case with as few changes as it goes that ends alike; what takes long stays as it is."""
    again = outcome.seconds < limit / 4
    while again:
        again = False
        for i in range(len(case.changes)):
            less = Case(case.config, case.verb, [c for j, c in enumerate(case.changes) if j != i])
            tried = worker.play(less, limit)
            if tried.kind == outcome.kind:
                case, outcome, again = less, tried, True
                break
    return case, outcome


def name_of(case: Case, outcome: Outcome) -> str:
    """Return a name for a failed case's file."""
    digest = hashlib.blake2b(json.dumps(case.to_json()).encode(), digest_size=4).hexdigest()
    return f"{outcome.kind.replace(' ', '_')}-{digest}.json"


class Campaign:
    """Plays the cases of a seed that are not played yet.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = BUILD / f"seed-{options.seed}.jsonl"
        self.done: dict[int, str] = {}
        if self.log.exists():
            for line in self.log.read_text().splitlines():
                entry = json.loads(line)
                self.done[entry["case"]] = entry["kind"]
        self.lock, self.drawing = threading.Lock(), threading.Lock()
        self.began, self.fresh = time.monotonic(), 0

    def note(self, number: int, case: Case, outcome: Outcome) -> None:
        """Keep what came of a case, and say how far this is."""
        with self.lock:
            self.done[number], self.fresh = outcome.kind, self.fresh + 1
            entry = {"case": number, "kind": outcome.kind, "why": outcome.why, "seconds": outcome.seconds}
            with self.log.open("a") as f:
                f.write(json.dumps({**entry, "played": case.to_json()}) + "\n")
            if not outcome.passed:
                print(f"\ncase {number}: {outcome.kind}: {outcome.why}", flush=True)
            if self.fresh % 10 == 0:
                left = (self.options.cases - len(self.done)) * (time.monotonic() - self.began) / self.fresh
                failed = sum(kind not in PASSED for kind in self.done.values())
                line = f"seed {self.options.seed}: {len(self.done)} of {self.options.cases} cases, {failed} failed"
                print(f"{line}, {left / 60:.0f} min left", end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def cases_left(self, root: Path) -> Iterator[tuple[int, Case]]:
        """Yield the cases that are not played yet, with their numbers."""
        for first in range(0, self.options.cases, BATCH):
            numbers = [n for n in range(first, min(first + BATCH, self.options.cases)) if n not in self.done]
            batch = drawn(root, self.options.seed, first // BATCH) if numbers else []
            yield from ((n, batch[n - first]) for n in numbers)

    def lane(self, todo: Iterator[tuple[int, Case]], root: Path, box: Path) -> None:
        """Play cases until there are no more."""
        with Worker(root, box) as worker:
            while True:
                with self.drawing:
                    number, case = next(todo, (-1, None))
                if case is None:
                    return
                outcome = worker.play(case, self.options.limit)
                if not outcome.passed and outcome.kind != "hang":
                    case, outcome = smaller(worker, case, outcome, self.options.limit)
                if not outcome.passed:
                    failed = {**case.to_json(), "was": f"{outcome.kind}: {outcome.why}", "said": outcome.said[-600:]}
                    (BUILD / "failed" / name_of(case, outcome)).write_text(json.dumps(failed, indent=1) + "\n")
                self.note(number, case, outcome)

    def run(self) -> int:
        """Play all; returns the exit code."""
        (BUILD / "failed").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
            folder = Path(made)
            root = templates()
            with Worker(root, folder / "box") as worker:
                for config in CONFIGS:
                    worker.make(config)
            todo = self.cases_left(root)
            lanes = [
                threading.Thread(target=self.lane, args=(todo, root, folder / f"box-{k}"), daemon=True)
                for k in range(self.options.jobs)
            ]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                while lane.is_alive():
                    lane.join(1.0)
        return self.table()

    def table(self) -> int:
        """Print outcomes by kind."""
        counts = Counter(kind for number, kind in self.done.items() if number < self.options.cases)
        print(f"\nseed {self.options.seed}: {sum(counts.values())} cases")
        for kind in dict.fromkeys((*PASSED, "traceback", "hang", "lost file", "crash", *sorted(counts))):
            print(f"  {kind:12s} {counts[kind]:6d}")
        return int(any(kind not in PASSED for kind in counts))


def main() -> int:
    """Run the command line, or play files of cases."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="cases to play, each as it is; all else is left out then")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a case may take")
    options = parser.parse_args()
    if not options.files:
        return Campaign(options).run()
    worst = 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with Worker(templates(), folder / "box") as worker:
            for file in options.files:
                content = json.loads(file.read_text())
                case = Case(content["config"], content["verb"], content["changes"])
                worker.make(case.config)
                outcome = worker.play(case, options.limit)
                worst |= not outcome.passed
                print(f"{file}: {outcome.kind} {outcome.why} ({outcome.seconds} s)")
                if not outcome.passed:
                    print(outcome.said)
    finally:
        shutil.rmtree(folder)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
