"""What the jitted JAX loops share: one thread, networks, Adam, Muon, the flow task. It imports no torch.

Import it before jax: XLA reads its flags, and counts the cores, when jax is imported.
"""

# ruff: noqa: E402
from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA takes as many threads as there are cores

import jax
import jax.numpy as jnp
from jax import lax

LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
BATCH = 32  # of the flow task's 50 points
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WAYS = ("vmap", "map")


# programs


def compile_once(function: Callable[..., Any], *args: Any, **jit: Any) -> tuple[Callable[..., Any], float]:
    """Return the function compiled for arguments shaped as these, and the CPU seconds that it took to compile."""
    start = time.process_time()
    compiled = jax.jit(function, **jit).lower(*args).compile()
    return compiled, time.process_time() - start


def clocked(compiled: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return what a compiled function returns, all of it computed, and the CPU seconds that it took."""
    start = time.process_time()
    out = jax.block_until_ready(compiled(*args))
    return out, time.process_time() - start


def over_replicas(one: Callable[..., Any], way: str) -> Callable[..., Any]:
    """Return a function of many replicas' arguments: side by side (``vmap``), or one after the other (``map``)."""
    return jax.vmap(one) if way == "vmap" else lambda *args: lax.map(lambda a: one(*a), args)


# networks and optimisers


def layers(key: Any, sizes: Sequence[int]) -> Any:
    """Return weights and biases as ``nn.Linear`` draws them."""
    out = []
    for n, m in itertools.pairwise(sizes):
        key, one, other = jax.random.split(key, 3)
        draw = partial(jax.random.uniform, minval=-(n**-0.5), maxval=n**-0.5)
        out.append((draw(one, (n, m)), draw(other, (m,))))
    return out


def mlp(weights: Any, x: Any) -> Any:
    """Return the output of layers with ReLU between them."""
    for W, b in weights[:-1]:
        x = jax.nn.relu(x @ W + b)
    W, b = weights[-1]
    return x @ W + b


def adam(weights: Any, moments: Any, grads: Any, step: Any, lr: Any = LR) -> Any:
    """Return weights and moments after step number ``step`` (from 1) of Adam."""
    m = jax.tree.map(lambda a, g: B1 * a + (1 - B1) * g, moments[0], grads)
    v = jax.tree.map(lambda a, g: B2 * a + (1 - B2) * g * g, moments[1], grads)
    rate, root = lr / (1 - B1**step), jnp.sqrt(1 - B2**step)
    weights = jax.tree.map(lambda w, a, b: w - rate * a / (jnp.sqrt(b) / root + EPS), weights, m, v)
    return weights, (m, v)


def zero_moments(weights: Any) -> Any:
    """Return Adam's moments before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return zeros, zeros


def orthogonalise(g: Any, dtype: Any = jnp.float32) -> Any:
    """Return about U V' of a square matrix g = U S V', by five steps of Newton and Schulz in ``dtype``."""
    a, b, c = NEWTON_SCHULZ
    x = (g / jnp.maximum(jnp.linalg.norm(g), 1e-7)).astype(dtype)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.astype(g.dtype)


def clip(grads: Any, bound: float) -> Any:
    """Return gradients whose norm is at most about ``bound``."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, bound / (norm + 1e-6)), grads)


# regression and flow on a few points


def inputs_of(mode: str) -> int:
    """Return the number of the network's inputs: x, c, and flow's t."""
    return 2 + (mode == "flow")


def task_loss(weights: Any, mode: str, key: Any, c: Any, x1: Any) -> Any:
    """Return the loss that `fit` minimises."""
    if mode == "regression":
        return jnp.mean((mlp(weights, jnp.concatenate([jnp.zeros_like(x1), c], -1)) - x1) ** 2)
    one, other = jax.random.split(key)
    x0, t = jax.random.normal(one, x1.shape), jax.random.uniform(other, x1.shape)
    z = (1 - t) * x0 + t * x1
    return jnp.mean((mlp(weights, jnp.concatenate([z, c, t], -1)) - (x1 - x0)) ** 2)


def train(mode: str, width: int, epochs: int, c: Any, x1: Any, key: Any) -> Any:
    """Train one network of three hidden layers; return its weights and last loss."""

    def epoch(carry: Any, number: Any) -> Any:
        weights, moments, key = carry
        key, order = jax.random.split(key)
        order = jax.random.permutation(order, c.shape[0])
        loss = jnp.zeros(())
        for k, rows in enumerate((order[:BATCH], order[BATCH:])):
            key, noise = jax.random.split(key)
            loss, grads = jax.value_and_grad(task_loss)(weights, mode, noise, c[rows], x1[rows])
            weights, moments = adam(weights, moments, grads, 2 * number + k + 1)
        return (weights, moments, key), loss

    key, first = jax.random.split(key)
    weights = layers(first, [inputs_of(mode), width, width, width, 1])
    (weights, _, _), losses = lax.scan(epoch, (weights, zero_moments(weights), key), jnp.arange(epochs))
    return weights, losses[-1]
