"""CPU time of one replica's optimiser step of `fit`, beside jitted JAX loops and the machine's limit.

    python benchmarks/jitted_speed.py [--quick] [--write]        # needs the extra bench

Rows, for each objective (regression, flow), width (three hidden layers, 50 points in batches of 32 and 18) and number
of replicas R, all in single precision on one core:

- ours: `fit`, as benchmarks/training_speed.py times it: from one Trainer batch to another, with shuffles, keyed noise,
  checks, logs and a checkpoint every 1000 steps.
- JAX: a whole training in one program, ``jax.jit(lax.scan)`` over epochs of two steps; shuffles, noise, times and Adam
  are inside, nothing is logged or kept. Of ``jax.vmap`` and ``lax.map`` over the replicas the faster one. XLA has one
  thread. The first call, which compiles, is timed alone; the last column has the steps of all replicas that repay it.
- compiled step: ``torch.compile`` of forward and backward of the bare loop, with fused AdamW; one network.
- bare loop: the same without ``torch.compile``.
- vmap: R networks by ``torch.func.vmap`` over ``grad`` of ``functional_call``, fused AdamW.
- limit: a step's products of matrices at the speed of one large product, plus one fused AdamW step of one replica's
  weights, which are in the cache. Nothing that calls BLAS comes below it; the third number is its share of our time.

Time is CPU time of the whole process. A round takes each row once, ratios are taken within a round; medians and ranges.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from jax_loops import LR, clocked, compile_once, inputs_of, over_replicas, train

# isort: split
import jax
import jax.numpy as jnp
import torch
from measuring import arguments, report
from peers import adam_seconds, peer_head, peer_line, product_speed
from torch import nn
from training_speed import BATCH, MODES, WARM, bare_loop, fit, network, objective, points

from lightning_toys.training.allocator import keep_freed_memory

AIMS = {(256, 1): 1.5, (256, 8): 1.0, (256, 16): 1.0, (256, 64): 1.0, (64, 1): 3.0, (64, 16): 1.2, (64, 64): 1.2}
BARE_AIM = 0.75


# JAX


@cache
def jitted(mode: str, width: int, replicas: int, epochs: int, way: str) -> tuple[Callable[[Any], Any], float]:
    """Return a compiled training of several replicas, of their keys, and the seconds that it took to compile."""
    c, x1 = (jnp.asarray(p.numpy()) for p in points())
    many = over_replicas(partial(train, mode, width, epochs, c, x1), way)
    return compile_once(many, jax.random.split(jax.random.key(0), replicas))


def jax_loop(mode: str, width: int, replicas: int, steps: int, way: str) -> float:
    """Return CPU seconds per replica-step."""
    compiled, _ = jitted(mode, width, replicas, steps // 2, way)
    keys = jax.random.split(jax.random.key(1), replicas)
    (_, loss), taken = clocked(compiled, keys)
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
    sizes = [inputs_of(mode), width, width, width, 1]
    rows = 25  # on average, of batches of 32 and 18
    products = [2 * rows * p * q for p, q in itertools.pairwise(sizes)]
    flops = 3 * sum(products) - products[0]  # forward, weights' and inputs' gradients; none of the first inputs'
    parameters = sum((p + 1) * q for p, q in itertools.pairwise(sizes))
    return flops / product_speed() + adam_seconds(parameters)


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
    yield from peer_head(("objective", "width", "replicas"), "µs")
    for (width, replicas, mode), found in taken.items():
        many = steps_of(replicas, steps)
        ways = [name for name in found[0] if name.startswith("JAX")]
        compiling = {name: jitted(mode, width, replicas, many // 2, name.split()[1])[1] for name in ways}
        aim = AIMS.get((width, replicas))
        yield peer_line([mode, width, replicas], found, "µs", aim, compiling, replicas)
    yield from ["", "Beside the bare loop alone:", ""]
    yield from peer_head(("objective", "width", "replicas"), "µs")
    for (width, replicas, mode), found in taken.items():
        if replicas == 1:
            two = [{name: f[name] for name in ("ours", "bare loop", "limit")} for f in found]
            yield peer_line([mode, width, replicas], two, "µs", BARE_AIM)


def main() -> None:
    args = arguments(__doc__).parse_args()
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
    report("jitted_speed.py", "Training beside a jitted loop", about, lines, args.write)


if __name__ == "__main__":
    main()
