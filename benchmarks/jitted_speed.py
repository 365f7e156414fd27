"""CPU time of one replica's optimiser step of `fit`, beside jitted JAX loops and the machine's limit.

    python benchmarks/jitted_speed.py [--quick] [--write]        # needs jax: pip install jax

Rows, for each objective (regression, flow), width (three hidden layers, 50 points in batches of 32 and 18) and number
of replicas R, all in single precision on one core:

- ours: `fit`, as benchmarks/training_speed.py times it: from one Trainer batch to another, with shuffles, keyed noise,
  checks, logs and a checkpoint every 1000 steps.
- JAX: a whole training in one program, ``jax.jit(lax.scan)`` over epochs of two steps; shuffles, noise, times and Adam
  are inside, nothing is logged or kept. Of ``jax.vmap`` and ``lax.map`` over the replicas the faster one. XLA has one
  thread. The first call, which compiles, is told apart; the last column has the steps after which it is repaid.
- compiled step: ``torch.compile`` of forward and backward of the bare loop, with fused AdamW; one network.
- bare loop: the same without ``torch.compile``.
- vmap: R networks by ``torch.func.vmap`` over ``grad`` of ``functional_call``, fused AdamW.
- limit: a step's products of matrices at the speed of one large product, plus one fused AdamW step of one replica's
  weights, which are in the cache. Nothing that calls BLAS comes below it; the third number is its share of our time.

Time is CPU time of the whole process. A round takes each row once, ratios are taken within a round; medians and ranges.
"""

# ruff: noqa: E402  XLA reads its flags when jax is imported
from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA takes as many threads as there are cores

import jax
import jax.numpy as jnp
import torch
from jax import lax
from measuring import machine, spread, write_section
from torch import nn
from training_speed import BATCH, MODES, WARM, bare_loop, fit, network, objective, points

from lightning_toys.training.allocator import keep_freed_memory

LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
AIMS = {(256, 1): 1.5, (256, 8): 1.0, (256, 16): 1.0, (256, 64): 1.0, (64, 1): 3.0, (64, 16): 1.2, (64, 64): 1.2}

COLUMNS = (
    *("width", "replicas", "objective", "ours, µs", "best peer, µs", "which", "ours / best peer", "aim"),
    *("limit, µs", "its share of ours", "JAX compiles, s", "repaid after steps"),
)


# JAX


def jax_init(key: Any, mode: str, width: int) -> Any:
    """Return weights and biases as ``nn.Linear`` draws them."""
    sizes = [2 + (mode == "flow"), width, width, width, 1]
    out = []
    for n, m in itertools.pairwise(sizes):
        key, one, other = jax.random.split(key, 3)
        draw = partial(jax.random.uniform, minval=-(n**-0.5), maxval=n**-0.5)
        out.append((draw(one, (n, m)), draw(other, (m,))))
    return out


def jax_net(weights: Any, x: Any) -> Any:
    """Return the network's output."""
    for W, b in weights[:-1]:
        x = jax.nn.relu(x @ W + b)
    W, b = weights[-1]
    return x @ W + b


def jax_loss(weights: Any, mode: str, key: Any, c: Any, x1: Any) -> Any:
    """Return the loss that `fit` minimises."""
    if mode == "regression":
        return jnp.mean((jax_net(weights, jnp.concatenate([jnp.zeros_like(x1), c], -1)) - x1) ** 2)
    one, other = jax.random.split(key)
    x0, t = jax.random.normal(one, x1.shape), jax.random.uniform(other, x1.shape)
    z = (1 - t) * x0 + t * x1
    return jnp.mean((jax_net(weights, jnp.concatenate([z, c, t], -1)) - (x1 - x0)) ** 2)


def adam(weights: Any, moments: Any, grads: Any, step: Any) -> Any:
    """Return weights and moments after a step of Adam."""
    m = jax.tree.map(lambda a, g: B1 * a + (1 - B1) * g, moments[0], grads)
    v = jax.tree.map(lambda a, g: B2 * a + (1 - B2) * g * g, moments[1], grads)
    rate, root = LR / (1 - B1**step), jnp.sqrt(1 - B2**step)
    weights = jax.tree.map(lambda w, a, b: w - rate * a / (jnp.sqrt(b) / root + EPS), weights, m, v)
    return weights, (m, v)


