"""generative_policy's MeanFlow: CPU time of one replica's step of `fit`, beside the same training jitted by JAX.

    python benchmarks/jitted_policy_speed.py [--quick] [--write]        # needs the extra bench

The recipe as shipped (configs/generative_policy/meanflow.yaml: 6 residual SiLU layers of 128, 256 pairs a step coupled
by optimal transport in groups of 64, tangent u(z, t, t) on half of the rows, cosine rates, clipping, moving average,
Muon), and the same with AdamW. One core, single precision.

- ours: `fit`, from one Trainer batch to another, as benchmarks/policy_speed.py times it.
- JAX: the whole training in one program, ``jax.jit(lax.scan)`` over steps: draws, assignments, loss with ``jax.jvp``,
  clipping, optimiser and moving average are inside; nothing is checked, logged or kept. Assignments are scipy's, as
  ours, called back from within the program (``jax.pure_callback``), for 50 steps at once: a call costs a millisecond.
  Newton and Schulz's steps are in single precision:
  XLA's half precision is slower on a CPU. Of ``jax.vmap`` and ``lax.map`` over replicas the faster. XLA has one thread.
- limit: the products of a step at the speed of one large product in single precision (ours takes those of Newton and
  Schulz in bfloat16 where the processor has instructions for it), and one fused AdamW step of the weights in cache.

Before anything is timed, JAX's loss and its gradient are compared with ours on the same weights, pairs and times, and
its Newton-Schulz against ours.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from jax_loops import adam, clip, clocked, compile_once, layers, orthogonalise, over_replicas, zero_moments

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from measuring import arguments, fit, report
from peers import adam_seconds, peer_head, peer_line, product_speed
from policy_speed import ADAMW, RECIPE
from scipy.optimize import linear_sum_assignment

from lightning_toys.generative_policy import MeanFlowPolicy, MixtureData
from lightning_toys.generative_policy.mixture import ThreeModes
from lightning_toys.training.allocator import keep_freed_memory
from lightning_toys.training.muon import orthogonalise as our_orthogonalise

WIDTH, LAYERS, BATCH, GROUP, SHARE = 128, 6, 256, 64, 0.5
POWER, FLOOR, TARGET_STD, STD, CLIP, EMA = 0.5, 1e-3, 0.01, 0.02, 1.0, 0.999
BLOCK = 50  # steps drawn at once
LR, MUON_LR, MOMENTUM = 3e-3, 0.02, 0.95
SIZES = [5, *[WIDTH] * LAYERS, 3]  # z, t - r, t, t to u and the head
RECIPES = {"as shipped": [], "AdamW": [ADAMW]}
AIMS = {("AdamW", 4): 1.1, ("as shipped", 4): 0.9}


# JAX


def net(weights: Any, z: Any, r: Any, t: Any) -> Any:
    """Return u and the head's number, (B, 3)."""
    (W, b), *hidden, (last, bias) = weights
    h = jax.nn.silu(jnp.concatenate([z, t - r, t, t], -1) @ W + b)
    for W, b in hidden:
        h = h + jax.nn.silu(h @ W + b)
    return h @ last + bias


def loss_of(weights: Any, x: Any, e: Any, r: Any, t: Any, k: int) -> Any:
    """Return the loss of pairs x, e (B, 2) at times r, t (B, 1), r < t in the first k rows."""
    z, v = (1 - t) * x + t * e, e - x
    direction = net(lax.stop_gradient(weights), z[:k], t[:k], t[:k])[:, :2]
    tangent = (direction, jnp.ones_like(t[:k]))
    first, along = jax.jvp(lambda z, t: net(weights, z, r[:k], t), (z[:k], t[:k]), tangent)
    f = jnp.concatenate([first, net(weights, z[k:], r[k:], t[k:])])
    along = (t - r)[:k] * lax.stop_gradient(along)[:, :2]
    error = f[:, :2] - v + jnp.concatenate([along, jnp.zeros_like(v[k:])])
    square = jnp.sum(error**2, -1)
    loss = square * (lax.stop_gradient(square) + FLOOR) ** -POWER
    log_sigma = 7 * jnp.tanh(f[:, 2]) - 5
    return jnp.mean(loss + (log_sigma - math.log(TARGET_STD)) ** 2)


