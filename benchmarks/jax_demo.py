"""The work of `make demo` as one JAX script, which benchmarks/demo_speed.py runs in a process of its own.

    python benchmarks/jax_demo.py EPOCHS

Regression and flow, 8 seeds each, EPOCHS passes over 50 points of sin(2c + .3) + cos(5c + .7) + sin(11c + 1.3); then
every readout that `test` takes, on 1000 points: regression from zeros and from 8 Gaussian draws; flow by euler (1, 2,
4, 9 evaluations), midpoint (2, 4), rk4 (4) and dopri5, from both. Prints l1, l2 and the draws' spread as JSON, means
over seeds. Replicas go one after the other (``lax.map``), which is faster at this width than ``jax.vmap``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jax_loops import mlp, train

# isort: split
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.ode import odeint

SEEDS, WIDTH, POINTS, GRID, DRAWS = 8, 256, 50, 1000, 8
RTOL, ATOL = 1e-4, 1e-5
FIXED = {"euler": (1, 2, 4, 9), "midpoint": (2, 4), "rk4": (4,)}


def target(c: Any) -> Any:
    """Return f(c), shaped as c."""
    return jnp.sin(2 * c + 0.3) + jnp.cos(5 * c + 0.7) + jnp.sin(11 * c + 1.3)


def one_step(solver: str, v: Callable[[Any, Any], Any], x: Any, t: Any, h: Any) -> Any:
    """Return x after a step of size h; rk4 is the 3/8 rule, as torchdiffeq's."""
    k1 = v(x, t)
    if solver == "euler":
        return x + h * k1
    if solver == "midpoint":
        return x + h * v(x + h / 2 * k1, t + h / 2)
    k2 = v(x + h / 3 * k1, t + h / 3)
    k3 = v(x + h * (k2 - k1 / 3), t + 2 * h / 3)
    k4 = v(x + h * (k1 - k2 + k3), t + h)
    return x + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8


def fixed_steps(solver: str, nfe: int, v: Callable[[Any, Any], Any], x: Any) -> Any:
    """Return x(1) after equal steps of ``nfe`` evaluations in all."""
    n = nfe // {"euler": 1, "midpoint": 2, "rk4": 4}[solver]
    return lax.fori_loop(0, n, lambda i, x: one_step(solver, v, x, i / n, 1 / n), x)


def readouts(mode: str) -> Iterator[tuple[str, Callable[[Any, Any, Any], Any]]]:
    """Yield names and functions of weights, c and x0 (M, 1) to predictions (M, 1)."""
    if mode == "regression":
        yield "direct", lambda weights, c, x0: mlp(weights, jnp.concatenate([x0, c], -1))
        return

    def velocity(weights: Any, c: Any) -> Callable[[Any, Any], Any]:
        return lambda x, t: mlp(weights, jnp.concatenate([x, c, jnp.full_like(x, t)], -1))

    for solver, nfes in FIXED.items():
        for nfe in nfes:
            step = partial(fixed_steps, solver, nfe)
            yield f"{solver}-{nfe}", lambda weights, c, x0, step=step: step(velocity(weights, c), x0)
    ends = jnp.array([0.0, 1.0])

    def dopri5(weights: Any, c: Any, x0: Any) -> Any:
        return odeint(velocity(weights, c), x0, ends, rtol=RTOL, atol=ATOL, mxstep=10_000)[-1]

    yield "dopri5", dopri5


def scores(mode: str, weights: Any, key: Any) -> dict[str, Any]:
    """Return the errors of one replica's predictions, and the draws' spread, by readout and start."""
    c = jnp.linspace(0, 1, GRID)[:, None]
    x0 = jnp.concatenate([jnp.zeros((1, GRID, 1)), jax.random.normal(key, (DRAWS, GRID, 1))])
    out = {}
    for name, predict in readouts(mode):
        predictions = lax.map(partial(predict, weights, c), x0)  # of both starts: one program to compile
        for start, p in (("zeros", predictions[:1]), ("gaussian", predictions[1:])):
            error = p - target(c)
            out |= {f"l1@{start}/{name}": jnp.abs(error).mean(), f"l2@{start}/{name}": jnp.sqrt((error**2).mean())}
        out[f"spread@gaussian/{name}"] = jnp.sqrt(predictions[1:].var(0, ddof=1).mean())
    return out


def run(mode: str, epochs: int) -> dict[str, float]:
    """Train, score, and return means over seeds."""
    c = jnp.linspace(0, 1, POINTS)[:, None]

    def one(key: Any) -> Any:
        weights, loss = train(mode, WIDTH, epochs, c, target(c), key)
        return scores(mode, weights, jax.random.fold_in(key, 1)) | {"loss": loss}

    keys = jax.random.split(jax.random.key(0), SEEDS)
    found = jax.jit(lambda keys: lax.map(one, keys))(keys)
    return {k: float(v.mean()) for k, v in found.items()}


if __name__ == "__main__":
    print(json.dumps({mode: run(mode, int(sys.argv[1])) for mode in ("regression", "flow")}))
