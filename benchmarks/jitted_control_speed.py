"""bilevel's control: CPU time of one replica's step of `fit`, beside the whole agent jitted by JAX.

    python benchmarks/jitted_control_speed.py [--quick] [--write]        # needs the extra bench

Agents mle and omd with the settings of configs/bilevel/control.yaml: CartPole-v1, values of two heads and a model of
two hidden layers of 32, batches of 256, a replay of 200 000 transitions, a step of the model and one of the values to
each step of the environment; steps after the first 1000, which are random. One core, single precision.

- ours: `fit`, from one Trainer batch to another: keyed draws, checks, logs every 500 steps, a checkpoint every 1000.
  Evaluations are left out.
- JAX: the whole loop in one program, ``jax.jit(lax.scan)`` over steps: policy, physics, resets, replay, values and
  model are inside; nothing is checked, logged or kept. Of ``jax.vmap`` and ``lax.map`` over replicas the faster.
- no limit: networks this small are far from what products of matrices cost.

Before anything is timed, JAX's CartPole is compared with gymnasium's, and its gradients with ours on the same
weights and transitions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from jax_loops import adam, clocked, compile_once, over_replicas, zero_moments

# isort: split
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from measuring import arguments, fit, report
from peers import peer_head, peer_line

from lightning_toys.bilevel.control.agents import SoftValue
from lightning_toys.bilevel.control.cartpole import CartPole
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner, Solver
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.training.allocator import keep_freed_memory

WIDTH, HEADS, BATCH, CAPACITY, RANDOM_STEPS = 32, 2, 256, 200_000, 1000
ALPHA, DISCOUNT, EPSILON, LR, INNER_LR, TAU = 0.01, 0.99, 0.1, 1e-3, 3e-4, 0.01
AGENTS = ("mle", "omd")
AIMS = {1: 2.5, 8: 1.0}


# CartPole


def physics(state: Any, action: Any) -> Any:
    """Return the state (4,) after an action, as gymnasium's CartPole-v1 has it."""
    x, v, theta, omega = state
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    force = jnp.where(action == 1, 10.0, -10.0)
    temp = (force + 0.05 * omega**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = temp - 0.05 * theta_acc * cos / 1.1
    return jnp.stack([x + 0.02 * v, v + 0.02 * x_acc, theta + 0.02 * omega, omega + 0.02 * theta_acc])


def fallen(state: Any) -> Any:
    """Whether the task is over."""
    return (jnp.abs(state[0]) > CartPole.X_THRESHOLD) | (jnp.abs(state[2]) > CartPole.THETA_THRESHOLD)


def first_state(key: Any) -> Any:
    """Return the first state of an episode."""
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


# values and model: weights of layers w (K, n, m), b (K, 1, m)


def networks(key: Any, sizes: tuple[int, ...], heads: int) -> Any:
    """Return weights and biases of so many heads."""
    out = []
    for n, m in itertools.pairwise(sizes):
        key, one, other = jax.random.split(key, 3)
        draw = partial(jax.random.uniform, minval=-(n**-0.5), maxval=n**-0.5)
        out.append((draw(one, (heads, n, m)), draw(other, (heads, 1, m))))
    return out


def heads_of(weights: Any, x: Any) -> Any:
    """Return the heads' outputs (K, B, m) at x (B, n)."""
    h = jnp.broadcast_to(x, (weights[0][0].shape[0], *x.shape))
    for W, b in weights[:-1]:
        h = jax.nn.relu(h @ W + b)
    W, b = weights[-1]
    return h @ W + b


def targets(target: Any, reward: Any, going: Any, state: Any) -> Any:
    """Return r + gamma n V(s') (B,)."""
    q = heads_of(target, state)
    return reward + DISCOUNT * going * ALPHA * jax.nn.logsumexp(jnp.minimum(q[0], q[1]) / ALPHA, -1)


def predicted(model: Any, batch: Any) -> tuple[Any, Any]:
    """Return the model's next states (B, 4) and rewards (B,)."""
    out = heads_of(model, jnp.concatenate([batch["state"], batch["one_hot"]], -1))[0]
    return out[:, :4], out[:, 4]


def model_targets(model: Any, target: Any, batch: Any) -> Any:
    """Return y_T (B,)."""
    state, reward = predicted(model, batch)
    return targets(target, reward, batch["going"], state)


def values(q: Any, batch: Any) -> Any:
    """Return d (K, B), the values of the actions taken."""
    return jnp.sum(heads_of(q, batch["state"]) * batch["one_hot"], -1)


def value_loss(q: Any, batch: Any, y: Any) -> Any:
    """Return 1/2 sum_k mean (d_k - y)^2."""
    return 0.5 * jnp.sum(jnp.mean((values(q, batch) - y) ** 2, -1))


def mle_loss(model: Any, batch: Any) -> Any:
    """Return mean |s'_T - s'|^2 + (r_T - r)^2."""
    state, reward = predicted(model, batch)
    return jnp.mean(jnp.sum((state - batch["next"]) ** 2, -1) + (reward - batch["reward"]) ** 2)


def omd_gradient(model: Any, q: Any, target: Any, vjp: Callable[[Any], Any], batch: Any) -> Any:
    """Return the outer gradient with the identity for the inner Hessian's inverse, ``vjp`` the adjoint of y_T."""
    y = targets(target, batch["reward"], batch["going"], batch["next"])
    v = jax.grad(value_loss)(q, batch, y)
    w = jax.jvp(lambda q: values(q, batch), (q,), (v,))[1].sum(0) / batch["reward"].shape[0]
    return vjp(w)[0]


def outer_iteration(agent: str, nets: Any, batch: Any, step: Any) -> Any:
    """Return networks and moments after a step of the model and one of the values; ``step`` counts from 1."""
    model, q, target, outer, inner = nets
    if agent == "mle":
        model, outer = adam(model, outer, jax.grad(mle_loss)(model, batch), step, LR)
        y = model_targets(model, target, batch)
        q, inner = adam(q, inner, jax.grad(value_loss)(q, batch, y), step, INNER_LR)
    else:
        y, vjp = jax.vjp(lambda m: model_targets(m, target, batch), model)
        q, inner = adam(q, inner, jax.grad(value_loss)(q, batch, y), step, INNER_LR)
        model, outer = adam(model, outer, omd_gradient(model, q, target, vjp, batch), step, LR)
    target = jax.tree.map(lambda t, p: t + TAU * (p - t), target, q)
    return model, q, target, outer, inner


# the loop


def one_step(agent: str, key: Any, learns: bool, carry: Any, number: Any) -> Any:
    """Act, store and, if it learns, draw a batch and make an outer iteration."""
    nets, state, length, rows = carry
    act, first, replay = jax.random.split(jax.random.fold_in(key, number), 3)
    u = jax.random.uniform(act, (3,))
    action = (u[1] * 2).astype(jnp.int32)
    if learns:
        p = jax.nn.softmax(heads_of(nets[1], state[None])[:, 0].mean(0) / ALPHA)
        action = jnp.where(u[0] < EPSILON, action, (p[0] < u[2]).astype(jnp.int32))
    new = physics(state, action)
    over = fallen(new)
    tail = jnp.array([1.0, 0.0, 0.0]).at[1].set(action.astype(jnp.float32)).at[2].set(1.0 - over)
    row = jnp.concatenate([state, new, tail])
    rows = lax.dynamic_update_slice(rows, row[None], (number % CAPACITY, 0))
    done = over | (length + 1 >= CartPole.MAX_STEPS)
    state, length = jnp.where(done, first_state(first), new), jnp.where(done, 0, length + 1)
    if learns:
        size = jnp.minimum(number + 1, CAPACITY)
        at = jnp.minimum((jax.random.uniform(replay, (BATCH,)) * size).astype(jnp.int32), size - 1)
        nets = outer_iteration(agent, nets, unpack(rows[at]), number - RANDOM_STEPS + 1)
    return (nets, state, length, rows), over


def unpack(rows: Any) -> dict[str, Any]:
    """Return a batch's columns of rows (B, 11)."""
    one_hot = (rows[:, 9:10] == jnp.arange(2)).astype(rows.dtype)
    return {"state": rows[:, :4], "next": rows[:, 4:8], "reward": rows[:, 8], "one_hot": one_hot, "going": rows[:, 10]}


def begin(key: Any) -> Any:
    """Return what the loop carries after the random steps."""
    a, b, c = jax.random.split(key, 3)
    model, q = networks(a, (6, WIDTH, WIDTH, 5), 1), networks(b, (4, WIDTH, WIDTH, 2), HEADS)
    nets = model, q, q, zero_moments(model), zero_moments(q)
    carry = nets, first_state(c), jnp.zeros((), jnp.int32), jnp.zeros((CAPACITY, 11))
    return lax.scan(partial(one_step, "", key, False), carry, jnp.arange(RANDOM_STEPS))[0]


def learn(agent: str, steps: int, key: Any, carry: Any) -> Any:
    """Return what the loop carries after so many further steps, and how many episodes ended by a fall."""
    numbers = jnp.arange(RANDOM_STEPS, RANDOM_STEPS + steps)
    carry, over = lax.scan(partial(one_step, agent, key, True), carry, numbers)
    return carry, over.sum()


@cache
def jitted(agent: str, replicas: int, steps: int, way: str) -> tuple[Any, Any, float]:
    """Return both programs compiled, and the seconds that it took to compile."""
    keys = jax.random.split(jax.random.key(0), replicas)
    first, some = compile_once(over_replicas(begin, way), keys)
    then, more = compile_once(over_replicas(partial(learn, agent, steps), way), keys, first(keys), donate_argnums=1)
    return first, then, some + more


def jax_loop(agent: str, replicas: int, steps: int, way: str) -> float:
    """Return CPU seconds per replica-step."""
    first, then, _ = jitted(agent, replicas, steps, way)
    keys = jax.random.split(jax.random.key(1), replicas)
    carry = jax.block_until_ready(first(keys))
    (carry, falls), taken = clocked(then, keys, carry)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(carry))
    assert int(falls.min()) > 0
    return taken / steps / replicas