def assigned(x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Return e (..., B, 2) in the order of the assignments of each group."""
    points, noise = (np.asarray(a).reshape(-1, GROUP, 2) for a in (x, e))
    pairs = zip(points, noise, strict=True)
    out = [b[linear_sum_assignment(a @ b.T, maximize=True)[1]] for a, b in pairs]
    return np.stack(out).reshape(e.shape)


def draws(key: Any) -> tuple[Any, Any, Any, Any]:
    """Return x and e (B, 2), not yet coupled, and times r, t (B, 1)."""
    target = ThreeModes(STD)
    means, edges = jnp.asarray(target.means.numpy(), jnp.float32), jnp.asarray(target.weights.cumsum(0).numpy()[:-1])
    which, place, noise, times = jax.random.split(key, 4)
    component = jnp.searchsorted(edges.astype(jnp.float32), jax.random.uniform(which, (BATCH,)), side="right")
    x = means[component] + STD * jax.random.normal(place, (BATCH, 2))
    e = jax.random.normal(noise, (BATCH, 2))
    both = jax.random.uniform(times, (BATCH, 2))
    apart = jnp.arange(BATCH)[:, None] < round(SHARE * BATCH)
    low, high, one = both.min(-1, keepdims=True), both.max(-1, keepdims=True), both[:, :1]
    return x, e, jnp.where(apart, low, one), jnp.where(apart, high, one)


def shipped_step(weights: Any, state: Any, grads: Any, step: Any, decay: Any) -> Any:
    """Return weights and state after a step of Muon on the hidden matrices, and of AdamW on the rest."""
    momentum, moments = state
    hidden = [W for W, _ in grads[1:-1]]
    momentum = [MOMENTUM * m + (1 - MOMENTUM) * g for m, g in zip(momentum, hidden, strict=True)]
    updates = [orthogonalise(MOMENTUM * m + (1 - MOMENTUM) * g) for m, g in zip(momentum, hidden, strict=True)]

    def rest(tree: Any) -> Any:
        return [tree[0], *[b for _, b in tree[1:-1]], tree[-1]]

    others, moments = adam(rest(weights), moments, rest(grads), step, LR * decay)
    matrices = [W - MUON_LR * decay * u for (W, _), u in zip(weights[1:-1], updates, strict=True)]
    weights = [others[0], *zip(matrices, others[1:-1], strict=True), others[-1]]
    return weights, (momentum, moments)


def train(recipe: str, steps: int, key: Any) -> Any:
    """Train one network; return its weights, their moving average and the last loss."""
    key, first = jax.random.split(key)
    weights = layers(first, SIZES)
    state: Any = zero_moments(weights)
    if recipe == "as shipped":
        rest = [weights[0], *[b for _, b in weights[1:-1]], weights[-1]]
        state = [jnp.zeros_like(W) for W, _ in weights[1:-1]], zero_moments(rest)

    def step_of(carry: Any, drawn: Any) -> Any:
        weights, average, state = carry
        number, x, e, r, t = drawn
        loss, grads = jax.value_and_grad(loss_of)(weights, x, e, r, t, round(SHARE * BATCH))
        grads = clip(grads, CLIP)
        decay = 0.5 * (1 + jnp.cos(math.pi * number / steps))
        if recipe == "as shipped":
            weights, state = shipped_step(weights, state, grads, number + 1, decay)
        else:
            weights, state = adam(weights, state, grads, number + 1, LR * decay)
        average = jax.tree.map(lambda a, w: EMA * a + (1 - EMA) * w, average, weights)
        return (weights, average, state), loss

    def block_of(carry: Any, numbers: Any) -> Any:
        x, e, r, t = jax.vmap(lambda n: draws(jax.random.fold_in(key, n)))(numbers)
        shape = jax.ShapeDtypeStruct(e.shape, e.dtype)
        e = jax.pure_callback(assigned, shape, x, e, vmap_method="broadcast_all")
        return lax.scan(step_of, carry, (numbers, x, e, r, t))

    numbers = jnp.arange(steps).reshape(-1, BLOCK)
    (weights, average, _), losses = lax.scan(block_of, (weights, weights, state), numbers)
    return weights, average, losses[-1, -1]


@cache
def jitted(recipe: str, replicas: int, steps: int, way: str) -> tuple[Callable[[Any], Any], float]:
    """Return a compiled training of several replicas, of their keys, and the seconds that it took to compile."""
    many = over_replicas(partial(train, recipe, steps), way)
    return compile_once(many, jax.random.split(jax.random.key(0), replicas))


def jax_loop(recipe: str, replicas: int, steps: int, way: str) -> float:
    """Return CPU seconds per replica-step."""
    compiled, _ = jitted(recipe, replicas, steps, way)
    (*_, loss), taken = clocked(compiled, jax.random.split(jax.random.key(1), replicas))
    assert bool(jnp.isfinite(loss).all())
    return taken / steps / replicas


# compared with ours


def check() -> None:
    """Stop where JAX's loss, gradient or Newton-Schulz are not ours on the same numbers."""
    settings: dict[str, Any] = {"network": {"hidden": WIDTH, "layers": LAYERS, "activation": "silu", "residual": True}}
    settings |= {"form": "plain", "loss_power": POWER, "loss_floor": FLOOR, "target_std": TARGET_STD}
    policy, data = MeanFlowPolicy([0], **settings), MixtureData()
    policy.sizes = policy.measure(data)
    policy.configure_model()
    key = jax.random.key(3)
    x, e, r, t = draws(key)
    k = round(SHARE * BATCH)
    theirs, grads = jax.jit(jax.value_and_grad(loss_of), static_argnums=5)(weights_of(policy), x, e, r, t, k)
    columns = [torch.from_numpy(np.array(a))[None] for a in (x, e, r, t)]
    ours = policy.losses(*columns, k, data.target, BATCH)[0]
    ours.backward()
    np.testing.assert_allclose(float(theirs), float(ours.detach()), rtol=1e-5)
    for name, ours_in in gradients_of(policy).items():
        scale = float(ours_in.abs().max())
        np.testing.assert_allclose(flat(grads)[name], ours_in.numpy(), rtol=1e-3, atol=1e-4 * scale, err_msg=name)
    g = torch.randn(1, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, other = our_orthogonalise(g)[0].numpy(), np.asarray(orthogonalise(jnp.asarray(g[0].numpy(), jnp.float32)))
    np.testing.assert_allclose(other, mine, atol=1e-3)


def layer_names() -> list[str]:
    """Return the layers' names in our network."""
    return ["first", *[f"hidden.{i}" for i in range(LAYERS - 1)], "last"]


def weights_of(policy: MeanFlowPolicy) -> Any:
    """Return the first replica's weights as JAX's."""
    found = {n: jnp.asarray(p[0].detach().numpy()) for n, p in policy.net.net.named_parameters()}
    return [(found[f"{n}.weight"], found[f"{n}.bias"][0]) for n in layer_names()]


def gradients_of(policy: MeanFlowPolicy) -> dict[str, torch.Tensor]:
    """Return the first replica's gradients by name."""
    return {n: p.grad[0] for n, p in policy.net.net.named_parameters()}


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Return JAX's gradients by our names, shaped as ours."""
    pairs = zip(layer_names(), tree, strict=True)
    return {
        k: v for n, (W, b) in pairs for k, v in ((f"{n}.weight", np.asarray(W)), (f"{n}.bias", np.asarray(b)[None]))
    }


# the table


def limit(recipe: str) -> float:
    """Return the seconds of one replica-step's products, and of its AdamW step in cache."""
    products = [2 * p * q for p, q in itertools.pairwise(SIZES)]
    rows = sum(products)
    apart = SHARE * BATCH
    flops = BATCH * (3 * rows - products[0])  # forward, weights' and inputs' gradients; none of the first inputs'
    flops += apart * 2 * rows  # the tangent's direction, and the tangent
    if recipe == "as shipped":
        flops += (LAYERS - 1) * 5 * 3 * 2 * WIDTH**3
    return flops / product_speed() + adam_seconds(sum((p + 1) * q for p, q in itertools.pairwise(SIZES)))


def rows_of(recipe: str, replicas: int, steps: int) -> dict[str, float]:
    """Take each row once: seconds per replica-step."""
    out = {"ours": fit(RECIPE, RECIPES[recipe], replicas, steps) / replicas}
    for way in ("vmap", "map") if replicas > 1 else ("vmap",):
        out[f"JAX, {way}"] = jax_loop(recipe, replicas, steps, way)
    return out | {"limit": limit(recipe)}


def table(counts: tuple[int, ...], rounds: int, steps: int) -> Iterator[str]:
    """Measure, interleaved, and yield the table's lines."""
    cells = list(itertools.product(RECIPES, counts))
    taken: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for recipe, replicas in cells:
            taken[recipe, replicas].append(rows_of(recipe, replicas, steps))
    yield from peer_head(("MeanFlow", "replicas"), "µs")
    for (recipe, replicas), found in taken.items():
        ways = [name for name in found[0] if name.startswith("JAX")]
        compiling = {name: jitted(recipe, replicas, steps, name.split()[1])[1] for name in ways}
        yield peer_line([recipe, replicas], found, "µs", AIMS.get((recipe, replicas)), compiling, replicas)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    check()
    rounds, steps = (1, 50) if args.quick else (5, 200)
    begin = time.process_time()
    lines = list(table((1, 4), rounds, steps))
    about = (
        f"Medians of {rounds} interleaved rounds of {steps} steps, with their range; time of a replica-step. CPU time, "
        f"{time.process_time() - begin:.0f} s in all; jax {jax.__version__}."
    )
    report("jitted_policy_speed.py", "MeanFlow beside a jitted loop", about, lines, args.write)


if __name__ == "__main__":
    main()
