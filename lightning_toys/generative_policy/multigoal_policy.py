"""MultiGoalPolicy: policies of a state and a time, learned from a critic, beside the soft optimum that is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import REPEATS, bounded, check_settings, require
from lightning_toys.generative_policy import multigoal_figures
from lightning_toys.generative_policy.actors import GaussianActor, MeanFlowActor
from lightning_toys.generative_policy.bandit import sample_softmax
from lightning_toys.generative_policy.meanflow import TimeDistribution
from lightning_toys.generative_policy.metrics import squashed_knn_entropy
from lightning_toys.generative_policy.multigoal import LOG_VOLUME, stratified_actions
from lightning_toys.generative_policy.multigoal_data import MultiGoalData
from lightning_toys.generative_policy.multigoal_optimum import baseline_row
from lightning_toys.generative_policy.plain_policy import INSIDE, PlainPolicy
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.configuration import as_dataclass, require_data, unused_flags
from lightning_toys.training.inference import require_built
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.replica_parallel import Parallel
from lightning_toys.training.results import Report

ENTROPY_STATES = 8  # of each step, at which an entropy is estimated
ENTROPY_DRAWS = 400
OPTIMAL_EPISODES = 400
COUNTED_EPISODES = 4000  # where the goals' shares have to be counted
KEPT_EPISODES = 40  # in results.json, for figures
CRITIC_POINTS = 4000
SHOWN_STATES = 7  # along an axis, of the figure of entropies


class MultiGoalPolicy(ToyModule):
    """Learns pi(a | s, t) on :class:`MultiGoal`, R replicas at once.

    The critic is soft Q-learning's, the same for every policy: Q is regressed on r + alpha log int exp(A / alpha) at
    the next state, an integral over stratified actions, and A is the network whose weights are the moving
    average of Q's. It stands for the moving average of Q, with which exp(A / alpha) is entropic mirror descent in its
    dual form: pi_{k+1} proportional to pi_k^(1 - eta) exp(eta Q / alpha) is exp(A_{k+1} / alpha) with
    A_{k+1} = (1 - eta) A_k + eta Q (Vieillard et al. 2020, arXiv 2003.14089).

    ``gaussian`` follows SAC's gradient of E[A - alpha log pi], the reverse KL to exp(A / alpha). The others learn to
    draw stratified actions that are resampled with weights exp(A / alpha), the forward KL. Actions are squashed by
    tanh.

    Args:
        policy: the policy.
        seeds: one seed a replica.
        network: the policy's network; the critic has its width.
        critic: ``known``: the optimum's Q, by dynamic programming; ``learned``.
        candidates: cells of the actions' square along an axis, each with one action to resample from.
        average: eta, the rate at which A follows Q at each optimiser step.
        target_std: standard deviation s of MeanFlow's boundary N(x, s^2 I), before tanh; 0 is without.
        nfe: Euler steps per action of ``flow``.
        time: the distribution of r and t.
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rate to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        episodes: played at an evaluation.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "generative_policy"
    comparison_figures = "lightning_toys.generative_policy.multigoal_figures.compare_figures"
    headline = ("soft_gap", "goal_tv", "entropy")
    error_metrics: Sequence[str] = ("goal_tv", "critic_error")
    metric_labels: Mapping[str, str] = {
        "soft_gap": "soft return of the optimum less the policy's",
        "return": "return of an episode",
        "entropy": "entropy at visited states, k-nearest-neighbour estimate (nats)",
        "entropy_gap": "entropy of the optimum less the policy's, at the policy's states (nats)",
        "goal_tv": "total variation between the goals' shares of episodes and the optimum's",
        "reached": "share of episodes that end within 2 widths of a goal",
        "critic_error": "RMS error of the critic at uniform states and actions",
    }

    def __init__(
        self,
        policy: Literal["gaussian", "gaussian_mirror", "meanflow", "flow"] = "meanflow",
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        critic: Literal["known", "learned"] = "learned",
        candidates: int = 10,
        average: float = 0.02,
        target_std: float = 0.0,
        nfe: int = 8,
        time: TimeDistribution | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        lr_decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        episodes: int = 512,
        parallel: Parallel = "batch",
    ) -> None:
        check_settings(MultiGoalPolicy, locals(), "--model.")
        super().__init__(seeds, lr, weight_decay, clip_grad_norm, None, lr_decay, optimizer, muon_lr, parallel)
        self.network = as_dataclass(Network, network, Network(hidden=64, layers=3, activation="silu"))
        self.time = as_dataclass(TimeDistribution, time)
        require(
            self.network.kind == "concat",
            f"--model.network.kind: {self.network.kind!r} is not allowed here; give concat",
        )
        bounded("--model.candidates", candidates, 2, 1000)
        require(0 < average <= 1, f"--model.average: {average} is not allowed; give a number in (0, 1]")
        require(0 <= target_std < 1, f"--model.target_std: {target_std} is not allowed; give a number in [0, 1)")
        bounded("--model.nfe", nfe, 1, REPEATS)
        bounded("--model.episodes", episodes, ENTROPY_STATES)
        self.policy, self.critic_kind, self.candidates, self.average = policy, critic, candidates, average
        self.target_std, self.nfe, self.episodes = target_std, nfe, episodes
        self.save_hyperparameters(logger=False)
        self.hparams.update({"network": asdict(self.network), "time": asdict(self.time)})
        self.hparams["seeds"] = self.seeds
        self.figure_data: multigoal_figures.FigureData | None = None
        self.baseline_rows: dict[str, dict[str, float]] = {}

    @property
    def data(self) -> MultiGoalData:
        """The data module that the Trainer runs with."""
        return require_data(self.trainer.datamodule, MultiGoalData)  # type: ignore[attr-defined]

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        flows = self.policy in ("meanflow", "flow")
        out = super().unused_settings() | self.network.unused_settings(flows)
        out |= self.time.unused_settings() if flows else unused_flags("--model.policy meanflow or flow", "time.")
        if self.critic_kind == "known":
            out |= unused_flags("--model.critic learned", "average")
            if self.policy == "gaussian":
                out |= unused_flags("--model.critic learned, or another --model.policy", "candidates")
        if self.policy != "meanflow":
            out |= unused_flags("--model.policy meanflow", "target_std", "time.share")
        return out if self.policy == "flow" else out | unused_flags("--model.policy flow", "nfe")

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return {
            "gaussian": "SAC Gaussian",
            "gaussian_mirror": "Gaussian, mirror descent",
            "meanflow": "SMFP" if self.target_std else "SMFP without noise",
            "flow": f"flow, {self.nfe} steps",
        }[self.policy]

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, MultiGoalData)
        return {"batch_size": data.batch_size, "horizon": data.problem.horizon}

    # networks

    def build(self) -> nn.ModuleDict:
        """See :meth:`ToyModule.build`."""
        b, seeds = self.sizes["batch_size"], self.local_seeds
        kinds: dict[str, Literal["gaussian", "meanflow", "flow"]] = {"meanflow": "meanflow", "flow": "flow"}
        kind = kinds.get(self.policy, "gaussian")
        actor = PlainPolicy.build(kind, 3, 2, seeds, self.network, self.target_std, self.nfe)
        self.noise = {"e": NoiseStream(seeds, "e", (b, 2))}
        self.noise |= {k: NoiseStream(seeds, k, (b, 2), uniform) for k in ("time", "action")}
        # a block of steps of candidates would be large
        M = self.candidates**2
        self.noise |= {k: NoiseStream(seeds, k, (b, M, 2), uniform, block=4) for k in ("places", "next/places")}
        self.noise["choice"] = NoiseStream(seeds, "choice", (b,), uniform)
        parts: dict[str, nn.Module] = {"actor": actor}
        if self.critic_kind == "learned":
            # the goals are narrow beside the plane, which a network without frequencies takes long to see
            spec = Network(hidden=self.network.hidden, layers=3, activation="silu", fourier_c=3)
            parts["critic"] = spec.build(seeds, 2, 5, False, 1)
            parts["average"] = spec.build(seeds, 2, 5, False, 1).requires_grad_(False)
        return nn.ModuleDict(parts)

    @property
    def plain_policy(self) -> PlainPolicy:
        """The policy that learns."""
        assert isinstance(self.net, nn.ModuleDict)
        found = self.net["actor"]
        assert isinstance(found, PlainPolicy)
        found.seeds = list(self.seeds)  # it acts in evaluations alone, of all replicas
        return found

    def inputs(self, step: Tensor, state: Tensor) -> Tensor:
        """Return what networks see (R, B, 3): the state (R, B, 2), and the episode's step (R, B) scaled to [-1, 1]."""
        scaled = 2 * step.to(state) / max(1, self.sizes["horizon"] - 1) - 1
        return torch.cat([state, scaled.unsqueeze(-1)], dim=-1)

    def critic_value(self, name: str, step: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """Return Q, or its moving average, (R, B) at steps (R, B), states and actions (R, B, 2)."""
        assert isinstance(self.net, nn.ModuleDict)
        net = self.net[name]
        assert isinstance(net, ConditionalNet)
        out: Tensor = net(action, torch.cat([self.inputs(step, state), action], dim=-1))[..., 0]
        return out

    def policy_values(self, step: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """Return what the policy climbs (R, B): the known Q, or A; a gradient goes to the action alone."""
        if self.critic_kind == "known":
            return self.data.problem.q_value(step, state, action)
        return self.critic_value("average", step, state, action)

    # training

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        state, at = batch.columns
        rows = slice(batch.first, batch.first + state.shape[1])
        noise = {k: v.at(step, state)[:, rows] for k, v in self.noise.items() if k != "time"}
        loss = state.new_zeros(state.shape[:2])
        if self.critic_kind == "learned":
            self.follow()
            loss = loss + self.critic_losses(at, state, noise)
        seen, actor = self.inputs(at, state), self.plain_policy.actor
        alpha = self.data.problem.temperature
        if self.policy == "gaussian":
            assert isinstance(actor, GaussianActor)
            loss = loss + actor.losses(seen, noise["e"], lambda _, a: self.policy_values(at, state, a), alpha) / alpha
            return loss.sum(1) / batch.total
        # tanh reaches the bounds nowhere, and far out its inverse has tails that a Gaussian would widen for
        x = self.sample_improved_actions(at, state, noise).clamp(-1 + INSIDE, 1 - INSIDE)
        if isinstance(actor, GaussianActor):
            loss = loss + actor.fit_losses(seen, x)
        else:
            assert isinstance(actor, MeanFlowActor)
            time = replace(self.time, share=0.0) if self.policy == "flow" else self.time
            loss = loss + actor.losses(
                seen, torch.atanh(x), noise["e"], *time.sample(self.noise["time"].at(step, state), rows)
            )
        return loss.sum(1) / batch.total

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average of critics by its rate towards the critic."""
        assert isinstance(self.net, nn.ModuleDict)
        averages, critics = (list[Tensor](self.net[k].parameters()) for k in ("average", "critic"))
        torch._foreach_lerp_(averages, critics, self.average)

    def critic_losses(self, at: Tensor, state: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """Return the squared errors (R, B) of Q at uniform actions, by the soft Bellman equation with A."""
        problem, last = self.data.problem, self.sizes["horizon"] - 1
        action = 2 * noise["action"] - 1
        with torch.no_grad():
            after = problem.move(state, action)
            value = self.soft_value((at + 1).clamp(max=last), after, noise["next/places"])
            goal = problem.reward(state, action) + torch.where(at < last, value, torch.zeros_like(value))
        return (self.critic_value("critic", at, state, action) - goal).square()

    def candidate_values(self, at: Tensor, state: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return stratified actions (R, B, M, 2), and what the policy climbs there (R, B, M)."""
        R, B = state.shape[:2]
        a = stratified_actions(self.candidates, places)
        M = a.shape[2]
        many = state.unsqueeze(2).expand(R, B, M, 2).reshape(R, B * M, 2)
        steps = at.unsqueeze(2).expand(R, B, M).reshape(R, B * M)
        return a, self.policy_values(steps, many, a.reshape(R, B * M, 2)).reshape(R, B, M)

    def soft_value(self, at: Tensor, state: Tensor, places: Tensor) -> Tensor:
        """Return alpha log int exp(A / alpha) da (R, B) by the mean over stratified actions."""
        alpha = self.data.problem.temperature
        q = self.candidate_values(at, state, places)[1] / alpha
        value: Tensor = alpha * (torch.logsumexp(q, -1) - 2 * math.log(self.candidates) + LOG_VOLUME)
        return value

    @torch.no_grad()
    def sample_improved_actions(self, at: Tensor, state: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """Return actions (R, B, 2) of the density exp(A / alpha), resampled from stratified ones."""
        a, q = self.candidate_values(at, state, noise["places"])
        chosen = sample_softmax(q, self.data.problem.temperature, noise["choice"])
        return a.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, 2))[:, :, 0]

    # acting and evaluation

    def act(self, step: int, state: Tensor, index: int = 0) -> Tensor:
        """Return one action (R, M, 2) for each state (R, M, 2) at a step of the episode, keyed by ``index``."""
        require_built(self)
        at = torch.full(state.shape[:2], step, device=state.device)
        with torch.no_grad():
            return self.plain_policy.act(self.inputs(at, state), index)

    def plain(self) -> PlainPolicy:
        """Return the policy as a plain module, a copy; its states are (x, y, the episode's step scaled to [-1, 1])."""
        require_built(self)
        return copy.deepcopy(self.plain_policy)

    def starts(self, seed: int, n: int) -> Tensor:
        """Return first states of episodes (n, 2), float64."""
        drawn = torch.from_numpy(keyed_generator(seed, 0, "evaluation/start").standard_normal((n, 2)))
        return (self.data.start_std * drawn).clamp(-1, 1)

    def play(self) -> tuple[Tensor, Tensor]:
        """Return the states (R, T + 1, n, 2) and rewards (R, T, n) of episodes, float64."""
        problem, like = self.data.problem, next(self.net.parameters())
        state = torch.stack([self.starts(s, self.episodes) for s in self.seeds])
        states, rewards = [state], []
        for t in range(problem.horizon):
            action = self.act(t, state.to(like), t).double().cpu()
            rewards.append(problem.reward(state, action))
            state = problem.move(state, action)
            states.append(state)
        return torch.stack(states, 1), torch.stack(rewards, 1)

    def entropies(self, states: Tensor) -> Tensor:
        """Return entropies in nats (R, T, K) at the first K visited states of each step, out of (R, T + 1, n, 2)."""
        T = states.shape[1] - 1
        return torch.stack([self.entropies_at(t, states[:, t, :ENTROPY_STATES], T + t) for t in range(T)], 1)

    @torch.no_grad()
    def entropies_at(self, step: int, state: Tensor, index: int) -> Tensor:
        """Return :func:`squashed_knn_entropy` (R, K) of actions at states (R, K, 2) of a step, keyed by ``index``."""
        like, (R, K, _) = next(self.net.parameters()), state.shape
        many = state.repeat_interleave(ENTROPY_DRAWS, 1).to(like)
        seen = self.inputs(torch.full(many.shape[:2], step, device=like.device), many)
        y = self.plain_policy.before_tanh(seen, index).double().cpu().reshape(R * K, ENTROPY_DRAWS, 2)
        return torch.tensor([squashed_knn_entropy(x.numpy()) for x in y], dtype=torch.float64).reshape(R, K)

    def goal_shares(self, states: Tensor) -> Tensor:
        """Return the shares (R, 4) of episodes by the goal that is nearest to their last state (R, ..., n, 2)."""
        goal = self.data.problem.goal_of(states[:, -1])[0]
        return torch.stack([(goal == g).double().mean(1) for g in range(4)], 1)

    @torch.no_grad()
    def report(self, stage: str) -> Report:
        """See :meth:`ToyModule.report`."""
        problem = self.data.problem
        states, rewards = self.play()
        returns, entropy = rewards.sum(1).mean(1), self.entropies(states)
        T, K = problem.horizon, ENTROPY_STATES
        steps = torch.arange(T)[:, None].expand(T, K)
        best = torch.stack([problem.optimal_entropy(steps.reshape(-1), s[:T, :K].reshape(-1, 2)) for s in states])
        optimum = torch.stack([problem.value(torch.zeros(s.shape[1], dtype=torch.long), s[0]).mean() for s in states])
        soft = returns + problem.temperature * entropy.mean(2).sum(1)
        shares, target = self.goal_shares(states), self.optimal_shares()
        metrics = {
            "soft_gap": optimum - soft,
            "return": returns,
            "entropy": entropy.mean((1, 2)),
            "entropy_gap": best.mean(1) - entropy.mean((1, 2)),
            "goal_tv": (shares - target).abs().sum(1) / 2,
            "reached": (problem.goal_of(states[:, -1])[1] < 2 * problem.width).double().mean(1),
        }
        metrics |= {f"share_mode{g}": shares[:, g] for g in range(4)}
        if self.critic_kind == "learned":
            metrics["critic_error"] = self.critic_error()
        kept = states[0, :, :KEPT_EPISODES].transpose(0, 1)
        self.figure_data = multigoal_figures.FigureData(problem, kept, *self.entropy_map())
        found = {k: v.tolist() for k, v in metrics.items()}
        return Report(self.seeds, found, self.baselines(), {"trajectories": kept.round(decimals=4).tolist()})

    def critic_error(self) -> Tensor:
        """Return the RMS of A - Q* (R,) at uniform steps, states and actions."""
        g, problem = keyed_generator(0, 0, "evaluation/critic"), self.data.problem
        u = 2 * torch.from_numpy(g.random((1, CRITIC_POINTS, 4))).expand(len(self.seeds), -1, -1) - 1
        at = torch.from_numpy(g.integers(problem.horizon, size=(1, CRITIC_POINTS))).expand(len(self.seeds), -1)
        like = next(self.net.parameters())
        found = self.critic_value("average", at.to(like.device), u[..., :2].to(like), u[..., 2:].to(like))
        wanted = problem.q_value(at, u[..., :2], u[..., 2:])
        return (found.cpu().double() - wanted).square().mean(1).sqrt()

    def entropy_map(self) -> tuple[Tensor, Tensor]:
        """Return entropies (n, n) of the first replica and of the optimum at the episode's first step, by state."""
        line = torch.linspace(-0.9, 0.9, SHOWN_STATES, dtype=torch.float64)
        states = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
        own = self.entropies_at(0, states.expand(len(self.seeds), -1, -1), 2 * self.sizes["horizon"])[0]
        best = self.data.problem.optimal_entropy(torch.zeros(len(states), dtype=torch.long), states)
        return own.reshape(SHOWN_STATES, -1), best.reshape(SHOWN_STATES, -1)

    def optimal_shares(self) -> Tensor:
        """Return the shares of the goals (4,) among the optimum's episodes."""
        row = self.baselines()["optimal"]
        return torch.tensor([row[f"share_goal{g}"] for g in range(4)], dtype=torch.float64)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Return the rows of the optimum and of uniform actions."""
        if not self.baseline_rows:
            problem = self.data.problem
            n = OPTIMAL_EPISODES if problem.symmetric else COUNTED_EPISODES
            rows = {"optimal": True, "uniform": False}
            start = self.starts(0, n)
            self.baseline_rows = {k: baseline_row(problem, start, v, self.episodes) for k, v in rows.items()}
        return self.baseline_rows

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        return {} if self.figure_data is None else multigoal_figures.draw_all(self.figure_data, self.label)