# compared with gymnasium and ours


def check_cartpole() -> None:
    """Stop where the physics are not gymnasium's to rounding, or an episode ends elsewhere.

    A balanced episode step by step from gymnasium's states, then episodes of random actions on their own; a whole one
    of 500 steps on its own would end elsewhere for any rounding, as the pole is unstable.
    """
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    step, rng = jax.jit(physics), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(CartPole.MAX_STEPS):
        before = np.array(env.state)
        action = int(before[2] + 0.5 * before[3] + 0.02 * before[0] + 0.05 * before[1] > 0)
        _, _, over, *_ = env.step(action)
        after = np.asarray(step(jnp.asarray(before, jnp.float32), action))
        np.testing.assert_allclose(after, np.array(env.state), rtol=1e-5, atol=1e-6)
        assert not over
        assert not bool(fallen(after))
    for seed in range(20):
        env.reset(seed=seed)
        state, over = jnp.asarray(env.state, jnp.float32), False
        while not over:
            action = int(rng.integers(2))
            _, _, over, *_ = env.step(action)
            state = step(state, action)
            np.testing.assert_allclose(np.asarray(state), np.array(env.state), rtol=1e-4, atol=1e-5)
            assert bool(fallen(state)) == over


def check_learning(agent: str) -> None:
    """Stop where gradients, or networks after three outer iterations, are not ours; in double precision."""
    generator = torch.Generator().manual_seed(0)
    nets = AgentNetworks([0], 4, 2, WIDTH, WIDTH, HEADS, agent, Solver()).double()  # type: ignore[arg-type]
    learner = Learner(nets, agent, Solver(), SoftValue(ALPHA, DISCOUNT), TAU)  # type: ignore[arg-type]
    state, following = torch.randn(2, 1, BATCH, 4, dtype=torch.float64, generator=generator)
    action = torch.randint(2, (1, BATCH), generator=generator)
    reward, going = torch.rand(2, 1, BATCH, dtype=torch.float64, generator=generator)
    batch = Batch(state, action, reward, following, (going > 0.1).double())
    outer = torch.optim.Adam(nets.model.parameters(), lr=LR, fused=True)
    inner = torch.optim.Adam(nets.q.parameters(), lr=INNER_LR, fused=True)
    with jax.enable_x64(True):
        scalars = [x[0, :, None] for x in (reward, action.double(), batch.not_terminated)]
        rows = unpack(jnp.asarray(torch.cat([state[0], following[0], *scalars], -1).numpy()))
        model, q, target = (weights_of(n) for n in (nets.model.net, nets.q, nets.target))
        problem = learner.problem(batch)
        if agent == "mle":
            theirs, ours = jax.grad(mle_loss)(model, rows), learner.model_gradient(problem)[0]
        else:
            vjp = jax.vjp(lambda m: model_targets(m, target, rows), model)[1]
            theirs = omd_gradient(model, q, target, vjp, rows)
            ours = learner.model_gradient(problem, problem.model_targets())[0]
        assert ours is not None
        for name, x in flat(theirs).items():
            found = ours[f"net.{name}"][0].numpy()
            np.testing.assert_allclose(x, found, rtol=1e-7, atol=1e-9 * abs(found).max(), err_msg=name)
        carried: Any = model, q, target, zero_moments(model), zero_moments(q)
        for step in range(1, 4):
            carried = jax.jit(outer_iteration, static_argnums=0)(agent, carried, rows, step)
            learner.outer_iteration(batch, outer, inner)
        for tree, net in zip(carried, (nets.model.net, nets.q, nets.target), strict=False):
            for name, x in flat(tree).items():
                np.testing.assert_allclose(x, net.weights()[name][0].detach().numpy(), rtol=1e-6, atol=1e-7)


