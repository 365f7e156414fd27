"""YAML that may be handed on: plain values, each key once, no depth or aliases that would blow up in its readers."""

from __future__ import annotations

import json
from typing import Any

import yaml

MAX_DEPTH = 64
MAX_VALUES = 100_000  # aliases written out


class UnfitError(yaml.YAMLError):
    """YAML by the letter, and nothing that a configuration is."""


class StrictLoader(yaml.SafeLoader):
    """The safe loader, which knows no tags but YAML's own, without its silence on keys that are given twice."""

    # a word that looks like a date stays a word, as it does for jsonargparse
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UnfitError(f"line {key.start_mark.line + 1} gives the key {key.value!r} a second time")
                seen.add(key.value)
        assert isinstance(node, yaml.MappingNode)
        return node


def check_size(text: str) -> None:
    """Refuse nesting and aliases that would take a recursive reader's stack, or all of the memory.

    Raises:
        yaml.YAMLError: they do, or this is not YAML.
    """
    sizes: dict[str, int] = {}  # values below an anchor, aliases written out
    within: list[tuple[str | None, int]] = [(None, 0)]  # of the collections that are open: anchor, values so far
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            if len(within) > MAX_DEPTH:
                raise UnfitError(f"{line_of(event)} is nested deeper than {MAX_DEPTH} levels")
            within.append((event.anchor, 1))
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and event.anchor in {a for a, _ in within}:
                raise UnfitError(f"{line_of(event)} makes *{event.anchor} a part of itself")
            size = sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = within.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        else:
            continue
        anchor, so_far = within.pop()
        if so_far + size > MAX_VALUES:
            raise UnfitError(f"{line_of(event)}: more than {MAX_VALUES} values, aliases written out")
        within.append((anchor, so_far + size))


def line_of(event: yaml.Event) -> str:
    """Return where an event is."""
    return f"line {event.start_mark.line + 1}" if event.start_mark else "a line"


def strict_load(text: str) -> Any:
    """Return the plain values of a YAML document.

    Raises:
        yaml.YAMLError: this is not YAML, builds other objects, or does not pass :func:`check_size`.
    """
    check_size(text)
    try:
        return yaml.load(text, Loader=StrictLoader)
    except ValueError as error:  # an integer of 5000 digits, `!!int many`
        raise UnfitError(str(error)) from None


def read_word(text: str) -> Any:
    """Return the plain value of a flag's word; None where it cannot be read."""
    try:
        return strict_load(text)
    except yaml.YAMLError:
        return None


def write_word(value: Any) -> str:
    """Return a plain value as one word of a command line; a string is the word itself."""
    return value if isinstance(value, str) else json.dumps(value)
