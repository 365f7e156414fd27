"""What cases begin with: a shipped configuration with all of its settings, and a run of it that has ended."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.mutations import CONFIG, RUN
from tests.shipped import REPO, SHIPPED, module_class, tiny

BACKBONE = "update_entropy/backbone"  # arithmetic.yaml with a model read from files
CONFIGS = (*(f"{c.parent.name}/{c.stem}" for c in SHIPPED), BACKBONE)
# small in steps too, and quiet; pictures take the longest, and one configuration of each experiment draws them
SMALL = (
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--checkpoint.every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--figures.enabled", "false"),
)

FILES = (
    *("--model.seeds", "[0]", "--model.backbone", "model", "--model.adapter", "adapter", "--data", "WordProblemData"),
    *("--data.tokens", "model", "--data.steps", "1", "--data.batch_size", "4", "--data.longest", "8"),
)


def shipped(config: str) -> Path:
    """Return the file of a configuration."""
    return REPO / "configs" / f"{'update_entropy/arithmetic' if config == BACKBONE else config}.yaml"


def words_of(config: str) -> list[str]:
    """Return the flags that make a configuration small."""
    return [*tiny(shipped(config)), *SMALL, *(FILES if config == BACKBONE else ())]


def make(config: str, root: Path) -> None:
    """Make a configuration's template below a folder: case.yaml, logs/.../a, and model files where it reads them."""
    from lightning_toys.cli import main

    final = root / config
    folder = final.with_name(f".{final.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        if config == BACKBONE:
            from tests.malformed_models import write_models  # not for the sake of the other templates

            write_models(folder)
        where = ["--run.root", "logs", "--run.variant", final.name, "--run.name", RUN]
        line = ["-c", str(shipped(config)), *words_of(config), *where]
        verb = "fit" if module_class(shipped(config)).trains else "test"
        if code := main([verb, *line]):
            raise SystemExit(f"{config}: exit code {code}")
        run = folder / "logs" / config / RUN
        settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
        for key in ("run", "ckpt_path", "weights_only", "seed_everything", "verbose", "return_predictions"):
            settings.pop(key, None)
        (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
        if not final.exists():
            folder.rename(final)
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def settings_of(config: str, root: Path) -> dict[str, Any]:
    """Return a template's settings by dotted path, leaves only."""

    def leaves(tree: Any, path: str) -> dict[str, Any]:
        if isinstance(tree, dict) and tree:
            return {k: v for key, x in tree.items() for k, v in leaves(x, f"{path}.{key}" if path else key).items()}
        return {path: tree}

    return leaves(yaml.safe_load((root / config / CONFIG).read_text()), "")