def weights_of(net: Any) -> Any:
    """Return the first replica's weights as JAX's."""
    found = {n: jnp.asarray(p[0].detach().numpy()) for n, p in net.weights().items()}
    return [(found[f"w{i}"], found[f"b{i}"]) for i in range(net.layers)]


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Return JAX's weights by our names."""
    return {f"{letter}{i}": np.asarray(x) for i, pair in enumerate(tree) for letter, x in zip("wb", pair, strict=True)}


# the table


def rows_of(agent: str, replicas: int, steps: int) -> dict[str, float]:
    """Take each row once: seconds per replica-step."""
    options = ["--figures.enabled=false", f"--model.agent={agent}"]
    out = {"ours": fit("bilevel/control.yaml", options, replicas, steps, warm=RANDOM_STEPS) / replicas}
    for way in ("vmap", "map") if replicas > 1 else ("vmap",):
        out[f"JAX, {way}"] = jax_loop(agent, replicas, steps, way)
    return out


def table(rounds: int, steps: int) -> Iterator[str]:
    """Measure, interleaved, and yield the table's lines."""
    cells = list(itertools.product(AGENTS, AIMS))
    taken: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for agent, replicas in cells:
            taken[agent, replicas].append(rows_of(agent, replicas, steps))
    yield from peer_head(("agent", "replicas"), "µs")
    for (agent, replicas), found in taken.items():
        ways = [name for name in found[0] if name.startswith("JAX")]
        compiling = {name: jitted(agent, replicas, steps, name.split()[1])[2] for name in ways}
        yield peer_line([agent, replicas], found, "µs", AIMS[replicas], compiling, replicas)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    check_cartpole()
    for agent in AGENTS:
        check_learning(agent)
    rounds, steps = (1, 200) if args.quick else (5, 2000)
    begin = time.process_time()
    lines = list(table(rounds, steps))
    about = (
        f"Medians of {rounds} interleaved rounds of {steps} steps, with their range; time of a replica-step. CPU time, "
        f"{time.process_time() - begin:.0f} s in all; jax {jax.__version__}."
    )
    report("jitted_control_speed.py", "Control beside a jitted loop", about, lines, args.write)


if __name__ == "__main__":
    main()
