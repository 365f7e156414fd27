"""mirror_descent's annealed MALA: CPU time of a step of one chain, beside jitted JAX and blackjax.

    python benchmarks/jitted_mirror_speed.py [--quick] [--write]        # needs the extra bench

``pc_mala`` with the settings of configs/mirror_descent/analytic.yaml, K = 40 levels and one step a level, float32, one
core.

- ours, default settings: ``TiltedSampling().sample("pc_mala", chains)``: keyed noise, acceptance noted, the last
  refresh drawn, samples handed over in float64. Once with as many chains as the peers, and once with 2^26, a work
  long enough that compiling would be repaid; whether it is compiled, the default settings say.
- ours, compiled: the same with ``--model.settings.compile true``. What compiles, compiles before the clock starts.
- JAX: the same chains in one program, ``jax.jit(lax.scan)`` over levels, draws inside: all chains at once, or
  ``lax.map`` over blocks of 32768, which stay in the cache. XLA has one thread.
- blackjax: ``blackjax.mala``'s kernel under ``jax.vmap`` over chains, in such blocks.

The last table is of ``mala`` on configs/mirror_descent/mixture.yaml: two actions, three components, 100 steps on the
tilted actions from q, ours beside blackjax's kernel on the same log density, whose gradient is autodiff's. With it goes
the largest difference of the actions' means, in standard errors: both are the same chain.

Before anything is timed, JAX's step and the mixture's density are compared with ours on the same numbers; each row's
mean is held to the exact one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from jax_loops import clocked, compile_once

# isort: split
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import torch
import yaml
from jax import lax
from jax.scipy.special import logsumexp
from measuring import REPOSITORY, arguments, report, spread
from mirror_speed import PROBLEM
from peers import peer_head, peer_line

from lightning_toys.mirror_descent import GaussianMixture, LinearGaussian, MixtureSampling, Settings, TiltedSampling
from lightning_toys.mirror_descent.compiled_kernels import gaussian_mala
from lightning_toys.mirror_descent.rewards import QuadraticReward
from lightning_toys.training.allocator import keep_freed_memory

BLOCK = 2**15
LONG = 2**26
K, STEP = PROBLEM.settings.K, PROBLEM.settings.mala_step
AIM = 0.75
MEAN = 0.93806  # of the last action, exact
FIRST, LAST = PROBLEM.levels[0].level, PROBLEM.linear_joint.clean


def rows_of_levels() -> Any:
    """Return mu, tau and sqrt(eta / 2) of each level, (K, 3)."""
    rows = [(x.mu, x.tau, math.sqrt(STEP / x.tau / 2)) for x in PROBLEM.levels]
    return jnp.asarray(np.array(rows, np.float32))


def mala(x: Any, xi: Any, u: Any, parameters: Any) -> tuple[Any, Any]:
    """Return states after a MALA step on N(mu, 1 / tau), and whether proposals were accepted."""
    mu, tau, half = parameters
    grad = (mu - x) * tau
    proposal = x + 2 * half * half * grad + 2 * half * xi
    new_grad = (mu - proposal) * tau
    w = grad + new_grad
    log_ratio = 0.5 * ((proposal - mu) * new_grad - (x - mu) * grad) - half * w * (xi + 0.5 * half * w)
    accepted = u < jnp.exp(log_ratio)
    return jnp.where(accepted, proposal, x), accepted


def first_actions(key: Any, chains: int) -> Any:
    """Return actions (chains,) of the noisiest level."""
    return FIRST.m[0] + math.sqrt(FIRST.C[0, 0]) * jax.random.normal(key, (chains,))


def last_states(key: Any, a: Any) -> Any:
    """Return s' given a, shaped as a."""
    return LAST.rho * a + LAST.c + math.sqrt(LAST.v) * jax.random.normal(key, a.shape)


def jax_chains(chains: int, key: Any) -> Any:
    """Return actions and states (chains,), and the share of accepted steps."""
    first, steps, last = jax.random.split(key, 3)

    def step(a: Any, at: Any) -> Any:
        number, parameters = at
        noise, coin = jax.random.split(jax.random.fold_in(steps, number))
        return mala(a, jax.random.normal(noise, a.shape), jax.random.uniform(coin, a.shape), parameters)

    a, accepted = lax.scan(step, first_actions(first, chains), (jnp.arange(K), rows_of_levels()))
    return a, last_states(last, a), accepted.mean()


