"""MeanFlowPolicy acts by one step of an average velocity; FlowPolicy by integrating a velocity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.generative_policy.actors import Actor, FlowActor, MeanFlowActor
from lightning_toys.generative_policy.couplings import Independent
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.flow_ode import flow_log_prob, flow_sample
from lightning_toys.generative_policy.meanflow import (
    AverageVelocity,
    Plain,
    Preconditioned,
    TimeDistribution,
    adaptive_loss,
    gaussian_entropy,
    log_det,
    path,
    path_velocity,
    residual,
    sample,
    squared_error,
)
from lightning_toys.generative_policy.metrics import likelihood_metrics
from lightning_toys.generative_policy.own import check_deconvolved, require_velocity
from lightning_toys.generative_policy.policy import Evaluation, GenerativePolicy
from lightning_toys.generative_policy.target import Target
from lightning_toys.nets import Network
from lightning_toys.training.configuration import as_dataclass, unused_flags
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream, uniform
from lightning_toys.training.replica_parallel import Parallel

EXACT_POINTS = 2000  # points at which the flow map is compared with the exact one, and likelihoods are taken


class MeanFlowPolicy(GenerativePolicy):
    """Stochastic MeanFlow Policy (arXiv 2605.21282): a = e - u(e, 0, 1), or with a head a = e - u + sigma xi.

    Trained to make u + (t - r) sg(du/dt) - v vanish; see docs/generative_policy.md for the equations.

    Args:
        seeds: one seed a replica.
        network: the network (concat or film).
        form: ``edm`` preconditions the network by the path's scale, ``plain`` does not.
        tangent: the velocity along which du/dt is taken: ``network`` is u(z, t, t) (Geng et al. 2025, improved form),
            ``conditional`` is e - x (MeanFlow as first published), ``oracle`` the exact marginal velocity, which is
            then the regression's target too.
        time: the distribution of r and t.
        loss_power: p of the adaptive weight (|error|^2 + floor)^-p; 0 is the plain square.
        loss_floor: floor of the adaptive weight.
        target_std: standard deviation s of the distribution at the data end, N(x, s^2 I) in place of a point; 0 is
            "without entropy".
        target_std_as: ``head``: a log sigma beside u, trained towards log s at every query, while the map is trained
            on the target itself: an ideal map's actions have the target's variance plus s^2. ``deconvolved``: actions
            get noise of the fixed width s, and the map is trained on the distribution whose convolution with it is the
            target, where there is one. ``sigma_min``: the path itself ends at x + s e.
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rates to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights.
        ema_warmup: whether its decay grows to that over the first steps; false is the constant decay of older runs.
        evaluation: how samples are drawn and evaluated.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        compile: whether the loss is compiled (`torch.compile`): for GPUs; takes half a minute once.

    Raises:
        ToyError: a value is not allowed.

    Example:
        Actions of two replicas with their initial weights:

        >>> policy = MeanFlowPolicy(seeds=[0, 1])
        >>> policy.sizes = policy.measure(MixtureData())
        >>> policy.configure_model()
        >>> policy.sample(5).shape
        torch.Size([2, 5, 2])
    """

    readout_pattern = r"[1-9]\d*"

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        form: Literal["edm", "plain"] = "edm",
        tangent: Literal["network", "conditional", "oracle"] = "network",
        time: TimeDistribution | None = None,
        loss_power: float = 0.25,
        loss_floor: float = 1e-3,
        target_std: float = 0.0,
        target_std_as: Literal["head", "deconvolved", "sigma_min"] = "head",
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        lr_decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        evaluation: Evaluation | None = None,
        parallel: Parallel = "batch",
        compile: bool = False,
        ema_warmup: bool = True,
    ) -> None:
        check_settings(MeanFlowPolicy, locals(), "--model.")
        super().__init__(
            seeds, lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, optimizer, muon_lr, parallel, compile
        )
        default = Network(activation="silu")
        self.network = as_dataclass(Network, network, default)
        self.evaluation = as_dataclass(Evaluation, evaluation)
        self.time = as_dataclass(TimeDistribution, time)
        require(
            self.network.kind != "transformer",
            "--model.network.kind: 'transformer' is not allowed here, it has no tangent; give concat or film",
        )
        bounded("--model.loss_power", loss_power, 0.0)
        bounded("--model.loss_floor", loss_floor, 0.0, above=True)
        require(0 <= target_std < 1, f"--model.target_std: {target_std} is not allowed; give a number in [0, 1)")
        self.form, self.tangent, self.ema_warmup = form, tangent, ema_warmup
        self.loss_power, self.loss_floor = loss_power, loss_floor
        self.target_std, self.target_std_as = target_std, target_std_as
        self.head = target_std > 0 and target_std_as == "head"
        self.sigma_min = target_std if target_std_as == "sigma_min" else 0.0
        self.added_std = target_std if target_std_as == "deconvolved" else 0.0
        self.save_hyperparameters(logger=False)
        self.hparams.update(
            {"network": asdict(self.network), "evaluation": asdict(self.evaluation), "time": asdict(self.time)}
        )
        self.hparams["seeds"] = self.seeds

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        out = super().unused_settings() | self.network.unused_settings() | self.time.unused_settings()
        if not self.target_std:
            out |= unused_flags("--model.target_std above 0", "target_std_as")
        return out if self.loss_power else out | unused_flags("--model.loss_power above 0", "loss_floor")

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return f"SMFP target_std {self.target_std:g}"

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        sizes = super().measure(data)
        assert isinstance(data, MixtureData)
        if self.tangent == "oracle":
            require_velocity(data.target)
            require(
                isinstance(data.coupling, Independent),
                "--model.tangent: 'oracle' is the velocity of independent pairs; give --data.coupling Independent",
            )
        if self.added_std:
            made = check_deconvolved(data.target, self.added_std, data.sampler is not None)
            if self.tangent == "oracle":
                require_velocity(made)
        return sizes

    def training_target(self, target: Target) -> Target:
        """See :meth:`GenerativePolicy.training_target`."""
        return target.deconvolved(self.added_std) if self.added_std else target

    def build(self) -> AverageVelocity:
        """See :meth:`ToyModule.build`."""
        self.t_noise = NoiseStream(self.local_seeds, "t", (self.sizes["batch_size"], 2), uniform)
        net = self.network.build(self.local_seeds, self.dim, 2, True, self.dim + self.head)
        form = Plain() if self.form == "plain" else Preconditioned(self.sizes["scale"], self.sigma_min)
        return AverageVelocity(net, form, self.head)

    # training

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        x, e = batch.columns
        local = slice(batch.first, batch.first + x.shape[1])
        r, t, k = self.time.sample(self.t_noise.at(step, x), local)
        target = self.training_target(self.data.target) if self.tangent == "oracle" else self.data.target
        both = self.compiled(self.losses)(x, e, r, t, k, target, batch.total)
        if self.loss_power or self.head:
            self.note_losses(loss_unweighted=both[1])
        return both[0]

    def losses(self, x: Tensor, e: Tensor, r: Tensor, t: Tensor, k: int, target: Target, total: int) -> Tensor:
        """Return losses for pairs x, e (R, B, D) at times r, t (R, B, 1), r < t in the first k rows.

        Returns:
            (2, R), sums over the rows divided by ``total``: the loss, and the squared error alone, unweighted.
        """
        z, v = path(x, e, t, self.sigma_min), path_velocity(x, e, self.sigma_min)
        net = self.net
        assert isinstance(net, AverageVelocity)
        if self.tangent == "oracle":
            v = target.marginal_velocity(z, t, self.sigma_min)
        u, log_sigma, du = net.jvp(z, r, t, self.tangent_direction(z[:, :k], t[:, :k], v[:, :k]))
        error = residual(u, du, (t - r)[:, :k], v)
        loss = adaptive_loss(error, self.loss_power, self.loss_floor)
        if log_sigma is not None:
            loss = loss + (log_sigma[..., 0] - math.log(self.target_std)).square()
        return torch.stack([loss.sum(1), squared_error(error).sum(1)]) / total

    @torch.no_grad()
    def tangent_direction(self, z: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return dz/dt (R, K, D) along which u is differentiated; ``v`` is e - x, or the exact velocity."""
        assert isinstance(self.net, AverageVelocity)
        if self.tangent == "network" and z.shape[1] > 0:
            return self.net.velocity(z, t).to(z)
        return v

    # evaluation

    @property
    def evaluation_net(self) -> AverageVelocity:
        """The weights that are evaluated."""
        net = super().evaluation_net
        assert isinstance(net, AverageVelocity)
        return net

    def actor(self) -> Actor:
        """See :meth:`GenerativePolicy.actor`: by one step, whatever the readouts."""
        return MeanFlowActor(self.evaluation_net, self.target_std if self.head else 0.0, self.added_std)

    def readouts(self, nfes: list[int], full: bool) -> list[str]:
        """See :meth:`GenerativePolicy.readouts`: numbers of steps, ``1``, ``8``."""
        return [f"{n}" for n in nfes]

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`GenerativePolicy.actions`."""
        z, log_sigma = sample(self.evaluation_net, e, int(readout))
        if self.added_std:
            return z + self.added_std * xi
        return z if log_sigma is None else torch.addcmul(z, log_sigma.exp(), xi)

    def policy_metrics(self, readout: str, e: Tensor, main: bool, full: bool) -> dict[str, Tensor]:
        """Return the entropies of the one-step policy, and with ``full`` the RMS distance to the exact flow map."""
        out: dict[str, Tensor] = {}
        if not main:
            return out
        net = self.evaluation_net
        if blur := self.sigma_min or self.added_std:  # x + s e given x
            out["entropy_surrogate"] = torch.full((len(self.seeds),), gaussian_entropy(blur, self.dim))
        if readout != "1":
            return out
        if self.head:
            log_sigma = sample(net, e, 1)[1]
            assert log_sigma is not None
            out["entropy_surrogate"] = gaussian_entropy(1.0, self.dim) + self.dim * log_sigma.double().mean((1, 2))
            out["sigma"] = log_sigma.double().exp().mean((1, 2))
        elif not self.added_std:
            log_abs_det, sign = log_det(net, e)
            # an upper bound where the map folds, that is, where the determinant changes its sign
            out["entropy_exact"] = gaussian_entropy(1.0, self.dim) + log_abs_det.double().mean(1)
            out["folded"] = (sign < 0).double().mean(1)
        target = self.training_target(self.data.target)
        if full and target.has_velocity and isinstance(self.data.coupling, Independent):
            noise = e[:, :EXACT_POINTS]
            exact = flow_sample(
                lambda z, t: target.marginal_velocity(z, t, self.sigma_min), noise.double(), "dopri5", 1, 1e-6
            )
            one = sample(net, noise, 1)[0].double()
            out["flow_map_error"] = (one - exact).square().sum(-1).mean(1).sqrt()
        return out


class FlowPolicy(MeanFlowPolicy):
    """Flow matching on the same network: u(z, t, t) regressed on e - x, and integrated by torchdiffeq.

    Metrics without a readout in their name are those of the first entry of ``evaluation.nfe``; `test` adds dopri5, the
    exact entropy of its distribution and the forward KL to it from the target, by the trace of the Jacobian.

    Args:
        seeds: one seed a replica.
        network: the network (concat or film).
        form: ``edm`` preconditions the network by the path's scale, ``plain`` does not.
        tangent: ``oracle`` regresses on the exact marginal velocity; else on e - x.
        time: the distribution of t; ``share`` is unused.
        loss_power: p of the adaptive weight (|error|^2 + floor)^-p; 0 is the plain square.
        loss_floor: its floor.
        target_std: standard deviation left at the data end by the path.
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rates to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights.
        ema_warmup: whether its decay grows to that over the first steps; false is the constant decay of older runs.
        evaluation: how samples are drawn and evaluated.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        compile: whether the loss is compiled (`torch.compile`): for GPUs; takes half a minute once.
    """

    readout_pattern = r"euler-[1-9]\d*|dopri5"

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        form: Literal["edm", "plain"] = "edm",
        tangent: Literal["conditional", "oracle"] = "conditional",
        time: TimeDistribution | None = None,
        loss_power: float = 0.0,
        loss_floor: float = 1e-3,
        target_std: float = 0.0,
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        lr_decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        evaluation: Evaluation | None = None,
        parallel: Parallel = "batch",
        compile: bool = False,
        ema_warmup: bool = True,
    ) -> None:
        check_settings(FlowPolicy, locals(), "--model.")
        time = as_dataclass(TimeDistribution, time)
        super().__init__(
            seeds=seeds,
            network=network,
            form=form,
            tangent=tangent,
            time=replace(time, share=0.0),
            loss_power=loss_power,
            loss_floor=loss_floor,
            target_std=target_std,
            target_std_as="sigma_min",
            optimizer=optimizer,
            muon_lr=muon_lr,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            evaluation=evaluation,
            parallel=parallel,
            compile=compile,
            ema_warmup=ema_warmup,
        )

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        return super().unused_settings() | unused_flags("a policy that learns mean velocities", "time.share")

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return "flow matching"

    def actor(self) -> Actor:
        """See :meth:`GenerativePolicy.actor`: by as many Euler steps as the first of ``evaluation.nfe``."""
        return FlowActor(self.evaluation_net, self.evaluation.nfe[0])

    def readouts(self, nfes: list[int], full: bool) -> list[str]:
        """See :meth:`GenerativePolicy.readouts`: ``euler-8``, and with ``full`` ``dopri5``."""
        return [f"euler-{n}" for n in nfes] + (["dopri5"] if full else [])

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`GenerativePolicy.actions`."""
        solver, _, nfe = readout.partition("-")
        velocity = self.evaluation_net.velocity
        if solver == "dopri5":
            return flow_sample(velocity, e, "dopri5", 1)
        return flow_sample(velocity, e, "euler", int(nfe))

    def policy_metrics(self, readout: str, e: Tensor, main: bool, full: bool) -> dict[str, Tensor]:
        """Return, for ``dopri5``, the exact entropy of the policy, in nats, and its :func:`likelihood_metrics`."""
        if readout != "dopri5":
            return {}
        x = self.actions(readout, e[:, :EXACT_POINTS], e[:, :EXACT_POINTS])
        truth = torch.stack([self.data.reference(s, EXACT_POINTS) for s in self.seeds])
        own, cross = (flow_log_prob(self.velocity_and_divergence, a.to(x)).double() for a in (x, truth))
        return {"entropy_exact": -own.mean(1), **likelihood_metrics(self.data.target, truth, cross)}

    def velocity_and_divergence(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity (R, B, D) at z (R, B, D) and t (R, B, 1), and its divergence (R, B, 1)."""
        net, divergence, velocity = self.evaluation_net, torch.zeros_like(t), z
        for i in range(z.shape[-1]):
            direction = torch.zeros_like(z)
            direction[..., i] = 1.0
            velocity, _, column = net.jvp(z, t, t, direction, dt=0.0)
            divergence = divergence + column[..., i : i + 1]
        return velocity, divergence
