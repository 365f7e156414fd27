"""A trial of an agent of one's own: a step on two replicas and on the second of them alone, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_toys.bilevel.control.environments import Environments
from lightning_toys.bilevel.control.episodes import RandomPolicy
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.replay import Batch, ReplayBuffer
from lightning_toys.bilevel.control.updates import RESPONSES, AgentUpdate
from lightning_toys.bilevel.trials import apart, copied, require_drawn_by_seed, require_solo, require_tensor
from lightning_toys.bilevel.vectors import flatten
from lightning_toys.errors import require
from lightning_toys.training.own_classes import attempt, is_own, require_methods, shape_of, trial_pair

FLAG = "--model.agent"
TRIED = 16  # transitions of each replica
MEASURED = (  # by validations themselves
    *("return", "return_sd", "length", "td_error", "inner_error", "model_error", "reward_error", "value"),
    *("local_regret", "gradient_cosine"),
)


def try_agent(
    agent: AgentUpdate,
    seeds: Sequence[int],
    make_environments: Callable[[Sequence[int]], Environments],
    make_networks: Callable[[AgentUpdate, Sequence[int]], AgentNetworks],
    make_learner: Callable[[AgentUpdate, AgentNetworks], Learner],
) -> None:
    """Hold an agent of one's own to its contract, see :class:`AgentUpdate`; one of the package's is not tried.

    It sees the first transitions that random actions make in the run's environment, and networks as a run begins with.

    Args:
        agent: of which a copy is tried, where it can be copied.
        seeds: of the run.
        make_environments: returns the run's, of replicas with these seeds.
        make_networks: returns the run's networks for an agent and seeds.
        make_learner: returns what takes the run's steps.

    Raises:
        ToyError: names the class, its method, and what it has to return.
    """
    if not is_own(agent):
        return
    name, pair = f"{FLAG}: {type(agent).__name__}", trial_pair(seeds)
    check_attributes(name, agent)
    with apart():
        both = first_transitions(make_environments(pair), pair)
        nets, found = [], []
        for some, batch in ((pair, both), (pair[1:], Batch(*(x[1:] for x in both)))):
            tried = copied(agent)
            nets.append(attempt(f"{name}.networks", partial(make_networks, tried, some)))
            found.append(take_step(name, tried, make_learner(tried, nets[-1]), batch))
    for label in nets[0].further:
        alone = dict(nets[1].get_submodule(label).named_parameters())
        for n, p in nets[0].get_submodule(label).named_parameters():
            require_drawn_by_seed(f"{name}.networks: {label}'s {n}", p, alone.get(n, torch.empty(0)))
    for key, x in found[0].items():
        require_solo(f"{name}.{key}", x, found[1].get(key, torch.empty(0)))


def check_attributes(where: str, agent: AgentUpdate) -> None:
    """Refuse an agent that says of itself what no agent can be.

    Raises:
        ToyError: names the attribute.
    """
    for key in ("fits", "uses_model"):
        given = getattr(agent, key)
        require(isinstance(given, bool), f"{where}.{key}: {given!r} is not allowed; give True or False")
    require(isinstance(agent.label, str), f"{where}.label: {agent.label!r} is not allowed; give a text")
    response = agent.response
    require(response in RESPONSES, f"{where}.response: {response!r} is not allowed; give one of {', '.join(RESPONSES)}")
    require_methods(FLAG, agent, AgentUpdate, "gradient")


def first_transitions(environments: Environments, seeds: Sequence[int]) -> Batch:
    """Return what random actions do in environments (2, 1): transitions (2, TRIED, ...)."""
    replay, policy = ReplayBuffer(seeds, environments.observation_size, TRIED), RandomPolicy(environments)
    for _ in range(TRIED):
        replay.store(environments.step(policy(environments.observation)))
    environments.close()
    return replay.transitions


def take_step(where: str, agent: AgentUpdate, learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Ask an agent for all that a run asks for, and take a step; return what it gave, tensors (R, ...).

    Args:
        where: flag and class, for errors.
        agent: one's own.
        learner: of its networks.
        batch: transitions (R, B, ...).

    Raises:
        ToyError: says what does not fit.
    """
    nets, problem = learner.nets, learner.problem(batch)
    replicas, predicted = len(batch.reward), problem.model_targets()
    handed = None if agent.fits else predicted
    y = attempt(f"{where}.targets", lambda: agent.targets(problem, handed))
    require_tensor(f"{where}.targets", y, tuple(batch.reward.shape))
    given = {"targets": y}
    found = attempt(f"{where}.gradient", lambda: agent.gradient(nets, problem, handed))
    told = isinstance(found, tuple) and len(found) == 3
    require(told, f"{where}.gradient returns {type(found).__name__}; give a ModelGradient")
    gradient, loss, residual = found
    require_tensor(f"{where}.gradient: loss", loss, (replicas,))
    given["gradient: loss"] = loss
    if residual is not None:
        require_tensor(f"{where}.gradient: residual", residual, (replicas,))
    if gradient is None:
        none = agent.response == "none"
        require(none, f"{where}.gradient returns no gradient, and response is {agent.response!r}; give 'none'")
    else:
        given["gradient"] = flatten(checked_gradient(f"{where}.gradient", gradient, nets))
    if agent.uses_model:
        with torch.no_grad():
            measured = attempt(f"{where}.measures", lambda: agent.measures(problem, predicted))
        given |= {f"measures: {n}": x for n, x in checked_measures(f"{where}.measures", measured, replicas).items()}
    outer, inner = (torch.optim.Adam(net.parameters(), lr=1e-4) for net in (nets.model, nets.q))
    attempt(f"{where}, tried for one step,", lambda: learner.environment_step(lambda k: batch, outer, inner))
    for n, p in nets.named_parameters():
        require(bool(p.isfinite().all()), f"{where}: {n} is not finite after one step")
    return given


def checked_gradient(where: str, gradient: Any, nets: AgentNetworks) -> dict[str, Tensor]:
    """Return a model's gradient, by the model's names and in their order.

    Raises:
        ToyError: it has other names or shapes.
    """
    model = dict(nets.model.named_parameters())
    names = sorted(map(str, gradient)) if isinstance(gradient, dict) else type(gradient).__name__
    require(
        names == sorted(model), f"{where} returns {names!s:.200}; give each of the model's {', '.join(sorted(model))}"
    )
    for n, p in model.items():
        require_tensor(f"{where}: {n}", gradient[n], tuple(p.shape))
    return {n: gradient[n] for n in model}


def checked_measures(where: str, measured: Any, replicas: int) -> dict[str, Tensor]:
    """Return what an agent measures, one number a replica by its name.

    Raises:
        ToyError: it is something else, or a name is taken.
    """
    require(isinstance(measured, dict), f"{where} returns {type(measured).__name__}; give a dictionary")
    found: dict[str, Tensor] = measured
    for n, x in found.items():
        fits = isinstance(n, str) and n.isidentifier() and n not in MEASURED
        require(
            fits,
            f"{where}: {n!r} is not allowed; give a name of letters, digits and _, and none of {', '.join(MEASURED)}",
        )
        shape = shape_of(x)
        require(shape == (replicas,), f"{where}: {n} is {shape}; give a tensor ({replicas},)")
    return {n: x for n, x in found.items() if bool(x.isfinite().all())}  # on few rows there may be none