def blackjax_chains(chains: int, key: Any) -> Any:
    """Return the same by blackjax's kernel."""
    first, steps, last = jax.random.split(key, 3)
    kernel = blackjax.mala.build_kernel()

    def step(a: Any, at: Any) -> Any:
        number, (mu, tau, half) = at

        def density(x: Any) -> Any:
            return -0.5 * tau * (x - mu) ** 2

        def one(key: Any, x: Any) -> Any:
            state, info = kernel(key, blackjax.mala.init(x, density), density, 2 * half * half)
            return state.position, info.is_accepted

        return jax.vmap(one)(jax.random.split(jax.random.fold_in(steps, number), chains), a)

    a, accepted = lax.scan(step, first_actions(first, chains), (jnp.arange(K), rows_of_levels()))
    return a, last_states(last, a), accepted.mean()


PEERS: dict[str, Callable[[int, Any], Any]] = {
    "JAX, at once": lambda chains, keys: jax_chains(chains, keys[0]),
    "JAX, blocks": lambda chains, keys: lax.map(partial(jax_chains, BLOCK), keys),
    "blackjax": lambda chains, keys: lax.map(partial(blackjax_chains, BLOCK), keys),
}


@cache
def jitted(name: str, chains: int) -> tuple[Callable[[Any], Any], float]:
    """Return a peer's compiled program of its blocks' keys, and the seconds that it took to compile."""
    return compile_once(partial(PEERS[name], chains), jax.random.split(jax.random.key(0), chains // BLOCK))


def hold(mean: float, chains: int) -> None:
    """Stop where a mean of the last actions is not the exact one within six standard errors."""
    assert abs(mean - MEAN) < 6 / math.sqrt(chains * PROBLEM.target.tau), mean


def peer(name: str, chains: int) -> float:
    """Return CPU seconds of a step of one chain."""
    compiled, _ = jitted(name, chains)
    (a, *_), taken = clocked(compiled, jax.random.split(jax.random.key(1), chains // BLOCK))
    hold(float(a.mean()), chains)
    return taken / chains / K


def ours(module: TiltedSampling, chains: int) -> float:
    """Return CPU seconds of a step of one chain."""
    start = time.process_time()
    samples = module.sample("pc_mala", chains, LinearGaussian())
    taken = time.process_time() - start
    hold(float(samples[..., 0].mean()), chains)
    return taken / chains / K


def check() -> None:
    """Stop where JAX's step is not ours on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x, xi = torch.randn(2, 1000, generator=generator)
    u, parameters = torch.rand(1000, generator=generator), torch.tensor([0.3, 1.7, 0.45])
    theirs = mala(*(jnp.asarray(t.numpy()) for t in (x, xi, u, parameters)))
    for found, mine in zip(theirs, gaussian_mala(x, xi, u, parameters), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float32), mine.numpy(), rtol=1e-5, atol=1e-6)


def peer_row(name: str, taken: list[dict[Any, float]], chains: int) -> str:
    """Return a peer's line of the second table, beside ours by default settings with so many chains."""
    ratios = [t["default settings", chains] / t[name] for t in taken]
    return f"| {name} | {statistics.median(t[name] for t in taken) * 1e9:.2f} | {spread(ratios)} |"


# the mixture


def mixture() -> tuple[MixtureSampling, GaussianMixture]:
    """Return the module and the data of mixture.yaml, ``mala`` alone."""
    config = yaml.safe_load((REPOSITORY / "configs/mirror_descent/mixture.yaml").read_text())
    model = config["model"]["init_args"]
    reward = QuadraticReward(**model["reward"]["init_args"])
    module = MixtureSampling(samplers=["mala"], reward=reward, lambda_scale=model["lambda_scale"],
                           settings=Settings(**model["settings"]))  # fmt: skip
    return module, GaussianMixture(**config["data"]["init_args"])


MODULE, DATA = mixture()
TILTED = MODULE.problem_on(DATA).tilted
STEPS, ETA = MODULE.settings.mcmc_steps, MODULE.settings.mala_step / TILTED.tau
ACTIONS = DATA.joint.clean.actions
ROOTS = np.linalg.cholesky(ACTIONS.covariances)


def tilted_density(a: Any) -> Any:
    """Return log q(a) + lambda Q(a) of one action (2,)."""
    W, m, c = (jnp.asarray(v, jnp.float32) for v in (ACTIONS.whitening, ACTIONS.means, ACTIONS.log_constants))
    y = jnp.einsum("jde,je->jd", W, a - m)
    assert isinstance(MODULE.reward, QuadraticReward)
    w, best = (jnp.asarray(v, jnp.float32) for v in (MODULE.reward.weights, MODULE.reward.optimum))
    return logsumexp(c - 0.5 * (y**2).sum(-1)) - 0.5 * MODULE.lambda_scale * (w * (a - best) ** 2).sum()


def blackjax_mixture(chains: int, key: Any) -> Any:
    """Return actions (chains, 2) after the steps of blackjax's kernel."""
    pick, first, steps = jax.random.split(key, 3)
    component = jax.random.choice(pick, len(ACTIONS.weights), (chains,), p=jnp.asarray(ACTIONS.weights))
    z = jax.random.normal(first, (chains, 2))
    a = jnp.asarray(ACTIONS.means, jnp.float32)[component]
    a = a + jnp.einsum("nde,ne->nd", jnp.asarray(ROOTS, jnp.float32)[component], z)
    kernel = blackjax.mala.build_kernel()

    def step(state: Any, number: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(steps, number), chains)
        return jax.vmap(lambda k, x: kernel(k, x, tilted_density, ETA)[0])(keys, state), None

    state = jax.vmap(lambda x: blackjax.mala.init(x, tilted_density))(a)
    return lax.scan(step, state, jnp.arange(STEPS))[0].position


def check_mixture() -> None:
    """Stop where the density or its gradient is not ours, up to the density's constant."""
    a = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    log_p, gradient = MODULE.problem_on(DATA).model.action_target(TILTED)(a)
    theirs, slope = jax.vmap(jax.value_and_grad(tilted_density))(jnp.asarray(a.T.numpy()))
    away = np.asarray(theirs) - log_p.numpy()
    np.testing.assert_allclose(away, np.full_like(away, away[0]), atol=2e-4)
    np.testing.assert_allclose(np.asarray(slope).T, gradient.numpy(), rtol=1e-3, atol=1e-3)


def mixture_lines(rounds: int, chains: int) -> list[str]:
    """Return the table of the mixture: CPU time of a step of one chain, of ours and of blackjax's kernel."""
    check_mixture()
    keys = jax.random.split(jax.random.key(2), chains // BLOCK)
    compiled, compiling = compile_once(lambda keys: lax.map(partial(blackjax_mixture, BLOCK), keys), keys)
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        own = MODULE.sample("mala", chains, DATA)[0, :, :2].numpy()
        ours_taken = time.process_time() - start
        found, theirs_taken = clocked(compiled, keys)
        taken.append((ours_taken / chains / STEPS, theirs_taken / chains / STEPS))
    theirs = np.asarray(found).reshape(-1, 2)
    error = np.sqrt((own.var(0) + theirs.var(0)) / chains)
    z = float(np.abs((own.mean(0) - theirs.mean(0)) / error).max())
    assert z < 6, z
    middle = [statistics.median(t[i] for t in taken) * 1e9 for i in (0, 1)]
    ratio = spread([t[0] / t[1] for t in taken])
    return [
        "",
        "| mala on the mixture, chains | ours, ns | blackjax, ns | ours / blackjax | it compiles, s | means apart |",
        "|---|---|---|---|---|---|",
        f"| {chains} | {middle[0]:.1f} | {middle[1]:.1f} | {ratio} | {compiling:.1f} | {z:.1f} standard errors |",
    ]


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    check()
    rounds, chains, long = (1, BLOCK, 2 * BLOCK) if args.quick else (5, 4 * BLOCK, LONG)
    default, compiled = TiltedSampling(), TiltedSampling(settings=Settings(compile=True))
    rows = [("default settings", default, long), ("default settings", default, chains), ("compiled", compiled, chains)]
    ours(compiled, chains)  # compiles before the clock starts, for the default too
    taken: list[dict[Any, float]] = []
    for _ in range(rounds):
        round_ = {(name, n): ours(module, n) for name, module, n in rows}
        taken.append(round_ | {name: peer(name, chains) for name in PEERS})
    lines = list(peer_head(("MALA", "chains"), "ns"))
    compiling = {name: jitted(name, chains)[1] for name in PEERS}
    for name, _, n in rows:
        found = [{"ours": t[name, n]} | {p: t[p] for p in PEERS} for t in taken]
        lines.append(peer_line([name, n], found, "ns", AIM if n == long else None, compiling))
    lines += ["", f"| peer, {chains} chains | ns | ours by default settings, {long} chains, / peer |", "|---|---|---|"]
    lines += [peer_row(name, taken, long) for name in PEERS]
    lines += mixture_lines(rounds, chains)
    about = f"Medians of {rounds} interleaved rounds, with their range; CPU time of a step of one chain. jax "
    about += f"{jax.__version__}, blackjax {blackjax.__version__}."
    report("jitted_mirror_speed.py", "MALA beside JAX and blackjax", about, lines, args.write)


if __name__ == "__main__":
    main()
