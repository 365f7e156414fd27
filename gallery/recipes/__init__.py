"""The recipes, in the order in which they are built."""

from gallery.recipes import (
    agents,
    bandit,
    bilevel,
    control,
    drawn,
    entropy,
    few_steps,
    flow,
    lags,
    mirror,
    overview,
    policy,
    published,
    world_controls,
    worlds,
)

RECIPES = (
    flow.RECIPE,
    drawn.RECIPE,
    few_steps.RECIPE,
    published.RECIPE,
    policy.RECIPE,
    bandit.RECIPE,
    mirror.RECIPE,
    worlds.RECIPE,
    world_controls.RECIPE,
    entropy.RECIPE,
    bilevel.RECIPE,
    control.RECIPE,
    lags.RECIPE,
    agents.RECIPE,
    overview.RECIPE,
)