def train(mode: str, width: int, epochs: int, c: Any, x1: Any, key: Any) -> Any:
    """Train one network; return its weights and last loss."""

    def epoch(carry: Any, number: Any) -> Any:
        weights, moments, key = carry
        key, order = jax.random.split(key)
        order = jax.random.permutation(order, c.shape[0])
        loss = jnp.zeros(())
        for k, rows in enumerate((order[:BATCH], order[BATCH:])):
            key, noise = jax.random.split(key)
            loss, grads = jax.value_and_grad(jax_loss)(weights, mode, noise, c[rows], x1[rows])
            weights, moments = adam(weights, moments, grads, 2 * number + k + 1)
        return (weights, moments, key), loss

    key, first = jax.random.split(key)
    weights = jax_init(first, mode, width)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    (weights, _, _), losses = lax.scan(epoch, (weights, (zeros, zeros), key), jnp.arange(epochs))
    return weights, losses[-1]


@cache
def jitted(mode: str, width: int, replicas: int, epochs: int, way: str) -> tuple[Callable[[Any], Any], float]:
    """Return a compiled training of several replicas, of their keys, and the seconds that it took to compile."""
    c, x1 = (jnp.asarray(p.numpy()) for p in points())
    one = partial(train, mode, width, epochs, c, x1)
    many = jax.vmap(one) if way == "vmap" else partial(lax.map, one)
    start = time.process_time()
    compiled = jax.jit(many).lower(jax.random.split(jax.random.key(0), replicas)).compile()
    return compiled, time.process_time() - start


