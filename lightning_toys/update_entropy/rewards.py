"""Rewards of responses: some that are shipped, and functions of one's own.

A reward is a function of three lists of one length: prompts and responses as texts, and the rows of the file that the
prompts come from, as dictionaries in which ``answer`` is the answer's column. It returns a number for each response.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from lightning_toys.errors import ToyError, bounded, did_you_mean, require
from lightning_toys.imports import load_class
from lightning_toys.update_entropy.word_problems import NUMBER

REWARD, ARGUMENTS = "--data.reward", "--data.reward_arguments"
Row = Mapping[str, Any]
Reward = Callable[[list[str], list[str], list[Row]], Sequence[float]]


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, None where there is none; commas part thousands.

    >>> last_number("18 - 3 = 15 eggs, $1,234.50 #### -2.5")
    Fraction(-5, 2)
    """
    found = [m for m in NUMBER.finditer(text) if m["whole"] or m["part"]]
    if not found:
        return None
    size = Fraction(f"{found[-1]['whole'].replace(',', '') or '0'}{found[-1]['part'] or ''}")
    return -size if found[-1]["sign"] else size


def reward_exact(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """Return 1 where a response is the answer, spaces around both left out, and 0 otherwise."""
    return [float(x.strip() == str(row["answer"]).strip()) for x, row in zip(responses, rows, strict=True)]


def reward_last_number(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """Return 1 where the last numbers of response and answer are the same, and 0 otherwise."""
    wanted = [last_number(str(row["answer"])) for row in rows]
    return [float(w is not None and last_number(x) == w) for x, w in zip(responses, wanted, strict=True)]


def reward_regex(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """Return 1 where the answer, a regular expression, is found in the response, and 0 otherwise."""
    return [float(re.search(str(row["answer"]), x) is not None) for x, row in zip(responses, rows, strict=True)]


def reward_length(
    prompts: list[str],
    responses: list[str],
    rows: list[Row],
    target: int | None = None,
    limit: int | None = None,
    unit: str = "characters",
) -> list[float]:
    """Return how far a response's length is from what is wanted, as a number that is 0 at best and negative else.

    Args:
        prompts: not looked at.
        responses: texts.
        rows: not looked at.
        target: the length wanted; the reward is -|length - target| (the first example of TRL's documentation).
        limit: the greatest length wanted; the reward is -max(0, length - limit).
        unit: of lengths, ``characters`` or ``words`` (what spaces part).

    Raises:
        ToyError: not one of target and limit is given, or a value is not allowed.

    >>> reward_length(["", ""], ["abcd", "a b"], [{}, {}], target=3)
    [-1.0, 0.0]
    >>> reward_length(["", ""], ["a b c d", "a b"], [{}, {}], limit=3, unit="words")
    [-1.0, 0.0]
    """
    given = {name: value for name, value in (("target", target), ("limit", limit)) if value is not None}
    require(len(given) == 1, f"{ARGUMENTS}: {given} is not allowed for length; give {{target: N}} or {{limit: N}}")
    ((name, wanted),) = given.items()
    require(type(wanted) is int, f"{ARGUMENTS}.{name}: {wanted!r} is not allowed; give an integer >= 0")
    bounded(f"{ARGUMENTS}.{name}", wanted, 0)
    require(unit in UNITS, f"{ARGUMENTS}.unit: {unit} is not allowed; give {' or '.join(UNITS)}")
    beyond = [UNITS[unit](x) - wanted for x in responses]
    return [float(-abs(x) if name == "target" else -max(0, x)) for x in beyond]


UNITS: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
REWARDS: dict[str, Callable[..., Sequence[float]]] = {
    "exact": reward_exact, "last_number": reward_last_number, "regex": reward_regex, "length": reward_length,
}  # fmt: skip
COMPARING = ("exact", "last_number", "regex")  # with the answer


def find_reward(name: str, arguments: Mapping[str, Any] | None = None) -> Reward:
    """Return a reward by its name in :data:`REWARDS`, or as ``module.function``.

    Args:
        name: of the reward.
        arguments: of the function, by name, beside prompts, responses and rows.

    Raises:
        ToyError: there is none, or it takes no such arguments.
    """
    function, given = find_function(name), dict(arguments or {})
    try:
        inspect.signature(function).bind([], [], [], **given)
    except TypeError as error:
        raise ToyError(f"{ARGUMENTS}: {given} is not allowed for {name}: {error}") from None
    except ValueError:  # a function written in C may have no signature
        pass
    reward: Reward = partial(function, **given) if given else function
    if name in REWARDS:
        reward([], [], [])  # looks at its arguments
    return reward


def find_function(name: str) -> Callable[..., Sequence[float]]:
    """Return the function of a reward, without its arguments.

    Raises:
        ToyError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    allowed = f"give one of {', '.join(REWARDS)}, or module.function"
    require("." in str(name), f"{REWARD}: {name} is not allowed{did_you_mean(str(name), REWARDS)}; {allowed}")
    try:
        found: Any = load_class(name)
    except ToyError as error:
        raise ToyError(f"{REWARD}: {str(error).replace('has no class', 'has no function')}; {allowed}") from None
    require(callable(found), f"{REWARD}: {name} is no function; {allowed}")
    function: Callable[..., Sequence[float]] = found
    return function


def checked_rewards(
    reward: Reward, name: str, prompts: list[str], responses: list[str], rows: list[Row]
) -> list[float]:
    """Return a reward's numbers, if they are that.

    Args:
        reward: the function.
        name: of it, for errors.
        prompts: texts.
        responses: texts.
        rows: of the file.

    Raises:
        ToyError: the function fails, or does not return a finite number for each response.
    """
    try:
        found = list(reward(prompts, responses, rows))
    except Exception as error:  # a function of the user's
        text = " ".join(str(error).split())[:160]
        raise ToyError(f"{REWARD}: {name} fails: {type(error).__name__}: {text}") from error
    require(
        len(found) == len(responses),
        f"{REWARD}: {name} returned {len(found)} numbers for {len(responses)} responses; give one for each",
    )
    out = []
    for value in found:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        require(math.isfinite(number), f"{REWARD}: {name} returned {str(value)[:40]}; give finite numbers")
        out.append(number)
    return out
