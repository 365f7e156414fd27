"""What TensorBoard shows of a real run, seen by a real browser: scalars, images and the HParams page."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import TEXT, WALK, Browser, call, free_port, wait_until_up
from tests.conftest import Runner


@contextlib.contextmanager
def tensorboard(root: Path, tmp_path: Path) -> Iterator[str]:
    """A server of the runs below ``root``; gives its address."""
    port = free_port()
    with (tmp_path / "tensorboard.log").open("wb") as log:
        # by its name alone, which the pages show
        words = [sys.executable, "-m", "tensorboard.main", "--logdir", root.name, "--port", str(port)]
        words += ["--host", "127.0.0.1", "--load_fast", "false"]
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=root.parent)
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_up(base, server)
            yield base
        finally:
            server.terminate()
            server.wait(timeout=30)


def shots_folder(tmp_path: Path) -> Path:
    """Where screenshots go: into the docs' images by `make screenshots`."""
    shots = Path(os.environ.get("LIGHTNING_TOYS_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    return shots


# a real run of each experiment, of half a minute at most
RUNS = {
    "flow_vs_regression": ("flow", "--trainer.max_steps", "2000", "--trainer.val_check_interval", "100"),
    "generative_policy": (
        *("meanflow", "--trainer.max_steps", "400", "--trainer.val_check_interval", "40"),
        *("--model.evaluation.samples", "2000", "--model.evaluation.pairs", "200"),
    ),
    "mirror_descent": (
        *("learned", "--trainer.max_steps", "400", "--trainer.val_check_interval", "50", "--model.chains", "1000"),
        *("--model.settings.smc_particles", "512", "--data.batch_size", "256"),
    ),
    "update_entropy": (
        *("arithmetic", "--model.warm_steps", "60", "--trainer.max_steps", "80", "--trainer.val_check_interval", "10"),
        *("--model.policy.hidden", "32", "--model.policy.layers", "1", "--trainer.log_every_n_steps", "5"),
    ),
    "bilevel": (
        *("regression", "--trainer.max_steps", "160", "--trainer.val_check_interval", "20"),
        *("--trainer.log_every_n_steps", "5"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", RUNS)
def test_bands_of_every_experiment(experiment: str, runner: Runner, browser: Browser, tmp_path: Path) -> None:
    """The page of custom scalars has a chart with a band for every curve that is logged by replica."""
    variant, *flags = RUNS[experiment]
    each = Runner(runner.root, runner.capture, experiment, ("--figures.enabled", "false"))
    each.ok("fit", variant, "--model.seeds", "[0,1,2]", *flags)
    with tensorboard(runner.root, tmp_path) as base:
        tags: list[str] = []
        for _ in range(100):
            found = call(f"{base}/data/plugin/scalars/tags").get(f"{experiment}/{variant}/version_0", {})
            tags = [t for t in found if t.startswith("interval/") and t.endswith("/lo")]
            if any("eval/" in t for t in tags):
                break
            time.sleep(0.3)
        named = {t.removeprefix("interval/").removesuffix("/lo") for t in tags}
        wanted = {n for n in named if "@" not in n and "modes/" not in n and "_dim" not in n}
        layout = call(f"{base}/data/plugin/custom_scalars/layout")
        assert layout["category"]
        for category in layout["category"]:
            assert {c["title"] for c in category["chart"]} == wanted
        browser.open(f"{base}/#custom_scalars")
        browser.wait(WALK + "return text.includes('mean and 95 % interval over 3 seeds');")
        browser.wait(WALK + "return text.includes('eval/');")
        time.sleep(4)
        assert str(tmp_path) not in browser.run(TEXT)
        browser.screenshot(shots_folder(tmp_path) / f"tensorboard_{experiment}.png")


def test_pages_of_a_real_run(runner: Runner, browser: Browser, tmp_path: Path) -> None:
    figures = ("--figures.enabled", "true", "--figures.dpi", "60")
    flags = ("--model.seeds", "[0,1,2]", "--trainer.max_steps", "400", "--trainer.val_check_interval", "100")
    for mode in ("regression", "flow"):
        runner.ok("fit", mode, *flags, *figures)
        runner.ok("test", mode, "--ckpt_path", "last", *figures)
    shots = shots_folder(tmp_path)
    with tensorboard(runner.root, tmp_path) as base:
        # what the pages are fed with, said by TensorBoard's own plugins
        tags: dict[str, Any] = {}
        for _ in range(100):
            tags = call(f"{base}/data/plugin/scalars/tags")
            if len(tags) >= 2 and all("eval/l2" in t for run, t in tags.items() if "hparam" not in run):
                break
            time.sleep(0.3)
        run = "flow_vs_regression/flow/version_0"
        assert {"train/loss", "interval/train/loss/lo", "replicas/train/loss/seed_1", "eval/l2", "test/l2"} <= set(
            tags[run]
        )
        assert not any("hp_metric" in t for t in tags.values())
        points = call(f"{base}/data/plugin/scalars/scalars?tag=eval%2Fl2&run={run.replace('/', '%2F')}")
        assert [p[1] for p in points] == [100, 200, 300, 400]  # optimiser steps, not batches

        browser.open(f"{base}/#timeseries")
        browser.wait(WALK + "return text.includes('train') && text.includes('eval');")
        time.sleep(2)
        browser.screenshot(shots / "tensorboard_scalars.png")

        layout = call(f"{base}/data/plugin/custom_scalars/layout")
        bands, lines = layout["category"]
        assert bands["title"] == "mean and 95 % interval over 3 seeds"
        (band,) = [c for c in bands["chart"] if c["title"] == "eval/l2"]
        assert band["margin"]["series"] == [
            {"value": "interval/eval/l2/geometric_mean", "lower": "interval/eval/l2/lo", "upper": "interval/eval/l2/hi"}
        ]
        assert {"eval/l2", "train/loss"} <= {c["title"] for c in lines["chart"]}
        browser.open(f"{base}/#custom_scalars")
        browser.wait(WALK + "return text.includes('mean and 95 % interval over 3 seeds');")
        browser.wait(WALK + "return text.includes('eval/l2');")
        time.sleep(3)
        browser.screenshot(shots / "tensorboard_bands.png")

        browser.open(f"{base}/#images")
        browser.wait(WALK + "return text.includes('predictions') || text.includes('fit');")
        loaded = "return page.images.filter(i => i.complete && i.naturalWidth > 100).length;"
        assert browser.wait(WALK + loaded) >= 1
        time.sleep(2)
        browser.screenshot(shots / "tensorboard_images.png")

        browser.open(f"{base}/#hparams")
        browser.wait(WALK + "return text.includes('model.mode') || text.includes('model');")
        text = browser.wait(WALK + "return text.includes('straight') || text.includes('regression') ? text : '';")
        assert "regression" in text
        assert "flow" in text
        time.sleep(2)
        browser.screenshot(shots / "tensorboard_hparams.png")
        table = call(f"{base}/data/plugin/hparams/experiment", {"experimentName": ""})
        assert {"model.mode", "model.lr", "data.num_train"} <= {h["name"] for h in table["hparamInfos"]}
        # what differs comes first, and the rows' names begin with what tells them apart
        assert [h["name"] for h in table["hparamInfos"] if h["differs"]] == ["model.evaluation.nfe", "model.mode"]
        assert [h["name"] for h in table["hparamInfos"][:2]] == ["model.evaluation.nfe", "model.mode"]
        asked = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "sliceSize": 9}
        rows = call(f"{base}/data/plugin/hparams/session_groups", asked)["sessionGroups"]
        assert {r["name"] for r in rows} == {
            f"{mode} concat ({mode}/version_0, flow_vs_regression)" for mode in ("regression", "flow")
        }
        assert {"fit/l1", "fit/l2"} <= {m["name"]["tag"] for m in table["metricInfos"]}
