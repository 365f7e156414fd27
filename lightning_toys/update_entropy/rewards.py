"""Rewards of responses: some that are shipped, and functions of one's own.

A reward is a function of three lists of one length: prompts and responses as texts, and the rows of the file that the
prompts come from, as dictionaries in which ``answer`` is the answer's column. It returns a number for each response.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lightning_toys.errors import ToyError, did_you_mean, require
from lightning_toys.imports import load_class
from lightning_toys.update_entropy.word_problems import NUMBER

REWARD = "--data.reward"
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


REWARDS: dict[str, Reward] = {"exact": reward_exact, "last_number": reward_last_number, "regex": reward_regex}


def find_reward(name: str) -> Reward:
    """Return a reward by its name in :data:`REWARDS`, or as ``module.function``.

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
    reward: Reward = found
    return reward


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
