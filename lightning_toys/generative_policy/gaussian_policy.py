"""GaussianPolicy: SAC's tanh-Gaussian, trained on the reverse KL to a known target, or by likelihood on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_toys.errors import check_settings, require
from lightning_toys.generative_policy.actors import EDGE, Actor, ConstantGaussianActor
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.gaussian import Bound, bounded_log_sigma, squash, tanh_gaussian_log_prob
from lightning_toys.generative_policy.metrics import likelihood_metrics
from lightning_toys.generative_policy.policy import Evaluation, GenerativePolicy
from lightning_toys.generative_policy.quadrature import normal_rule
from lightning_toys.generative_policy.samplers import density_and_gradient
from lightning_toys.generative_policy.target import Target
from lightning_toys.nets import Network, keyed_uniform
from lightning_toys.training.configuration import as_dataclass, unused_flags
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream, keyed_generator
from lightning_toys.training.replica_parallel import Parallel


class FreeParameters(nn.Module):
    """mu and the raw log sigma as parameters (R, 1, 2 D), initialised from U(-1, 1), as a one-input layer's bias."""

    def __init__(self, seeds: Sequence[int], dim: int = 2) -> None:
        super().__init__()
        self.value = keyed_uniform(seeds, "free.value", (1, 2 * dim), 1.0)

    def forward(self) -> Tensor:
        """Return the parameters (R, 1, 2 D)."""
        return self.value


class StatelessNet(nn.Module):
    """A network whose only input is a state of zeros, as in a bandit without contexts."""

    def __init__(self, spec: Network, seeds: Sequence[int], dim: int = 2) -> None:
        super().__init__()
        self.net = spec.build(seeds, 1, 1, False, 2 * dim)

    def forward(self) -> Tensor:
        """Return the network's output (R, 1, 2 D): mu and the raw log sigma."""
        like = next(self.net.parameters())
        state = like.new_zeros(len(like), 1, 1)
        out: Tensor = self.net(state, state)
        return out


