"""What bash and zsh, with the script of `completion`, make of a TAB: no process is started for it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_toys.cli import TRAINER_VERBS, VERBS
from lightning_toys.commands import completion
from lightning_toys.commands.compare.command import FLAGS
from lightning_toys.commands.completion import COMPARE, SEARCH, script
from lightning_toys.commands.shipped import shipped
from lightning_toys.commands.sweep.help import HELP as SWEEP_HELP
from lightning_toys.commands.trainer.help import GROUPS
from tests.malformed import Refusal
from tests.test_house import HEAVY, imported

BASH, ZSH = shutil.which("bash"), shutil.which("zsh")
SWEPT = "lightning_logs/flow_vs_regression/demo-sweep"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The scripts, in files of the names that the shells look for."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {"bash": folder / "bash", "zsh": folder / "_lightning-toys"}
    for shell, path in found.items():
        path.write_text(script(shell), encoding="utf-8")
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A working folder with two runs, a configuration, and what is neither."""
    for name in ("mode=flow", "mode=regression"):
        (tmp_path / SWEPT / name).mkdir(parents=True)
        (tmp_path / SWEPT / name / "config.yaml").touch()
    (tmp_path / SWEPT / "comparison").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def offered(script: Path, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word, without a command that it could start."""
    assert BASH is not None
    lines = f"""
    source {script}
    complete -p lightning-toys >&2
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _lightning_toys
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    call = [BASH, "--norc", "--noprofile", "-c", lines, "bash", "lightning-toys", *words]
    done = subprocess.run(call, cwd=folder, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "complete -o bashdefault -F _lightning_toys lightning-toys\n"
    return sorted(set(done.stdout.split("\n")) - {""})


RUNS = [f"{SWEPT}/mode=flow", f"{SWEPT}/mode=regression"]
OFFERED: list[tuple[tuple[str, ...], list[str]]] = [
    (("co",), ["compare", "completion", "copy"]),
    (("fit", "-c", "flow_vs_regression/fl"), ["flow_vs_regression/flow"]),
    (("fit", "--config", "mi"), sorted(["mine.yaml", *(s.name for s in shipped() if s.name.startswith("mi"))])),
    (("fit", "-c", "bilevel/control", "--model.warm"), ["--model.warm_lr", "--model.warm_steps"]),
    (("fit", "--model.mode", "st"), ["straight_flow"]),
    (("fit", "--model", "Flow"), ["FlowPolicy", "FlowVsRegression"]),
    (("fit", "--trainer.accelerator", ""), ["auto", "cpu", "gpu", "mps"]),
    (("fit", "--trainer.accelerator", "=", "c"), ["cpu"]),
    (("fit", "--run.takeover", "t"), ["true"]),
    (("fit", "--checkpoint.k"), ["--checkpoint.keep"]),
    (("test", "--checkpoint.k"), []),  # test keeps none
    (("fit", "--model.nonsense"), []),
    (("test", "-c", "flow_vs_regression/flow", "--ckpt_path", "la"), ["last"]),
    (("fit", "--ckpt_path", f"{SWEPT}/m"), RUNS),
    (("compare", "lig"), ["lightning_logs", *RUNS]),
    (("compare", "a", "b", f"{SWEPT}/mode", "=", "f"), ["flow"]),  # bash parts words at "="
    (("compare", "a", f"{SWEPT}/mode", "="), ["flow", "regression"]),
    (("compare", "a", "--ba"), ["--baseline"]),
    (("sweep", "--grid.model.mod"), ["--grid.model.mode", "--grid.model.model_hidden_dim"]),
    (("sweep", "--search.p"), ["--search.pruner"]),
    (("show", "bilevel/regression_s"), ["bilevel/regression_slow", "bilevel/regression_switching"]),
    (("completion", ""), ["bash", "zsh"]),
]


@pytest.mark.parametrize(("words", "wanted"), OFFERED, ids=lambda x: " ".join(x)[:60] if isinstance(x, tuple) else "")
def test_bash(words: tuple[str, ...], wanted: list[str], scripts: dict[str, Path], runs: Path) -> None:
    assert offered(scripts["bash"], runs, *words) == sorted(wanted)


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_every_flag_of_the_help_and_of_the_classes_is_offered(verb: str, scripts: dict[str, Path], runs: Path) -> None:
    from lightning_toys.commands.trainer.parser import class_options

    own = class_options()
    assert len(own) > 150
    helped = {f.name.split(", ")[-1] for group in GROUPS.values() for f in group if verb in f.verbs}
    assert set(offered(scripts["bash"], runs, verb, "--")) >= own | helped


def test_the_lists_are_those_of_the_verbs() -> None:
    assert tuple(completion.VERBS) == VERBS
    assert {f.name for f in COMPARE} == set(FLAGS)
    assert set(re.findall(r"--search\.([a-z]+)\b", SWEEP_HELP)) == set(SEARCH)


def typed(call: list[str], setup: str, line: str, folder: Path) -> list[str]:
    """The words of a line after a TAB at its end, in a shell of somebody at a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(call[0], call, {"PATH": "", "TERM": "dumb", "HOME": str(folder), "LANG": "C.UTF-8"})
    try:
        said = ""
        # what was typed is made the arguments of a command that prints them (Ctrl-A), in a line with the end (Ctrl-E):
        # what is typed while a command runs is echoed amid what it prints
        asked = f"{line}\t\x01printf '<%s>\\n' \x05; printf '<%s>\\n' end\n"
        # the end with its line's: else what is read by lines below may lack it
        for keys, until in ((f"{setup}; printf 'rea%s' dy\n", "ready"), (asked, "<end>\r")):
            os.write(terminal, keys.encode())
            end = time.monotonic() + 120
            while until not in said:
                assert time.monotonic() < end, said
                if select.select([terminal], [], [], 1)[0]:
                    said += os.read(terminal, 65536).decode(errors="replace")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
    return re.findall(r"^<(.*?)>\r", said, re.MULTILINE)[:-1]


LINES = {
    "lightning-toys compl": ["lightning-toys", "completion"],
    "lightning-toys fit -c flow_vs_regression/few": ["lightning-toys", "fit", "-c", "flow_vs_regression/few_steps"],
    "lightning-toys fit --checkpoint.k": ["lightning-toys", "fit", "--checkpoint.keep"],
    "lightning-toys fit --model.mode strai": ["lightning-toys", "fit", "--model.mode", "straight_flow"],
    "lightning-toys test -c mine.yaml --ckpt_path be": [
        "lightning-toys", "test", "-c", "mine.yaml", "--ckpt_path", "best"
    ],
    f"lightning-toys compare {SWEPT}/mode=r": ["lightning-toys", "compare", f"{SWEPT}/mode=regression"],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_tab_in_bash(line: str, scripts: dict[str, Path], runs: Path) -> None:
    assert BASH is not None
    setup = f"source {scripts['bash']}"
    assert [w.rstrip("/") for w in typed([BASH, "--norc", "--noprofile", "-i"], setup, line, runs)] == LINES[line]


@pytest.mark.skipif(ZSH is None, reason="zsh is not installed")
@pytest.mark.parametrize("line", LINES)
def test_a_tab_in_zsh(line: str, scripts: dict[str, Path], runs: Path) -> None:
    assert ZSH is not None
    setup = f"fpath=({scripts['zsh'].parent} $fpath); autoload -U compinit; compinit -D -u; bindkey -e"
    assert [w.rstrip("/") for w in typed([ZSH, "-f", "-i"], setup, line, runs)] == LINES[line]


def test_refusals(refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(["completion"], "completion: '' is not allowed; give bash or zsh")
    refuse(["completion", "fish"], "completion: 'fish' is not allowed; give bash or zsh")
    refuse(["completion", "bsh"], "did you mean 'bash'?")
    refuse(["completion", "bash", "zsh"], "completion: 'bash zsh' is not allowed")
    monkeypatch.setitem(sys.modules, "shtab", None)
    refuse(["completion", "bash"], "completion: shtab is not installed; pip install 'lightning-toys[completion]'")


def test_a_refusal_imports_nothing_heavy(tmp_path: Path) -> None:
    assert imported(("completion", "fish"), tmp_path, HEAVY) == []
