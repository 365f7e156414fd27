"""What an agent does at observations: values, actions, predictions, and whole episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.control.agents import SoftValue, softmax_policy
from lightning_toys.bilevel.control.environments import Disturbance
from lightning_toys.bilevel.control.episodes import RandomPolicy, SampledPolicy, rollout, uniform_actions
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.control.learner import AgentNetworks
from lightning_toys.bilevel.control.settings import Form
from lightning_toys.bilevel.control.world_model import ModelPrediction
from lightning_toys.errors import require
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import NoiseStream


class ActingAgent(ToyModule):
    """An agent of discrete actions that acts by its values; how they are learned is a subclass's.

    Attributes:
        env: name of its environment.
        disturbance: distractors and a drifting reward.
        form: what differs in the published form.
        soft_value: temperature and discount.
        eps: probability of a uniformly random action while it explores.
        action_noise: of exploration.
    """

    env: str
    disturbance: Disturbance
    form: Form
    soft_value: SoftValue
    eps: float
    action_noise: NoiseStream

    @property
    def nets(self) -> AgentNetworks:
        """The agent's networks."""
        assert isinstance(self.net, AgentNetworks)
        return self.net

    def forward(self, observations: Tensor) -> Tensor:
        """Return action values Q (R, B, A), the mean over heads, on which the agent acts.

        With gradients disabled they are those of evaluations bit for bit; else they have a graph and agree to rounding.

        Args:
            observations: (R, B, S), or (B, S) for every replica alike.

        Raises:
            ToyError: the shape is another one, or the networks are not built.

        >>> from lightning_toys.bilevel import BilevelControl, ReplayData
        >>> agent = BilevelControl(seeds=[0, 1, 2])  # or BilevelControl.load_from_checkpoint(path)
        >>> agent.sizes = agent.measure(ReplayData())
        >>> agent.configure_model()
        >>> agent(torch.zeros(7, 4)).shape
        torch.Size([3, 7, 2])
        """
        states = self.to_states(observations)
        return self.nets.q.values(states).mean(1)

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Return greedy actions (R, B), int64: those of the greatest :meth:`forward`, as evaluations take them.

        Args:
            observations: (R, B, S), or (B, S) for every replica alike.

        Raises:
            ToyError: the shape is another one, or the networks are not built.
        """
        actions: Tensor = self(observations).argmax(-1)
        return actions

    @torch.no_grad()
    def predict_next(self, observations: Tensor, actions: Tensor) -> ModelPrediction:
        """Return the learned model's prediction, ``next_state`` (R, B, S) and ``reward`` (R, B).

        The model does not predict whether an episode ends.

        Args:
            observations: (R, B, S), or (B, S) for every replica alike.
            actions: (R, B), or (B,) for every replica alike; integers from 0 to A - 1.

        Raises:
            ToyError: a shape or an action is not allowed, or the networks are not built.
        """
        states, a = self.to_states(observations), self.sizes["actions"]
        given = with_replica_axis(actions, len(self.seeds), (), "actions").to(states.device)
        require(
            given.shape == states.shape[:2],
            f"actions for {given.shape[1]} observations are not allowed; give one for each of {states.shape[1]}",
        )
        integers = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        require(integers, f"actions of {given.dtype} are not allowed; give integers from 0 to {a - 1}")
        outside = given[(given < 0) | (given >= a)].tolist()
        require(not outside, f"actions {outside[:3]} are not allowed; give integers from 0 to {a - 1}")
        found: ModelPrediction = self.nets.model(states, given)
        return found

    def to_states(self, observations: Tensor) -> Tensor:
        """Return observations as (R, B, S) on the device and in the precision of the networks."""
        require_built(self)
        states = with_replica_axis(observations, len(self.seeds), (self.sizes["states"],), "observations")
        return states.to(self.nets.q.weights()["w0"])

    def greedy_actions(self, observation: np.ndarray) -> np.ndarray:
        """Return :meth:`act` of observations (R, B, S) as an array (R, B)."""
        actions: np.ndarray = self.act(torch.from_numpy(observation)).cpu().numpy()
        return actions

    @torch.no_grad()
    def probabilities(self, observation: np.ndarray) -> np.ndarray:
        """Return softmax(mean_k Q / alpha) (R, B, A), float64, at observations (R, B, S)."""
        q = self.nets.q.values(self.to_states(torch.from_numpy(observation)))
        found: np.ndarray = softmax_policy(q, self.soft_value.alpha).double().cpu().numpy()
        return found

    @torch.no_grad()
    def exploration_actions(self, observation: np.ndarray, step: int, random: bool) -> np.ndarray:
        """Return the actions (R, 1) of an environment step: random, or drawn from softmax(mean_k Q / alpha).

        Args:
            observation: (R, 1, S).
            step: of the environment; keys the draws.
            random: whether all actions are.
        """
        u = self.action_noise.at(step, torch.empty(0)).numpy().astype(np.float64)
        uniform_action = uniform_actions(u[:, 1], self.sizes["actions"])
        if random:
            return np.asarray(uniform_action[:, None])
        probabilities = self.probabilities(observation)[:, 0]
        policy_action = np.minimum((probabilities.cumsum(1) < u[:, 2:3]).sum(1), self.sizes["actions"] - 1)
        action: np.ndarray = np.where(u[:, 0] < self.eps, uniform_action, policy_action)[:, None]
        return action

    def rollout_returns(self, stream: str, episodes: int, greedy: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of rewards and lengths (R, episodes) under greedy actions, or random ones; the drift as now.

        In the published form ``greedy`` actions are drawn from softmax(mean_k Q / alpha).
        """
        environments = make_environments(self.env, self.seeds, stream, episodes, self.disturbance)
        policy: Any = RandomPolicy(environments)
        if greedy:
            sampled = self.form.sampled_evaluation
            policy = SampledPolicy(environments, self.probabilities) if sampled else self.greedy_actions
        found = rollout(environments, policy, drift_step=self.weights_step)
        environments.close()
        return found

    def greedy_action_of(self, observation: np.ndarray, r: int) -> int:
        """Return one replica's greedy action at one observation (S,)."""
        broadcast = np.broadcast_to(observation, (len(self.seeds), 1, len(observation))).copy()
        return int(self.greedy_actions(broadcast)[r, 0])
