"""Classes that a command line or a file names by their path: found before anything is parsed, or one line says why not.

Also what another class leaves behind: settings that a file gave to the class that a flag, or a later file, replaces.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_toys.commands.experiments import exported, public_name
from lightning_toys.commands.settings import CLASS
from lightning_toys.commands.shipped import folder
from lightning_toys.errors import ToyError
from lightning_toys.imports import load_class

NO_CLASS = ("--run.", "--ckpt_path", "--checkpoint.", "--figures.", "--seed_everything", "--print_config")


def named_in(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the place and the class path of every class that a configuration names by a dotted path."""
    if isinstance(content, list):
        for item in content:
            yield from named_in(item, path)
    if not isinstance(content, dict):
        return
    kind = content.get("class_path")
    if isinstance(kind, str) and "." in kind:
        yield path, kind
    for key, value in content.items():
        if key == "class_path":
            continue
        inner = path if key == "init_args" else (*path, str(key))
        if path == () and key in ("model", "data") and isinstance(value, str) and "." in value:
            yield inner, value
        yield from named_in(value, inner)


def check_class_paths(files: Mapping[str, Any], given: Mapping[str, str | None]) -> None:
    """Refuse classes that cannot be found.

    Args:
        files: contents by file name.
        given: flags with their values.

    Raises:
        ToyError: names the flag or the file, and why.
    """
    for flag, value in given.items():
        if value and CLASS.fullmatch(value) and not flag.startswith(NO_CLASS):
            named(flag, value)
        elif flag in ("--model", "--data") and value and re.fullmatch(r"[A-Z]\w*", value):
            known = {name for name, _ in exported()}
            if value not in known and (own := defined_here(value)):
                raise ToyError(f"{flag}: no class {value!r}; did you mean {own!r}?")
    for file, content in files.items():
        for place, value in named_in(content):
            try:
                named(f"--{'.'.join(place)}", value)
            except ToyError as error:
                beside = Path(file).parent / f"{value.partition('.')[0]}.py"
                away = beside.is_file() and beside.parent.resolve() != Path.cwd()
                where = f"; {beside} is not in the working folder: run in {beside.parent}" if away else ""
                raise ToyError(f"{error} (in {file}){where}") from None


def named(flag: str, value: str) -> None:
    """Refuse a class that cannot be found, naming the flag."""
    try:
        load_class(value)
    except ToyError as error:
        raise ToyError(f"{flag}: {value!r} is not allowed: {error}") from None


def defined_here(name: str) -> str:
    """Return the path of a class of that name in a file of the working folder; empty where there is none."""
    for path in sorted(Path().glob("*.py"))[:200]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if re.search(rf"^class {name}\b", text, re.MULTILINE):
            return f"{path.stem}.{name}"
    return ""


def renewed(content: Any) -> Any:
    """Return a configuration with the shipped classes by the names that stay, whatever file they lay in once."""
    if isinstance(content, list):
        return [renewed(item) for item in content]
    if not isinstance(content, dict):
        return content
    out = {key: renewed(value) for key, value in content.items()}
    if isinstance(kind := out.get("class_path"), str) and (name := public_name(kind)):
        out["class_path"] = name
    return out


def named_in_full(file: str, content: Any) -> Any:
    """Return a configuration; of a shipped one, each of its experiment's classes by its full path.

    By its last name alone it would be ambiguous beside an imported class of somebody's own that has the same one.
    """
    path = Path(file).resolve()
    if not path.is_relative_to(folder().resolve()):
        return content
    start = f"lightning_toys.{path.parent.name}."
    return in_full(content, {name: place for name, place in exported() if place.startswith(start)})


def in_full(content: Any, places: Mapping[str, str]) -> Any:
    """Return a configuration with some classes by their full path, wherever it names one by its last name."""
    if isinstance(content, list):
        return [in_full(item, places) for item in content]
    if not isinstance(content, dict):
        return content
    out = {key: in_full(value, places) for key, value in content.items()}
    if isinstance(kind := out.get("class_path"), str):
        out["class_path"] = places.get(kind, kind)
    return out


