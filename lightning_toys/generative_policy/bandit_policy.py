"""BanditPolicy: a policy that improves by mirror descent on a contextual bandit, evaluated by its regret."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import LARGEST, REPEATS, WHOLE, bounded, check_settings, require
from lightning_toys.generative_policy import bandit_figures
from lightning_toys.generative_policy.actors import Actor, FlowActor, GaussianActor, MeanFlowActor, MirrorGaussianActor
from lightning_toys.generative_policy.bandit import effective_hills, sample_softmax, turns_to_states
from lightning_toys.generative_policy.bandit_data import BanditData
from lightning_toys.generative_policy.meanflow import TimeDistribution
from lightning_toys.generative_policy.plain_policy import PlainPolicy
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.configuration import as_dataclass, require_data, unused_flags
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.replica_parallel import Parallel
from lightning_toys.training.results import Report

NUM_STATES = 64  # evenly spaced states that a policy is evaluated at


class BanditPolicy(ToyModule):
    """Learns pi(a | s) from the rewards of a contextual bandit, R replicas at once.

    ``gaussian`` follows SAC's gradient of E[Q - entropy log pi]. ``meanflow`` and ``flow`` take mirror descent steps
    (arXiv 2605.21282): pi_old is fixed for ``inner_steps`` steps, ``candidates`` of its actions are resampled with
    weights exp(Q / temperature), and the policy is fitted to the result. ``gaussian_mirror`` is the control between
    them: SAC's class of policies, fitted by maximum likelihood to mirror descent's targets.

    Args:
        policy: the policy.
        seeds: one seed a replica.
        network: the policy's network; a learned critic has its width.
        critic: ``known``: Q is the expected reward; ``learned``: a network, from noisy rewards of the policy's actions.
        temperature: lambda of the mirror descent step.
        inner_steps: optimiser steps between two mirror descent steps.
        candidates: actions of pi_old that each is resampled from.
        entropy: SAC's weight of the entropy (its alpha); its initial value with ``target_entropy``.
        target_entropy: the entropy (nats) that SAC's automatic temperature keeps (arXiv 1812.05905; SAC's own choice is
            minus the number of coordinates, -2); null leaves ``entropy`` as it is.
        sac_actions: actions a state in SAC's gradient; as many as ``candidates`` evaluates the critic as often.
        target_std: standard deviation s of MeanFlow's boundary N(x, s^2 I), its entropy term; 0 is without.
        nfe: Euler steps per action of ``flow``.
        flow_std: standard deviation of noise added to an action of ``flow``, the control for MeanFlow's entropy term.
        time: the distribution of r and t.
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rate to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        draws: actions evaluated at each of 64 states.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.

    Raises:
        ToyError: a value is not allowed.

    Example:
        Actions of two replicas with their initial weights at three states:

        >>> policy = BanditPolicy(seeds=[0, 1])
        >>> policy.sizes = policy.measure(BanditData())
        >>> policy.configure_model()
        >>> policy.act(turns_to_states(torch.tensor([0.0, 0.3, 0.6]))).shape
        torch.Size([2, 3, 2])
    """

    experiment = "generative_policy"
    comparison_figures = "lightning_toys.generative_policy.bandit_figures.compare_figures"
    headline = ("regret",)
    error_metrics: Sequence[str] = ("regret",)
    metric_labels: Mapping[str, str] = {
        "regret": "expected regret of an action",
        "off": "share of actions beyond 3 widths of every hill",
        "effective_hills": "effective number of hills acted on at a state, of 3",
        "critic_error": "RMS error of the critic on the policy's actions",
        "critic_evaluations": "evaluations of the critic by the policy's updates",
        "alpha": "SAC's weight of the entropy",
    }

    def __init__(
        self,
        policy: Literal["gaussian", "gaussian_mirror", "meanflow", "flow"] = "meanflow",
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        critic: Literal["known", "learned"] = "learned",
        temperature: float = 0.3,
        inner_steps: int = 100,
        candidates: int = 16,
        entropy: float = 0.05,
        target_std: float = 0.03,
        nfe: int = 8,
        time: TimeDistribution | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        lr_decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        draws: int = 256,
        parallel: Parallel = "batch",
        target_entropy: float | None = None,
        sac_actions: int = 1,
        flow_std: float = 0.0,
    ) -> None:
        check_settings(BanditPolicy, locals(), "--model.")
        super().__init__(seeds, lr, weight_decay, clip_grad_norm, None, lr_decay, optimizer, muon_lr, parallel)
        default = Network(hidden=64, layers=3, activation="silu")
        self.network = as_dataclass(Network, network, default)
        self.time = as_dataclass(TimeDistribution, time)
        require(
            self.network.kind != "transformer",
            "--model.network.kind: 'transformer' is not allowed here, it has no tangent; give concat or film",
        )
        require(
            self.network.kind == "concat" or policy in ("meanflow", "flow"),
            f"--model.network.kind: 'film' is not allowed with --model.policy {policy}, which has no condition beside "
            "the state; give concat",
        )
        bounded("--model.temperature", temperature, 0.0, above=True)
        bounded("--model.inner_steps", inner_steps, 1, REPEATS)
        bounded("--model.candidates", candidates, 2)
        bounded("--model.entropy", entropy, 0.0)
        require(0 <= target_std < 1, f"--model.target_std: {target_std} is not allowed; give a number in [0, 1)")
        bounded("--model.nfe", nfe, 1, REPEATS)
        bounded("--model.draws", draws, 2)
        bounded("--model.sac_actions", sac_actions, 1, REPEATS)
        require(0 <= flow_std < 1, f"--model.flow_std: {flow_std} is not allowed; give a number in [0, 1)")
        if target_entropy is not None:
            bounded("--model.target_entropy", target_entropy, -LARGEST)
            bounded("--model.entropy", entropy, 0.0, above=True)  # where its logarithm starts
        self.policy, self.critic_kind, self.temperature, self.inner_steps = policy, critic, temperature, inner_steps
        self.candidates, self.entropy, self.target_std, self.nfe = candidates, entropy, target_std, nfe
        self.draws, self.target_entropy, self.sac_actions, self.flow_std = draws, target_entropy, sac_actions, flow_std
        self.save_hyperparameters(logger=False)
        self.hparams.update({"network": asdict(self.network), "time": asdict(self.time)})
        self.hparams["seeds"] = self.seeds
        self.figure_data: bandit_figures.FigureData | None = None

    @property
    def data(self) -> BanditData:
        """The data module that the Trainer runs with."""
        return require_data(self.trainer.datamodule, BanditData)  # type: ignore[attr-defined]

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        flows = self.policy in ("meanflow", "flow")
        out = super().unused_settings() | self.network.unused_settings(flows)
        if flows:
            out |= self.time.unused_settings()
        else:
            out |= unused_flags("--model.policy meanflow or flow", "time.", "network.fourier_c")
        if self.policy == "gaussian":
            mirror = ("temperature", "inner_steps", "candidates")
            out |= unused_flags("--model.policy meanflow, flow or gaussian_mirror", *mirror)
        else:
            out |= unused_flags("--model.policy gaussian", "entropy", "target_entropy", "sac_actions")
        if self.critic_kind == "known":
            out |= {"--data.reward_noise": "--model.critic learned"}
        if self.policy != "meanflow":
            out |= unused_flags("--model.policy meanflow", "target_std", "time.share")
        return out if self.policy == "flow" else out | unused_flags("--model.policy flow", "nfe", "flow_std")

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        automatic = "" if self.target_entropy is None else ", automatic temperature"
        noise = f" and noise of {self.flow_std:g}" if self.flow_std else ""
        return {
            "gaussian": f"SAC Gaussian{automatic}",
            "gaussian_mirror": "Gaussian, mirror descent",
            "meanflow": "SMFP" if self.target_std else "SMFP without noise",
            "flow": f"flow, {self.nfe} steps{noise}",
        }[self.policy]

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, BanditData)
        return {"batch_size": data.batch_size}

    # networks

    def build_actor(self) -> Actor:
        """Return a new policy, with its initial weights."""
        if self.policy in ("gaussian", "gaussian_mirror"):
            kind = GaussianActor if self.policy == "gaussian" else MirrorGaussianActor
            return kind(self.network.build(self.local_seeds, 2, 0, False, 4))
        head = self.policy == "meanflow" and self.target_std > 0
        net = self.network.build(self.local_seeds, 2, 4, True, 3 if head else 2)
        return (
            MeanFlowActor(net, self.target_std)
            if self.policy == "meanflow"
            else FlowActor(net, self.nfe, self.flow_std)
        )

    def build(self) -> nn.ModuleDict:
        """See :meth:`ToyModule.build`."""
        b, m = self.sizes["batch_size"], self.candidates
        seeds = self.local_seeds
        self.noise = {"e": NoiseStream(seeds, "e", (b, 2))}
        parts: dict[str, nn.Module] = {"actor": self.build_actor()}
        if self.policy != "gaussian":
            parts["old"] = self.build_actor().requires_grad_(False)
            self.noise["time"] = NoiseStream(seeds, "t", (b, 2), uniform)
            self.noise["choice"] = NoiseStream(seeds, "choice", (b,), uniform)
            # a block of steps of candidates would be large
            self.noise |= {k: NoiseStream(seeds, k, (b, m, 2), block=4) for k in ("old/e", "old/xi")}
        elif self.sac_actions > 1:
            self.noise["more/e"] = NoiseStream(seeds, "more/e", (b, self.sac_actions - 1, 2), block=4)
        if self.policy == "gaussian" and self.target_entropy is not None:
            parts["log_alpha"] = nn.ParameterList([torch.full((len(seeds), 1), math.log(self.entropy))])
        if self.critic_kind == "learned":
            self.noise |= {k: NoiseStream(seeds, k, (b, 2)) for k in ("act/e", "act/xi")}
            self.noise["reward"] = NoiseStream(seeds, "reward", (b,))
            parts["critic"] = Network(hidden=self.network.hidden, activation="silu").build(seeds, 2, 2, False, 1)
        return nn.ModuleDict(parts)

    # training

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        (state,) = batch.columns
        nets = self.net
        assert isinstance(nets, nn.ModuleDict)
        n = state.shape[1]
        rows = slice(batch.first, batch.first + n)
        noise = {k: v.at(step, state)[:, rows] for k, v in self.noise.items() if k != "time"}
        loss = state.new_zeros(state.shape[:2])
        if self.critic_kind == "learned":
            with torch.no_grad():
                action = self.actor.act(state, noise["act/e"], noise["act/xi"])
                reward = self.data.bandit.reward(state, action) + self.data.reward_noise * noise["reward"]
            loss = loss + (self.critic(state, action) - reward).square()
        actor = self.actor
        if self.policy == "gaussian":
            assert isinstance(actor, GaussianActor)
            return (loss + self.sac_losses(actor, state, noise)).sum(1) / batch.total
        if step % self.inner_steps == 0:
            self.old_actor.load_state_dict(actor.state_dict())
        x = self.sample_improved_actions(state, noise)
        if isinstance(actor, GaussianActor):
            loss = loss + actor.fit_losses(state, x)
        else:
            assert isinstance(actor, MeanFlowActor)
            time = replace(self.time, share=0.0) if self.policy == "flow" else self.time
            loss = loss + actor.losses(state, x, noise["e"], *time.sample(self.noise["time"].at(step, state), rows))
        return loss.sum(1) / batch.total

    def sac_losses(self, actor: GaussianActor, state: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return SAC's loss of each state (R, B), a mean over its actions, and that of its temperature."""
        R, B, K = state.shape[0], state.shape[1], self.sac_actions
        e = noise["e"].unsqueeze(2)
        if K > 1:
            e = torch.cat([e, noise["more/e"]], dim=2)
        many = state.unsqueeze(2).expand(R, B, K, 2).reshape(R, B * K, 2)
        log_alpha = self.log_alpha
        alpha = self.entropy if log_alpha is None else log_alpha.detach().exp()
        losses, log_prob = actor.losses_and_log_prob(many, e.reshape(R, B * K, 2), self.q_value, alpha)
        if log_alpha is not None:
            assert self.target_entropy is not None
            losses = losses - log_alpha * (log_prob + self.target_entropy)
        return losses.reshape(R, B, K).mean(2)

    @property
    def log_alpha(self) -> Tensor | None:
        """The logarithm (R, 1) of SAC's automatic temperature; None where it is fixed."""
        assert isinstance(self.net, nn.ModuleDict)
        if "log_alpha" not in self.net:
            return None
        parameters = self.net["log_alpha"]
        assert isinstance(parameters, nn.ParameterList)
        found: Tensor = parameters[0]
        return found

    @property
    def actor(self) -> Actor:
        """The policy that learns."""
        return self.actor_of("actor")

    @property
    def old_actor(self) -> Actor:
        """pi_old, which candidates are drawn from."""
        return self.actor_of("old")

    def actor_of(self, key: str) -> Actor:
        """Return one of the policies in ``net``."""
        assert isinstance(self.net, nn.ModuleDict)
        actor = self.net[key]
        assert isinstance(actor, Actor)
        return actor

    def critic(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the learned Q (R, B) at states and actions, each (R, B, 2)."""
        assert isinstance(self.net, nn.ModuleDict)
        net = self.net["critic"]
        assert isinstance(net, ConditionalNet)
        # tripled: the modes are narrow beside [-1, 1]
        q: Tensor = net(3 * action, state)[..., 0]
        return q

    def q_value(self, state: Tensor, action: Tensor) -> Tensor:
        """Return Q (R, B) at states and actions (R, B, 2), known or learned; a gradient goes to the action alone."""
        if self.critic_kind == "known":
            return self.data.bandit.reward(state, action)
        assert isinstance(self.net, nn.ModuleDict)
        net = self.net["critic"].requires_grad_(False)
        try:
            return self.critic(state, action)
        finally:
            net.requires_grad_(True)

    @torch.no_grad()
    def sample_improved_actions(self, state: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return actions (R, B, 2) of the mirror descent step from pi_old at states (R, B, 2)."""
        R, B, M = state.shape[0], state.shape[1], self.candidates
        many = state.unsqueeze(2).expand(R, B, M, 2).reshape(R, B * M, 2)
        a = self.old_actor.act(many, noise["old/e"].reshape(R, B * M, 2), noise["old/xi"].reshape(R, B * M, 2))
        q = self.q_value(many, a).reshape(R, B, M)
        chosen = sample_softmax(q, self.temperature, noise["choice"])
        a = a.reshape(R, B, M, 2).clamp(-1.0, 1.0)
        return a.gather(2, chosen[..., None, None].expand(R, B, 1, 2))[:, :, 0].to(state)

    # acting

    def evaluation_noise(self, stream: str, n: int, index: int = 0) -> Tensor:
        """Return standard normals (R, n, 2), float64, keyed by seed, stream and index; evaluations have index 0."""
        stream = f"evaluation/{stream}"
        rows = [keyed_generator(s, index, stream).standard_normal((n, 2)) for s in self.seeds]
        return torch.from_numpy(np.stack(rows))

    def forward(self, state: Tensor, index: int = 0) -> Tensor:
        """Sample one action per state and replica: state (M, 2) or (R, M, 2), rows (cos, sin), to (R, M, 2).

        Differentiable in the state, on the device and in the dtype of the weights. The bandit clamps actions to
        [-1, 1]^2; these are not clamped.

        Args:
            state: the states.
            index: the noise is keyed by the replica's seed, the rows' order and this number; 0 is evaluation's.

        Raises:
            ToyError: there is no network yet, or the states have another shape.
        """
        require_built(self)
        bounded("index", index, 0, WHOLE)
        like = next(self.net.parameters())
        state = with_replica_axis(state, len(self.seeds), (2,), "state").to(like)
        e, xi = (self.evaluation_noise(k, state.shape[1], index).to(like) for k in ("e", "xi"))
        return self.actor.act(state, e, xi)

    @torch.no_grad()
    def act(self, state: Tensor, index: int = 0) -> Tensor:
        """Sample actions as :meth:`forward` does, without gradients: state (M, 2) or (R, M, 2) to (R, M, 2)."""
        return self.forward(state, index)

    def plain(self) -> PlainPolicy:
        """Return the policy as a plain module of all replicas, a copy: ``act``, ``log_prob``, ``entropy``.

        Raises:
            ToyError: there is no network yet.
        """
        require_built(self)
        return PlainPolicy(copy.deepcopy(self.actor), self.seeds, 2, 2, bounded=False)

    # evaluation

    @torch.no_grad()
    def evaluate(self) -> Report:
        """Evaluate actions at evenly spaced states."""
        like, n, bandit = next(self.net.parameters()), NUM_STATES * self.draws, self.data.bandit
        turns = (torch.arange(NUM_STATES, dtype=torch.float64) / NUM_STATES).repeat_interleave(self.draws)
        state = turns_to_states(turns).expand(len(self.seeds), n, 2)
        action = self.act(state)
        a = action.cpu().double()
        reward = bandit.reward(state, a)
        mode, distance = bandit.nearest(state, a)
        metrics = {"regret": bandit.max_reward - reward.mean(1), "off": (distance > 3).double().mean(1)}
        metrics |= {f"share_mode{i}": (mode == i).double().mean(1) for i in range(3)}
        by_state = (len(self.seeds), NUM_STATES, self.draws)
        metrics["effective_hills"] = effective_hills(mode.reshape(by_state), distance.reshape(by_state) <= 3)
        each = self.sac_actions if self.policy == "gaussian" else self.candidates
        steps = self.global_step or getattr(self, "loaded_step", 0)
        metrics["critic_evaluations"] = torch.full((len(self.seeds),), float(steps * self.sizes["batch_size"] * each))
        if self.log_alpha is not None:
            metrics["alpha"] = self.log_alpha[:, 0].exp().cpu().double()
        if self.critic_kind == "learned":
            q = self.critic(state.to(like), action).cpu().double()
            metrics["critic_error"] = (q - reward).square().mean(1).sqrt()
        states, actions = state[0].reshape(NUM_STATES, -1, 2), a.reshape(len(a), NUM_STATES, -1, 2)
        self.figure_data = bandit_figures.FigureData(bandit, states, actions)
        return Report(self.seeds, {k: v.tolist() for k, v in metrics.items()}, bandit.baselines)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate the policy."""
        report = self.evaluate()
        self.last_report = report
        self.write_evaluation(report)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate the policy."""
        self.last_report = self.evaluate()
        self.write_scalars({"test/regret": torch.tensor(self.last_report.metrics["regret"])}, self.loaded_step)

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return ``state`` (S, draws, 2), ``action`` (R, S, draws, 2) and expected ``reward`` (R, S, draws)."""
        self.evaluate()
        assert self.figure_data is not None
        state, action = self.figure_data.states, self.figure_data.actions
        reward = self.data.bandit.reward(state.expand_as(action), action)
        return {"state": state, "action": action, "reward": reward}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.figure_data is None:
            return {}
        return bandit_figures.draw_all(self.figure_data, self.seeds, folder, self.label)