def jax_loop(mode: str, width: int, replicas: int, steps: int, way: str) -> float:
    """Return CPU seconds per replica-step."""
    compiled, _ = jitted(mode, width, replicas, steps // 2, way)
    keys = jax.random.split(jax.random.key(1), replicas)
    start = time.process_time()
    _, loss = jax.block_until_ready(compiled(keys))
    taken = time.process_time() - start
    assert bool(jnp.isfinite(loss).all())
    return taken / steps / replicas


# torch


@cache
def compiled_net(mode: str, width: int) -> Any:
    """Return the network and its compiled loss."""
    net = network(mode, width)
    return net, torch.compile(partial(objective, mode, net), dynamic=False)


def compiled_step(mode: str, width: int, steps: int) -> float:
    """Return CPU seconds per step of the bare loop whose forward and backward are compiled; one network."""
    torch.manual_seed(0)
    c, x1 = points()
    net, loss_of = compiled_net(mode, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    start = 0.0
    for step in range(WARM + steps):
        if step == WARM:
            start = time.process_time()
        if step % 2 == 0:
            order = torch.randperm(len(c))
        rows = order[:BATCH] if step % 2 == 0 else order[BATCH:]
        loss = loss_of(c[rows], x1[rows], torch.zeros(len(rows), 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - start) / steps


def vmap_loop(mode: str, width: int, replicas: int, steps: int) -> float:
    """Return CPU seconds per replica-step of networks stacked by ``torch.func``."""
    torch.manual_seed(0)
    c, x1 = points()
    nets = [network(mode, width) for _ in range(replicas)]
    stacked, _ = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    parameters = {k: nn.Parameter(v.detach()) for k, v in stacked.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)

    def loss_of(weights: dict[str, torch.Tensor], c: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        call: Any = lambda x: torch.func.functional_call(nets[0], weights, (x,))  # noqa: E731
        return objective(mode, call, c, x1, torch.zeros_like(x1))

    grads_of = torch.func.vmap(torch.func.grad(loss_of), randomness="different")
    start = 0.0
    for step in range(WARM + steps):
        if step == WARM:
            start = time.process_time()
        if step % 2 == 0:
            order = torch.rand(replicas, len(c)).argsort(1)
        rows = order[:, :BATCH] if step % 2 == 0 else order[:, BATCH:]
        grads = grads_of({k: p.detach() for k, p in parameters.items()}, c[rows], x1[rows])
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
    return (time.process_time() - start) / steps / replicas


def limit(mode: str, width: int) -> float:
    """Return the seconds of one replica-step's products at the speed of a large one, and of its Adam step in cache."""
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    torch.mm(a, b)
    start = time.process_time()
    for _ in range(4):
        torch.mm(a, b)
    speed = 4 * 2 * n**3 / (time.process_time() - start)
    sizes = [2 + (mode == "flow"), width, width, width, 1]
    rows = 25  # on average, of batches of 32 and 18
    products = [2 * rows * p * q for p, q in itertools.pairwise(sizes)]
    flops = 3 * sum(products) - products[0]  # forward, weights' and inputs' gradients; none of the first inputs'
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in network(mode, width).parameters()]))
    optimizer = torch.optim.AdamW([flat], lr=LR, weight_decay=0.0, fused=True)
    flat.grad = torch.randn_like(flat)
    optimizer.step()
    state: Any = optimizer.state[flat]
    moments = [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
    settings = {
        "lr": LR,
        "beta1": B1,
        "beta2": B2,
        "weight_decay": 0.0,
        "eps": EPS,
        "amsgrad": False,
        "maximize": False,
    }
    kernel: Any = torch._fused_adamw_
    start = time.process_time()
    with torch.no_grad():
        for _ in range(200):
            kernel([flat], [flat.grad], *moments, **settings)
    return flops / speed + (time.process_time() - start) / 200


def steps_of(replicas: int, steps: int) -> int:
    """Return an even number of steps, fewer where many replicas take them."""
    return max(2, steps // max(1, replicas // 4) // 2 * 2)


def rows_of(mode: str, width: int, replicas: int, steps: int) -> dict[str, float]:
    """Take each row once: seconds per replica-step."""
    many = steps_of(replicas, steps)
    out = {"ours": fit(mode, width, replicas, many) / replicas}
    out["JAX, vmap"] = jax_loop(mode, width, replicas, many, "vmap")
    if replicas > 1:
        out["JAX, map"] = jax_loop(mode, width, replicas, many, "map")
        out["torch.func.vmap"] = vmap_loop(mode, width, replicas, many)
    else:
        out["compiled step"] = compiled_step(mode, width, steps)
        out["bare loop"] = bare_loop(mode, width, steps)
    out["limit"] = limit(mode, width)
    return out


def table(widths: tuple[int, ...], counts: tuple[int, ...], rounds: int, steps: int) -> Iterator[str]:
    """Measure, interleaved, and yield the table's lines."""
    cells = list(itertools.product(widths, counts, MODES))
    taken: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for width, replicas, mode in cells:
            taken[width, replicas, mode].append(rows_of(mode, width, replicas, steps))
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for (width, replicas, mode), found in taken.items():
        middle = {name: statistics.median(f[name] for f in found) for name in found[0]}
        peers = [n for n in middle if n not in ("ours", "limit")]
        best = min(peers, key=lambda n: middle[n])
        ratios = [f["ours"] / f[best] for f in found]
        aim = AIMS.get((width, replicas))
        said = "" if aim is None else f"≤ {aim}: {'met' if statistics.median(ratios) <= aim else 'missed'}"
        way = min((n for n in middle if n.startswith("JAX")), key=lambda n: middle[n])
        many = steps_of(replicas, steps)
        compiling = jitted(mode, width, replicas, many // 2, way.split()[1])[1]
        gain = (middle["ours"] - middle[way]) * replicas
        repaid = f"{compiling / gain:.0f}" if gain > 0 else "never"
        micro = {name: f"{seconds * 1e6:.0f}" for name, seconds in middle.items()}
        line = [width, replicas, mode, micro["ours"], micro[best], best, spread(ratios), said]
        line += [micro["limit"], f"{middle['limit'] / middle['ours']:.0%}", f"{compiling:.1f}", repaid]
        yield f"| {' | '.join(map(str, line))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: does it run?")
    parser.add_argument("--write", action="store_true", help="write the tables into RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rounds, steps = (1, 100) if args.quick else (5, 1000)
    counts = (1, 8) if args.quick else (1, 8, 16, 64)
    begin = time.process_time()
    lines = list(table((64, 256), counts, rounds, steps))
    about = (
        f"Medians of {rounds} interleaved rounds, with their range; time of a replica-step. CPU time, "
        f"{time.process_time() - begin:.0f} s in all; jax {jax.__version__}."
    )
    head = ["# Beside a jitted loop", "Written by `benchmarks/jitted_speed.py --write`, which explains each row."]
    text = "\n\n".join([*head, machine(), about, "\n".join(lines)])
    print(text)
    if args.write:
        write_section("jitted_speed.py", text)


if __name__ == "__main__":
    main()