# another class, and the settings of the one that it replaces


def node_at(content: Any, place: tuple[str, ...]) -> tuple[Any, str] | None:
    """Return the mapping and the key under which a configuration has what a flag's name says; None if it has not."""
    for i, word in enumerate(place):
        if not isinstance(content, dict):
            return None
        inner = content.get("init_args")
        if word not in content and isinstance(inner, dict):
            content = inner
        if word not in content:
            return None
        if i == len(place) - 1:
            return content, word
        content = content[word]
    return None


def class_of(node: Any) -> str | None:
    """Return the class that a node of a configuration chooses."""
    if isinstance(node, str):
        return node
    return node.get("class_path") if isinstance(node, dict) and isinstance(node.get("class_path"), str) else None


def same_class(a: str, b: str) -> bool:
    """Whether two words name one class; a last name alone stands for any path that ends in it."""
    return a == b or (("." not in a or "." not in b) and a.rpartition(".")[2] == b.rpartition(".")[2])


def chosen_in(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every place at which a configuration chooses a class, and the class."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        inner = place if key == "init_args" else (*place, str(key))
        if isinstance(value, dict):
            if kind := class_of(value):
                yield inner, kind
            yield from chosen_in(value, inner)
        elif not place and key in ("model", "data") and isinstance(value, str):
            yield inner, value


def owners_named(files: Mapping[str, Any], given: Mapping[str, str | None]) -> list[str]:
    """Return flags that name again somebody's class that a file chose, where the line gives a setting of it.

    ``-c siren.yaml --model.network.hidden 9``: without its class, a setting that a shipped network has too would choose
    the shipped one.
    """
    words: dict[str, str] = {}
    for flag in given:
        owner = flag.rpartition(".")[0]
        if not owner.startswith(("--model.", "--data.")) or owner in given:
            continue
        nodes = (node_at(content, tuple(owner[2:].split("."))) for content in files.values())
        kinds = [kind for node in nodes if node and (kind := class_of(node[0][node[1]]))]
        if kinds and CLASS.fullmatch(kinds[-1]) and not kinds[-1].startswith(("lightning.", "lightning_toys.")):
            words[owner] = kinds[-1]
    return [word for pair in words.items() for word in pair]


def without_replaced(
    files: Mapping[str, dict[str, Any]], given: Mapping[str, str | None]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the files without settings of classes that later files or flags replace, and what to say of it.

    Args:
        files: contents by name, in the order in which they are stacked.
        given: flags with their values; those that name a class choose it.
    """
    out = {name: copy.deepcopy(content) for name, content in files.items()}
    choices: list[tuple[int, str, tuple[str, ...], str]] = []
    for i, (name, content) in enumerate(files.items()):
        choices += [(i, f"{name}: {'.'.join(place)}", place, kind) for place, kind in chosen_in(content)]
    last = len(files)
    for flag, value in given.items():
        if value and re.fullmatch(r"([A-Za-z_]\w*\.)*[A-Z]\w*", value) and not flag.startswith(NO_CLASS):
            choices.append((last, flag, tuple(flag[2:].split(".")), value))
    said = []
    for when, who, place, kind in choices:
        for i, (name, content) in enumerate(out.items()):
            found = node_at(content, place) if i < when else None
            if found is None:
                continue
            above, key = found
            old, settings = class_of(above[key]), above[key].get("init_args") if isinstance(above[key], dict) else None
            if isinstance(above[key], dict) and above[key] and not above[key].keys() & {"class_path", "init_args"}:
                dropped = ", ".join(map(str, above.pop(key)))  # options, which a class of somebody's own replaces
                said.append(f"{who} {kind}: the settings of {key} in {name} are dropped: {dropped}")
                continue
            if old is None or same_class(old, kind) or not settings:
                continue
            above[key] = {"class_path": old}
            dropped = ", ".join(settings)
            said.append(f"{who} {kind}: the settings of {old.rpartition('.')[2]} in {name} are dropped: {dropped}")
    return out, said
