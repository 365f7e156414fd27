"""BilevelControl: an agent that learns its values from a model, and the model by how good these values are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.bilevel.checks import number_in, switches
from lightning_toys.bilevel.control import figures
from lightning_toys.bilevel.control.acting import ActingAgent
from lightning_toys.bilevel.control.agents import SoftValue
from lightning_toys.bilevel.control.data import ReplayData
from lightning_toys.bilevel.control.environments import Disturbance, Environments
from lightning_toys.bilevel.control.episodes import check_repeatable, render_episode, write_gif
from lightning_toys.bilevel.control.gradient_check import gradient_cosine
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.own_agent import try_agent
from lightning_toys.bilevel.control.own_model import Dynamics, check_dynamics, try_dynamics
from lightning_toys.bilevel.control.regret import LocalRegret, model_size
from lightning_toys.bilevel.control.replay import ReplayBuffer
from lightning_toys.bilevel.control.settings import Details, Solver, form_label
from lightning_toys.bilevel.control.stored_environments import environments_mismatch
from lightning_toys.bilevel.control.unused import idle_parts, unused_settings
from lightning_toys.bilevel.control.updates import AgentUpdate, make_agent
from lightning_toys.bilevel.vectors import flatten
from lightning_toys.errors import REPEATS, bounded, check_settings, note, require
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.denormals import denormals_flushed
from lightning_toys.training.files import make_folder, partial_name, put_in_place, set_aside
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.noise import NoiseStream, uniform
from lightning_toys.training.results import Report

LEAST_ALPHA = 1e-30  # values are divided by it in single precision, which holds 3e38
EVALUATION_TRANSITIONS = 1024  # that errors are measured on


class BilevelControl(ActingAgent):
    """Model-based reinforcement learning with discrete actions; a step of the Trainer is one of the environment.

    Args:
        agent: how the model is learned: ``mle`` (maximum likelihood), ``vep`` (value equivalence, arXiv 2011.03506),
            ``omd`` (arXiv 2106.03273), ``funcbo`` (arXiv 2403.20233), ``vaml`` (value-aware model learning: funcbo
            with the inner problem taken for solved) or ``lagged`` (funcbo with the values as they are, damped); the
            control ``model_free``: the same values learn from what happened; or an
            :class:`~lightning_toys.bilevel.control.updates.AgentUpdate` of one's own. See
            :mod:`lightning_toys.bilevel.control.agents`.
        env: an environment of gymnasium with discrete actions and a flat or a numbered observation.
        seeds: one seed a replica.
        hidden_dim: width of the values' hidden layers.
        model_hidden_dim: width of the model's hidden layers; 3 is too narrow for CartPole.
        alpha: temperature of the soft value and of the policy, in units of reward.
        discount: gamma.
        eps: probability of a uniformly random action after the first ``--data.init_steps`` steps.
        lr: Adam's learning rate of the model.
        inner_lr: Adam's learning rate of the values.
        tau: the target values' step towards the values at each outer iteration, target += tau (values - target).
        double_q: two value heads, the smaller of which is the target's (double Q-learning).
        solver: of the bilevel problem.
        disturbance: distractors and a drifting reward.
        clip_grad_norm: bound on each replica's outer gradient norm.
        eval_episodes: episodes of a validation, the same first states each time, greedy actions.
        test_episodes: episodes of a test.
        check_gradient: random directions along which validations compare the outer gradient with finite differences;
            0 is without.
        record: write an episode of every replica as a GIF after `test`.
        regret_every: environment steps between two gradients of the local regret, see
            :class:`~lightning_toys.bilevel.control.regret.LocalRegret`; 0 is without.
        form: ``published`` runs agents as the code published with OMD does.
        world_model: a model of the world of one's own, a :class:`~lightning_toys.bilevel.control.own_model.Dynamics`;
            None is a network with two hidden layers.
        details: its differences from ours one by one, see :class:`~lightning_toys.bilevel.control.settings.Details`.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "bilevel"
    comparison_figures = "lightning_toys.bilevel.control.figures.compare_figures"
    headline = ("return",)
    error_metrics: Sequence[str] = ("td_error", "inner_error", "model_error", "reward_error", "local_regret")
    checkpointed_modules = ("replay", "regret")
    reads_data = False
    monitors_loss = False  # nothing is learned in the first ``--data.init_steps``
    measured_later = (
        *("td_error", "inner_error", "model_error", "reward_error", "value", "gradient_cosine", "local_regret"),
        "wrong_side",
    )
    precisions = ("32-true", "64-true")  # values of a hundred differ by less than half a precision can tell
    metric_labels: Mapping[str, str] = {
        "return": "return of an episode, greedy actions",
        "td_error": "RMS of d - y, units of value",
        "inner_error": "RMS of d - y_T, units of value",
        "model_error": "RMS error of the next state, a coordinate",
        "reward_error": "RMS error of the reward",
        "value": "mean value of the actions taken",
        "gradient_cosine": "cosine of outer gradient and finite differences",
        "wrong_side": "share of values that drive the model's target away from its solution",
        "local_regret": "local regret of the model: mean of |mean of the last 10 outer gradients|^2",
    }

    def __init__(
        self,
        agent: AgentUpdate | str = "omd",
        env: str = "CartPole-v1",
        seeds: Sequence[int] = (0,),
        hidden_dim: int = 32,
        model_hidden_dim: int = 32,
        alpha: float = 0.01,
        discount: float = 0.99,
        eps: float = 0.1,
        lr: float = 1e-3,
        inner_lr: float = 3e-4,
        tau: float = 0.01,
        double_q: bool = True,
        solver: Solver | None = None,
        disturbance: Disturbance | None = None,
        clip_grad_norm: float | None = None,
        eval_episodes: int = 10,
        test_episodes: int = 100,
        check_gradient: int = 0,
        record: bool = False,
        regret_every: int = 0,
        form: Literal["ours", "published"] = "ours",
        details: Details | None = None,
        world_model: Dynamics | str | None = None,
    ) -> None:
        check_settings(BilevelControl, locals(), "--model.")
        super().__init__(seeds, lr, 0.0, clip_grad_norm)
        for name, size in (("hidden_dim", hidden_dim), ("model_hidden_dim", model_hidden_dim)):
            bounded(f"--model.{name}", size, 1)
        bounded("--model.alpha", alpha, LEAST_ALPHA)
        number_in("--model.discount", discount, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        number_in("--model.eps", eps, lambda x: 0 <= x <= 1, "a share between 0 and 1")
        bounded("--model.inner_lr", inner_lr, 0.0, above=True)
        number_in("--model.tau", tau, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        require(isinstance(env, str), f"--model.env: {env!r} is not allowed; give a name, such as CartPole-v1")
        switches("--model", double_q=double_q, record=record)
        for name, count in (("eval_episodes", eval_episodes), ("test_episodes", test_episodes)):
            bounded(f"--model.{name}", count, 1, REPEATS)
        bounded("--model.check_gradient", check_gradient, 0, REPEATS)
        bounded("--model.regret_every", regret_every, 0)
        for name, kind, given in (
            ("solver", Solver, solver),
            ("disturbance", Disturbance, disturbance),
            ("details", Details, details),
        ):
            fits = given is None or isinstance(given, kind | dict)
            require(fits, f"--model.{name}: {given!r} is not allowed; give a {kind.__name__}")
        self.solver, self.disturbance = as_dataclass(Solver, solver), as_dataclass(Disturbance, disturbance)
        self.form_name, self.details = form, as_dataclass(Details, details)
        self.form = self.details.of(form)
        self.world_model, self.dynamics = check_dynamics(world_model)
        self.method = make_agent(agent, self.solver, self.form)
        self.agent = agent if isinstance(agent, str) else f"{type(agent).__module__}.{type(agent).__qualname__}"
        self.env, self.hidden_dim, self.model_hidden_dim = env, hidden_dim, model_hidden_dim
        self.soft_value, self.eps, self.inner_lr, self.tau = SoftValue(alpha, discount), eps, inner_lr, tau
        self.heads = 2 if double_q else 1
        self.eval_episodes, self.test_episodes = eval_episodes, test_episodes
        self.check_gradient, self.record_gifs, self.regret_every = check_gradient, record, regret_every
        self.save_hyperparameters(logger=False)
        self.hparams.update({k: asdict(getattr(self, k)) for k in ("solver", "disturbance", "details")})
        self.hparams["seeds"] = self.seeds
        if self.hparams["agent"] is self.method:  # in a script; the command line keeps class_path and init_args
            self.hparams["agent"] = self.agent
        if self.hparams["world_model"] is self.dynamics:
            self.hparams["world_model"] = self.world_model
        self.environments: Environments | None = None
        self.stored_environments: dict[str, Tensor] | None = None
        self.returns: list[list[float]] = [[] for _ in self.seeds]
        self.action_noise = NoiseStream(self.seeds, "act", (3,), uniform)

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        return unused_settings(self)

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        name = self.method.label or type(self.method).__name__
        kind = f"{self.dynamics.label} of " if self.dynamics is not None else ""
        width = f", model {kind}width {self.model_hidden_dim}" if self.method.uses_model else ""
        return f"{name}{width}{form_label(self.form_name, self.details)}"

    # building

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        replay = require_data(data, ReplayData)
        environments = make_environments(self.env, self.seeds[:1], "train", 1, self.disturbance)
        environments.close()
        check_repeatable(self.env, self.disturbance)
        states, actions = environments.observation_size, environments.num_actions
        self.try_own(states, actions)
        return {"states": states, "actions": actions, "capacity": replay.capacity}

    def try_own(self, states: int, actions: int) -> None:
        """Hold a model and an agent of one's own to their contracts, before anything is run.

        Raises:
            ToyError: says what is wrong.
        """
        if self.dynamics is not None:
            try_dynamics(self.dynamics, self.seeds, states, actions, self.model_hidden_dim)
        once = replace(self.solver, num_q_steps=min(2, self.solver.num_q_steps), num_t_steps=1)
        clip = self.clip_grad_norm
        try_agent(
            self.method,
            self.seeds,
            lambda seeds: make_environments(self.env, seeds, "trial", 1, self.disturbance),
            lambda agent, seeds: self.networks(agent, seeds, states, actions),
            lambda agent, nets: Learner(nets, agent, once, self.soft_value, self.tau, clip, self.form),
        )

    def networks(self, agent: AgentUpdate, seeds: Sequence[int], states: int, actions: int) -> AgentNetworks:
        """Return new networks of an agent for replicas with these seeds."""
        widths, heads = (self.hidden_dim, self.model_hidden_dim), self.heads
        return AgentNetworks(seeds, states, actions, *widths, heads, agent, self.solver, self.form, self.dynamics)

    def build(self) -> AgentNetworks:
        """See :meth:`ToyModule.build`."""
        return self.networks(self.method, self.seeds, self.sizes["states"], self.sizes["actions"])

    def configure_model(self) -> None:
        """See :meth:`ToyModule.configure_model`; the replay buffer is part of the module, so of its checkpoints."""
        super().configure_model()
        if hasattr(self, "net") and not hasattr(self, "replay"):
            self.replay = ReplayBuffer(self.seeds, self.sizes["states"], self.sizes["capacity"])
            if self.regret_every and self.method.uses_model:
                self.regret = LocalRegret(len(self.seeds), model_size(list(self.nets.model.parameters())))

    @property
    def learner(self) -> Learner:
        """Runs outer iterations on the networks."""
        value, clip = self.soft_value, self.clip_grad_norm
        return Learner(self.nets, self.method, self.solver, value, self.tau, clip, self.form)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return two optimisers: Adam of the model, and Adam of the values."""
        fused = self.device.type in ("cpu", "cuda")
        outer = torch.optim.Adam(self.nets.model.parameters(), lr=self.lr, fused=fused)
        return outer, torch.optim.Adam(self.nets.q.parameters(), lr=self.inner_lr, fused=fused)

    # training

    def on_train_start(self) -> None:
        """Set the learning rates given now, and start the environments or restore them from the checkpoint."""
        for optimizer, lr in zip(self.trainer.optimizers, (self.lr, self.inner_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr
        if self.trainer.is_global_zero:
            warm = require_data(self.trainer.datamodule, ReplayData).init_steps  # type: ignore[attr-defined]
            for text in idle_parts(self, warm, self.trainer.max_steps):
                note(text)
        self.environments = make_environments(self.env, self.seeds, "train", 1, self.disturbance)
        if self.stored_environments is not None:
            self.environments.load_state_dict(self.stored_environments)

    @denormals_flushed()
    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Act, store and learn, step by step. Every rank does the same: bit for bit what one process does."""
        outer, inner = self.trainer.optimizers
        data = require_data(self.trainer.datamodule, ReplayData)  # type: ignore[attr-defined]
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        environments, learner = self.environments, self.learner
        assert environments is not None
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        losses = []
        for step in range(block.start, block.stop):
            learning = step >= data.init_steps
            action = self.exploration_actions(environments.observation, step, not learning)
            # what `global_step` counts: steps of the environment, random ones too, not those of two optimisers
            progress.increment_ready()
            self.replay.store(environments.step(action, step))
            for episode in environments.finished_episodes:
                self.returns[episode.replica].append(episode.total_reward)
            loss = torch.zeros(len(self.seeds)).to(self.replay.rows)
            if learning:
                first = step * learner.batches
                sample = partial(self.sample_replay_after, first, data.batch_size)
                loss = learner.environment_step(sample, outer, inner)
                if self.regret_every and (step + 1) % self.regret_every == 0:
                    self.measure_regret(step)
            progress.increment_completed()
            losses.append(loss / block.world_size)
            if every and (step + 1) % every == 0:
                self.log_training(step + 1, learning, learner)
        if block.stop > data.init_steps:
            self.finish_block(block, torch.stack(losses))
        else:  # nothing has a loss yet; the step is counted all the same
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = block.stop

    def sample_replay(self, index: int, count: int, stream: str) -> Any:
        """Return ``count`` transitions a replica, drawn by ``index`` and ``stream``, in the networks' precision."""
        batch = self.replay.sample(index, count, stream)
        dtype = self.nets.q.weights()["w0"].dtype
        if batch.observation.dtype == dtype:
            return batch
        return batch._replace(**{k: x.to(dtype) for k, x in batch._asdict().items() if x.is_floating_point()})

    def sample_replay_after(self, first: int, count: int, k: int) -> Any:
        """Return :meth:`sample_replay` of index ``first`` + k."""
        return self.sample_replay(first + k, count, "replay")

    def measure_regret(self, step: int) -> None:
        """Add the outer gradient at the present networks to the local regret."""
        if not hasattr(self, "regret"):
            return
        learner, batch = self.learner, self.sample_replay(step, EVALUATION_TRANSITIONS, "regret")
        problem = learner.problem(batch)
        targets = None if self.method.fits else problem.model_targets()
        gradient, _ = learner.model_gradient(problem, targets)
        if gradient is not None:
            self.regret.add(flatten(gradient))

    def log_training(self, step: int, learning: bool, learner: Learner) -> None:
        """Log returns of the episodes that ended since the last time, and the gradients' norms."""
        row: dict[str, Tensor] = {}
        if all(self.returns):
            row["train/return"] = torch.tensor([float(np.mean(x)) for x in self.returns])
            self.returns = [[] for _ in self.seeds]
        if learning:
            for name, net in (("outer", self.nets.model), ("inner", self.nets.q)):
                g = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
                if g:  # a model that nothing learns from has none
                    row[f"train/{name}_gradient_norm"] = flatten(g).norm(dim=1)
            if learner.residual is not None and self.solver.inverse != "identity":
                row["train/cg_residual"] = learner.residual
        if row:
            self.write_scalars(row, step)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_save_checkpoint`; the environments are kept too, and returns not yet logged."""
        super().on_save_checkpoint(checkpoint)
        if self.environments is not None:
            checkpoint["toy"] |= {"environments": self.environments.state_dict(), "returns": self.returns}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if not hasattr(self, "regret"):  # a test that does not ask for it
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("regret.")}
        self.stored_environments = checkpoint["toy"].get("environments")
        self.returns = checkpoint["toy"].get("returns", self.returns)

    def has_learned(self, checkpoint: dict[str, Any]) -> bool:
        """See :meth:`ToyModule.has_learned`: in the random steps at the beginning no optimiser steps."""
        data = checkpoint["toy"]["config"].get("data")
        given = data.get("init_args") if isinstance(data, dict) else None
        warm = given.get("init_steps") if isinstance(given, dict) else None
        return int(checkpoint["global_step"]) > (warm if isinstance(warm, int) else 0)

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """See :meth:`ToyModule.extras_mismatch`: the environments, and returns not yet logged; a test reads neither."""
        if not resumes:
            return ""
        return environments_mismatch(self.env, self.seeds, self.disturbance, toy, step)

    # evaluating

    def evaluate(self, stream: str, episodes: int) -> Report:
        """Roll out episodes with greedy actions, the same first states each time; measure errors on the replay."""
        step = self.weights_step
        totals, lengths = self.rollout_returns(stream, episodes)
        found = {"return": totals.mean(1), "length": lengths.astype(np.float64).mean(1)}
        if episodes > 1:
            found["return_sd"] = totals.std(1, ddof=1)
        metrics = {k: v.tolist() for k, v in found.items()}
        if self.replay.size:
            batch = self.sample_replay(step, EVALUATION_TRANSITIONS, "judge")
            metrics |= {k: v.double().tolist() for k, v in self.learner.measure_errors(batch).items()}
            if hasattr(self, "regret") and int(self.regret.count):
                metrics["local_regret"] = self.regret.mean.double().tolist()
            if self.check_gradient and self.method.response != "none":
                check = self.sample_replay(step, 256, "check")
                cosine = gradient_cosine(self.learner, check, self.seeds, self.check_gradient, step)
                metrics["gradient_cosine"] = cosine.tolist()
        return Report(self.seeds, metrics)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate, see :meth:`evaluate`."""
        self.last_report = self.evaluate("evaluation", self.eval_episodes)
        self.write_evaluation(self.last_report)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate on other episodes, and more of them; write one as a GIF if ``record``."""
        report = self.evaluate("test", self.test_episodes)
        totals, lengths = self.rollout_returns("test", self.test_episodes, greedy=False)
        # what an agent has to beat, in the same episodes
        report.references = {"random actions": {"return": float(totals.mean()), "length": float(lengths.mean())}}
        self.last_report = report
        if self.record_gifs and self.trainer.is_global_zero:
            folder = self.run_folder / "figures"
            make_folder(folder)
            for r, seed in enumerate(self.seeds):
                frames = render_episode(self.env, partial(self.greedy_action_of, r=r), seed, self.disturbance)
                path = folder / f"episode_seed_{seed}.gif"
                unfinished = partial_name(path)
                write_gif(frames[::2], unfinished, 25)
                set_aside(path)
                put_in_place(unfinished, path)
                self.tell(f"{path}: {len(frames) - 1} steps")

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        return figures.draw_training(folder, self.seeds, self.label)
