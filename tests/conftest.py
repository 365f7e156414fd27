from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from lightning_toys.cli import main
from tests.browser import Browser, opened_browser
from tests.malformed import Refusal

REPO = Path(__file__).resolve().parent.parent
SMALL = (
    "--model.network.hidden",
    "16",
    "--figures.enabled",
    "false",
    "--model.evaluation.draws",
    "2",
    "--data.num_eval",
    "101",
)


# One mechanism held to many examples through whole commands: the gate plays the first and, by their names, about one in
# so many of the others; `make test-all` plays all. By files (their names' beginnings) and by tests.
SAMPLED_FILES = {"test_malformed_": 5, "test_names": 5}  # long lists of faults and of names
ONE = 1000  # of these the first alone
SAMPLED_TESTS = {
    # what is refused or told of, in one line
    **dict.fromkeys(("test_bad_input_is_one_line", "test_bad_input", "test_bad_searches_are_one_line"), 4),
    **dict.fromkeys(("test_a_setting_that_would_mislead_is_refused", "test_a_flag_that_does_nothing_is_told_of"), 8),
    **dict.fromkeys(("test_every_experiment_can_be_monitored", "test_hints", "test_one_line_and_the_code"), 4),
    **dict.fromkeys(("test_every_flag_of_the_recipes_is_known", "test_what_the_help_leaves_out_is_refused"), 4),
    # every flag of an experiment changes what it should
    **dict.fromkeys(("test_every_flag_changes_a_metric", "test_every_flag_moves_what_is_learned"), 10),
    **dict.fromkeys(("test_flags_that_need_another", "test_every_target_runs", "test_every_policy"), ONE),
    # resumed runs, solo runs, other precisions, loaded modules, old runs: the package's doing, once an experiment
    **dict.fromkeys(("test_resume_and_solo", "test_resume_is_bitwise", "test_a_run_and_its_resume"), ONE),
    **dict.fromkeys(("test_a_replica_is_the_solo_run", "test_replica_of_many_is_the_solo_run"), ONE),
    **dict.fromkeys(("test_single_precision_replica_is_the_solo_run", "test_replicas_with_every_option"), ONE),
    **dict.fromkeys(("test_precisions_train", "test_precisions", "test_it_trains_as_autograd_does"), ONE),
    **dict.fromkeys(("test_a_loaded_module_predicts_what_predict_wrote", "test_after_load_from_checkpoint"), ONE),
    **dict.fromkeys(("test_a_loaded_agent_is_the_one_that_was_tested", "test_stopping_early_and_going_on"), ONE),
    **dict.fromkeys(("test_a_loaded_policy_samples_what_predict_wrote", "test_auto_starts_or_goes_on"), ONE),
    **dict.fromkeys(("test_a_loaded_bandit_policy_acts_as_in_predict_and_test", "test_from_a_csv_to_figures"), ONE),
    **dict.fromkeys(("test_a_run_of_0_1_0", "test_results_say_how_steps_were_taken", "test_the_corpus"), 10),
    # samplers and probes, which have tests without commands beside these
    **dict.fromkeys(("test_every_number_of_every_step", "test_exact_energy_gives_the_samples_of_the_closed_form"), 4),
    **dict.fromkeys(("test_the_step_and_the_batch", "test_finite_steps", "test_regret_falls"), ONE),
    **dict.fromkeys(("test_blocks_drawn_together", "test_the_same_blocks", "test_extras"), 4),
    "test_one_backward_pass_gives_the_influence_of_every_sequence_and_token": 3,
}


def one_in(item: pytest.Function) -> int:
    """Return of how many examples of a test the gate plays one."""
    for start, n in SAMPLED_FILES.items():
        if item.path.name.startswith(start):
            return n
    return SAMPLED_TESTS.get(item.originalname, 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the gate leaves out of the tests above; what was marked before it has its turn first."""
    seen: set[str] = set()
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec") or item.get_closest_marker("slow"):
            continue
        family = item.nodeid.partition("[")[0]
        if family in seen and crc32(item.nodeid.encode()) % one_in(item):
            item.add_marker(pytest.mark.slow)
        seen.add(family)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    torch.set_num_threads(1)


class Runner:
    """Runs command lines against a private root."""

    def __init__(
        self,
        root: Path,
        capture: pytest.CaptureFixture[str],
        experiment: str = "flow_vs_regression",
        small: tuple[str, ...] = SMALL,
    ) -> None:
        self.root, self.capture, self.experiment, self.small = root, capture, experiment, small

    def words(self, verb: str, variant: str, *flags: str) -> list[str]:
        config = f"configs/{self.experiment}/{variant}.yaml"
        return [verb, "-c", config, "--run.root", str(self.root), *self.small, *flags]

    def ok(self, verb: str, variant: str, *flags: str) -> str:
        code, err = self.code(verb, variant, *flags)
        assert code == 0, err
        return err

    def code(self, verb: str, variant: str, *flags: str) -> tuple[int, str]:
        return self.raw(*self.words(verb, variant, *flags))

    def raw(self, *words: str) -> tuple[int, str]:
        self.capture.readouterr()
        code = main(list(words))
        return code, self.capture.readouterr().err

    def folder(self, variant: str, name: str = "version_0") -> Path:
        return self.root / self.experiment / variant / name

    def checkpoint(self, variant: str, name: str = "version_0", which: str = "last") -> dict[str, Any]:
        path = self.folder(variant, name) / "checkpoints" / f"{which}.ckpt"
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded

    def start(self, verb: str, variant: str, *flags: str, **env: str) -> subprocess.Popen[str]:
        """Start the real launcher in a process of its own."""
        words = [sys.executable, "cli.py", *self.words(verb, variant, *flags)]
        full = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.Popen(words, cwd=REPO, env=full, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser, for tests that look at a page."""
    with opened_browser(tmp_path) as found:
        yield found


@pytest.fixture
def runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys)


def assert_bitwise_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare two trees of tensors and plain values, bit by bit."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


SMALL_POLICY = (
    *("--model.network.hidden", "16", "--figures.enabled", "false"),
    *("--model.evaluation.samples", "200", "--model.evaluation.pairs", "50"),
)


@pytest.fixture
def policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys, "generative_policy", SMALL_POLICY)


@pytest.fixture
def bitwise() -> Callable[..., None]:
    return assert_bitwise_equal


@pytest.fixture
def refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    monkeypatch.chdir(tmp_path)  # what is written beside the point is seen too
    return Refusal(tmp_path, capfd)