class GaussianPolicy(GenerativePolicy):
    """a = tanh(mu + sigma xi), trained on E[log pi(a) - log p(a)], the reverse KL to a target p that is known.

    Any density will do that torch differentiates, through the action (a reparameterised gradient). ``kl`` is that
    divergence by quadrature; a policy that settles on mode i ends at -log(w_i m_i) nats, m_i being the part of the mode
    that lies in [-1, 1]^D, where actions are. Where the density is not normalised, ``kl`` takes the sampler's estimate
    of its integral.

    Args:
        seeds: one seed a replica.
        parameters: ``network`` fed a state of zeros, or ``free`` parameters.
        network: the network.
        bound: log sigma as -1.5 + 3.5 tanh(.), or clipped to [-20, 2].
        lr: Adam's learning rate.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights.
        ema_warmup: whether its decay grows to that over the first steps; false is the constant decay of older runs.
        lr_decay: ``cosine`` ends at a learning rate of 0.
        evaluation: how samples are drawn and evaluated.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        compile: whether the loss is compiled (`torch.compile`): for GPUs; takes half a minute once.
        divergence: ``reverse_kl``, which wants a density, or ``forward_kl``: maximum likelihood of the target's
            samples, such as actions out of a file; those on the edge of [-1, 1] count as 1e-6 inside.

    Raises:
        ToyError: a value is not allowed.
    """

    readout_pattern = "direct"
    headline = ("kl", "tv", "entropy_exact")
    error_metrics: Sequence[str] = (*GenerativePolicy.error_metrics, "kl")

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        parameters: Literal["network", "free"] = "network",
        network: Network | None = None,
        bound: Bound = "tanh",
        lr: float = 3e-4,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        lr_decay: Literal["constant", "cosine"] = "constant",
        evaluation: Evaluation | None = None,
        parallel: Parallel = "batch",
        compile: bool = False,
        divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl",
        ema_warmup: bool = True,
    ) -> None:
        check_settings(GaussianPolicy, locals(), "--model.")
        super().__init__(
            seeds, lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, parallel=parallel, compile=compile
        )
        self.network = as_dataclass(Network, network, Network(hidden=64, layers=2))
        self.evaluation = as_dataclass(Evaluation, evaluation)
        self.parameters_from, self.bound, self.divergence = parameters, bound, divergence
        self.reads_data, self.ema_warmup = divergence == "forward_kl", ema_warmup
        self.save_hyperparameters(logger=False)
        self.hparams.update({"network": asdict(self.network), "evaluation": asdict(self.evaluation)})
        self.hparams["seeds"] = self.seeds

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        flow = "a policy that is a flow"
        out = super().unused_settings() | unused_flags(flow, "evaluation.nfe", "evaluation.test_nfe")
        out |= {"--data.coupling": flow}
        if not self.reads_data:
            out |= {"--data.num_workers": "--model.divergence forward_kl, or a policy that is a flow"}
        if self.parameters_from == "free":
            return out | unused_flags("--model.parameters network", "network.")
        return out | self.network.unused_settings(with_time=False)

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return "Gaussian, maximum likelihood" if self.reads_data else "SAC Gaussian"

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`."""
        self.noise = NoiseStream(self.local_seeds, "xi", (self.sizes["batch_size"], self.dim))
        if self.parameters_from == "free":
            return FreeParameters(self.local_seeds, self.dim)
        return StatelessNet(self.network, self.local_seeds, self.dim)

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        sizes = super().measure(data)
        assert isinstance(data, MixtureData)
        check_box(data.target)
        if not self.reads_data:
            check_density(data.target)
        require(
            not (self.parameters_from == "free" and self.weight_decay > 0),
            f"--model.weight_decay: {self.weight_decay} is not allowed with free parameters; give 0",
        )
        return sizes

    def mu_log_sigma(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the policy's mu and log sigma, each (R, 1, D)."""
        mu, raw = net().chunk(2, dim=-1)
        return mu, bounded_log_sigma(raw, self.bound)

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        if self.reads_data:
            return self.compiled(self.likelihood_losses)(batch.columns[0], batch.total)
        like = next(self.net.parameters())
        xi = self.noise.at(step, like)[:, batch.first : batch.last]  # there is no row of data to count
        return self.compiled(self.losses)(xi, self.data.target, batch.total)

    def losses(self, xi: Tensor, target: Target, total: int) -> Tensor:
        """Return each replica's loss (R,) for standard normals xi (R, B, D): a sum divided by ``total``."""
        mu, log_sigma = self.mu_log_sigma(self.net)
        a, log_pi = squash(mu, log_sigma, xi)
        return (log_pi - target.log_prob(a)).sum(1) / total

    def likelihood_losses(self, x: Tensor, total: int) -> Tensor:
        """Return each replica's -log pi(x) (R,) of samples x (R, B, D): a sum divided by ``total``."""
        return -self.log_prob(self.net, x).sum(1) / total

    def log_prob(self, net: nn.Module, x: Tensor) -> Tensor:
        """Return log pi(x) (R, B) of actions x (R, B, D); those on the edge count as 1e-6 inside."""
        mu, log_sigma = self.mu_log_sigma(net)
        return tanh_gaussian_log_prob(x.clamp(-1 + EDGE, 1 - EDGE), mu, log_sigma)

    # evaluation

    def actor(self) -> Actor:
        """See :meth:`GenerativePolicy.actor`."""
        return ConstantGaussianActor(self.evaluation_net, self.bound)

    def readouts(self, nfes: list[int], full: bool) -> list[str]:
        """See :meth:`GenerativePolicy.readouts`: there is one, ``direct``."""
        return ["direct"]

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`GenerativePolicy.actions`."""
        mu, log_sigma = self.mu_log_sigma(self.evaluation_net)
        return squash(mu, log_sigma, e)[0]

    def policy_metrics(self, readout: str, e: Tensor, main: bool, full: bool) -> dict[str, Tensor]:
        """Return :func:`exact_metrics` of the policy, and what it was trained on where that is the likelihood."""
        data = self.data
        mu, log_sigma = (p.detach().double().cpu() for p in self.mu_log_sigma(self.evaluation_net))
        out = exact_metrics(mu, log_sigma, data.target, data.log_z(self.seeds))
        if not self.reads_data:
            return out
        truth = torch.stack([data.reference(s, self.evaluation.samples) for s in self.seeds])
        log_q = tanh_gaussian_log_prob(truth.clamp(-1 + EDGE, 1 - EDGE), mu, log_sigma)
        return out | likelihood_metrics(data.target, truth, log_q)


def check_box(target: Target) -> None:
    """Refuse a target that has samples out of [-1, 1]^D, where a tanh-Gaussian has none.

    Raises:
        ToyError: names the target and what helps.
    """
    low, high = target.box()
    fits = bool(((low >= -1) & (high <= 1)).all())
    hint = "rescale log_prob" if target.has_density else "give --data.limits of an action"
    require(
        fits,
        f"--data.target: {type(target).__name__} has actions out of [-1, 1], where a tanh-Gaussian has none; {hint}",
    )


def check_density(target: Target) -> None:
    """Refuse a target whose density the reverse KL cannot take.

    Raises:
        ToyError: names the target and what it lacks.
    """
    name, forward = type(target).__name__, "--model.divergence forward_kl"
    needs = f"--model.divergence: 'reverse_kl' needs a density, which {name} has not; give {forward}"
    require(target.has_density, needs)
    low, high = target.box()
    whole = bool(((low == -1) & (high == 1)).all())
    x = 2 * torch.from_numpy(keyed_generator(0, 0, "density/trial").random((256, target.dim))) - 1
    require(
        whole and bool(target.log_prob(x).isfinite().all()),
        f"--data.target: {name} is not allowed, the reverse KL needs a density everywhere in [-1, 1]^D; give {forward}",
    )
    grad = density_and_gradient(target, x)[1]
    require(bool(grad.isfinite().all()), f"--data.target: {name}.log_prob has a gradient that is not finite")


def exact_metrics(
    mu: Tensor, log_sigma: Tensor, target: Target, log_z: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return metrics (R,) of tanh-Gaussians with mu and log sigma (R, 1, D), by :func:`normal_rule`.

    ``kl`` is the reverse KL and ``entropy_exact`` the entropy, in nats. ``kl_gap`` is kl + log(w_i m_i), i being the
    mode nearest to tanh(mu), w_i its weight and m_i the part of it within [-1, 1]^D: no policy whose actions lie there
    comes closer to the mode than -log(w_i m_i). ``chose_mode`` i is 1 for that mode and 0 for the others, so that its
    mean is the mode's share of the seeds. What wants a density, or modes, is left out of a target without.

    Args:
        mu: of the policies.
        log_sigma: likewise.
        target: p.
        log_z: for each replica the logarithm of the integral of p's density; 0 if left out.
    """
    xi, weight = normal_rule(mu.shape[-1])
    kls, entropies = [], []
    for m, s in zip(torch.split(mu, 1), torch.split(log_sigma, 1), strict=True):  # many points: a replica at a time
        a, log_pi = squash(m, s, xi.unsqueeze(0))
        # log pi + |xi|^2 / 2 is smooth, and |xi|^2 / 2 has the mean D / 2
        entropies.append(mu.shape[-1] / 2 - (log_pi + 0.5 * xi.square().sum(-1)) @ weight)
        if target.has_density:
            kls.append((log_pi - target.log_prob(a)) @ weight)
    out = {"entropy_exact": torch.cat(entropies)}
    if kls and (target.normalised or log_z is not None):
        kl = torch.cat(kls) + torch.tensor(log_z or [0.0] * len(kls), dtype=torch.float64)
        if bool(kl.isfinite().all()):
            out = {"kl": kl, **out}
    if not target.has_modes:
        return out
    mode = target.nearest(torch.tanh(mu[:, 0]))[0]
    if "kl" in out:
        out["kl_gap"] = out["kl"] + target.weights_inside()[mode].log()
    for i in range(len(target.mode_weights)):
        out[f"chose_mode{i}"] = (mode == i).double()
    return out
