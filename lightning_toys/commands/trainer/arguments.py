"""The command line before jsonargparse: its flags, and configuration files that are there. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_toys.commands.shipped import find_config
from lightning_toys.commands.strict_yaml import UnfitError, strict_load
from lightning_toys.errors import ToyError, did_you_mean


def flags(args: Sequence[str]) -> dict[str, str | None]:
    """Return the ``--flag value`` and ``--flag=value`` pairs of a command line."""
    found: dict[str, str | None] = {}
    for i, word in enumerate(args):
        if word.startswith("--"):
            name, eq, value = word.partition("=")
            following = args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("--") else None
            found[name] = value if eq else following
    return found


def without(args: Sequence[str], flag: str) -> list[str]:
    """Return the words of a command line but ``--flag value`` or ``--flag=value`` of one flag."""
    out, i = [], 0
    while i < len(args):
        if args[i] == flag:
            i += 1
        elif not args[i].startswith(f"{flag}="):
            out.append(args[i])
        i += 1
    return out


def split_configs(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into its configuration files, in order, and the rest.

    Raises:
        ToyError: a file is neither there nor shipped.
    """
    configs, rest, i = [], [], 0
    while i < len(args):
        word = args[i]
        if word in ("-c", "--config"):
            if i + 1 >= len(args):
                raise ToyError(f"{word}: a file name is missing")
            configs.append(find_config(args[i + 1]))
            i += 1
        elif word.startswith(("--config=", "-c=")):
            configs.append(find_config(word.partition("=")[2]))
        else:
            rest.append(word)
        i += 1
    return configs, rest


SECTIONS = ("model", "data", "trainer", "run", "checkpoint", "figures")
SINGLES = ("ckpt_path", "seed_everything", "verbose", "weights_only", "return_predictions")


def check_configs(configs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what configuration files say; refuse one that is none."""
    found: dict[str, dict[str, Any]] = {}
    for name in configs:
        if name.endswith(".py"):
            raise ToyError(f"-c: {name} is Python; a configuration is YAML, such as {name.removesuffix('.py')}.yaml")
        try:
            content = strict_load(Path(name).read_text())
        except UnfitError as error:
            raise ToyError(f"-c: {name} is not a configuration: {one_line(error)}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ToyError(f"-c: {name} is not YAML ({one_line(error)})") from None
        except OSError as error:
            raise ToyError(f"-c: {name} cannot be read ({error.strerror})") from None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ToyError(f"-c: {name} is not a configuration: a mapping with model, data, trainer is wanted")
        check_sections(name, content)
        found[name] = content
    return found


def check_sections(name: str, content: dict[str, Any]) -> None:
    """Refuse a file's top level, and the first below it, where jsonargparse would be silent or obscure."""
    for key, value in content.items():
        if key not in (*SECTIONS, *SINGLES):
            hint = did_you_mean(key, (*SECTIONS, *SINGLES))
            raise ToyError(f"-c: {name} has no use for {key!r}; give {', '.join(SECTIONS)}{hint}")
        chosen = key in ("model", "data")  # a class, which may be named alone
        fits = isinstance(value, dict) or (chosen and (value is None or isinstance(value, str)))
        if key in SECTIONS and not fits:
            raise ToyError(f"-c: {name}: {key}: {repr(value)[:80]} is not allowed; give a mapping, or leave {key} out")
        for inner in value if chosen and isinstance(value, dict) else ():
            known = ("class_path", "init_args")
            if inner not in known and (hint := did_you_mean(str(inner), known)):
                raise ToyError(f"-c: {name}: {key}.{inner}: no such option{hint}")


def check_words(given: dict[str, str | None]) -> None:
    """Refuse a flag whose value, read as YAML, would take the reader's stack or memory."""
    for name, value in given.items():
        try:
            strict_load(value or "")
        except UnfitError as error:
            raise ToyError(f"{name}: {(value or '')[:40]!r} is not allowed: {one_line(error)}") from None
        except yaml.YAMLError:
            continue  # a word like any other


def one_line(error: Exception) -> str:
    """Return the first of what an error says."""
    return " ".join(str(error).split())[:160]


def settle_length(rest: list[str]) -> list[str]:
    """Let a length given as a flag stand alone: max_steps on the line frees max_epochs of a file, and vice versa."""
    given = flags(rest)
    steps, epochs = "--trainer.max_steps" in given, "--trainer.max_epochs" in given
    if given.get("--trainer.max_epochs") == "0":
        raise ToyError("--trainer.max_epochs: 0 is not allowed; give an integer >= 1, or -1 for no bound")
    if steps and not epochs:
        return [*rest, "--trainer.max_epochs=-1"]
    if epochs and not steps:
        return [*rest, "--trainer.max_steps=-1"]
    return rest
