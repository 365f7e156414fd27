"""How many refreshes, and how many action steps, annealed samplers need: one knob is varied, the other stays."""

from __future__ import annotations

import dataclasses

import numpy as np

from lightning_toys.mirror_descent.problem import Settings

# knob to metric to values (R, number of settings)
Curves = dict[str, dict[str, np.ndarray]]


def sweep_settings(settings: Settings, most: int) -> dict[str, dict[int, Settings]]:
    """Return the settings of each sweep: knob to its values to settings.

    ``refresh_L`` goes from 0 to ``most`` at as many action steps a level (or the settings', if those are more):
    refreshes beyond the steps would change nothing. ``action_steps_per_level`` goes from 1 to ``most`` at the settings'
    refreshes. Samplers do not refresh at the end, so that what is left of the last step's s' | a shows.
    """
    if most == 0:
        return {}
    still = dataclasses.replace(settings, final_refresh=False)
    steps = max(most, settings.action_steps_per_level)
    refreshes = {n: dataclasses.replace(still, refresh_L=n, action_steps_per_level=steps) for n in range(most + 1)}
    actions = {n: dataclasses.replace(still, action_steps_per_level=n) for n in range(1, most + 1)}
    return {"refresh_L": refreshes, "action_steps_per_level": actions}
