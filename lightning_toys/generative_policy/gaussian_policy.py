"""GaussianPolicy: SAC's tanh-Gaussian, trained on the reverse KL to a known target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_toys.errors import require
from lightning_toys.generative_policy.actors import Actor, ConstantGaussianActor
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.gaussian import Bound, bounded_log_sigma, squash
from lightning_toys.generative_policy.mixture import Mixture, Target
from lightning_toys.generative_policy.policy import Evaluation, GenerativePolicy
from lightning_toys.generative_policy.quadrature import normal_rule
from lightning_toys.nets import Network, keyed_uniform
from lightning_toys.training.configuration import as_dataclass, unused_flags
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream
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

    ``kl`` is that divergence by quadrature; a policy that settles on mode i ends at -log(w_i m_i) nats, m_i being the
    part of the mode that lies in [-1, 1]^D, where actions are.

    Args:
        seeds: one seed a replica.
        parameters: ``network`` fed a state of zeros, or ``free`` parameters.
        network: the network.
        bound: log sigma as -1.5 + 3.5 tanh(.), or clipped to [-20, 2].
        lr: Adam's learning rate.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights.
        lr_decay: ``cosine`` ends at a learning rate of 0.
        evaluation: how samples are drawn and evaluated.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        compile: whether the loss is compiled (`torch.compile`): for GPUs; takes half a minute once.

    Raises:
        ToyError: a value is not allowed.
    """

    reads_data = False
    readout_pattern = "direct"
    headline = ("kl", "tv", "entropy_exact")
    error_metrics: Sequence[str] = ("kl",)

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
    ) -> None:
        super().__init__(
            seeds, lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, parallel=parallel, compile=compile
        )
        self.network = as_dataclass(Network, network, Network(hidden=64, layers=2))
        self.evaluation = as_dataclass(Evaluation, evaluation)
        self.parameters_from, self.bound = parameters, bound
        self.save_hyperparameters(logger=False)
        self.hparams.update({"network": asdict(self.network), "evaluation": asdict(self.evaluation)})
        self.hparams["seeds"] = self.seeds

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        flow = "a policy that is a flow"
        out = super().unused_settings() | unused_flags(flow, "evaluation.nfe", "evaluation.test_nfe")
        out |= {"--data.coupling": flow, "--data.num_workers": flow}  # no sample is drawn
        if self.parameters_from == "free":
            return out | unused_flags("--model.parameters network", "network.")
        return out | self.network.unused_settings(with_time=False)

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return "SAC Gaussian"

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
        name = type(data.target).__name__
        require(
            isinstance(data.target, Mixture),
            f"--data.target: {name} is not allowed, the reverse KL needs a density everywhere; give a Gaussian mixture",
        )
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
        like = next(self.net.parameters())
        xi = self.noise.at(step, like)[:, batch.first : batch.last]  # there is no row of data to count
        return self.compiled(self.losses)(xi, self.data.target, batch.total)

    def losses(self, xi: Tensor, target: Target, total: int) -> Tensor:
        """Return each replica's loss (R,) for standard normals xi (R, B, D): a sum divided by ``total``."""
        mu, log_sigma = self.mu_log_sigma(self.net)
        a, log_pi = squash(mu, log_sigma, xi)
        return (log_pi - target.log_prob(a)).sum(1) / total

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
        """Return :func:`exact_metrics` of the policy."""
        mu, log_sigma = (p.detach().double().cpu() for p in self.mu_log_sigma(self.evaluation_net))
        return exact_metrics(mu, log_sigma, self.data.target)


def exact_metrics(mu: Tensor, log_sigma: Tensor, target: Target) -> dict[str, Tensor]:
    """Return metrics (R,) of tanh-Gaussians with mu and log sigma (R, 1, D), by :func:`normal_rule`.

    ``kl`` is the reverse KL and ``entropy_exact`` the entropy, in nats. ``kl_gap`` is kl + log(w_i m_i), i being the
    mode nearest to tanh(mu), w_i its weight and m_i the part of it within [-1, 1]^D: no policy whose actions lie there
    comes closer to the mode than -log(w_i m_i). ``chose_mode`` i is 1 for that mode and 0 for the others, so that its
    mean is the mode's share of the seeds.
    """
    xi, weight = normal_rule(mu.shape[-1])
    kls, entropies = [], []
    for m, s in zip(torch.split(mu, 1), torch.split(log_sigma, 1), strict=True):  # many points: a replica at a time
        a, log_pi = squash(m, s, xi.unsqueeze(0))
        # log pi + |xi|^2 / 2 is smooth, and |xi|^2 / 2 has the mean D / 2
        entropies.append(mu.shape[-1] / 2 - (log_pi + 0.5 * xi.square().sum(-1)) @ weight)
        kls.append((log_pi - target.log_prob(a)) @ weight)
    kl, entropy = torch.cat(kls), torch.cat(entropies)
    mode = target.nearest(torch.tanh(mu[:, 0]))[0]
    out = {"kl": kl, "entropy_exact": entropy, "kl_gap": kl + target.weights_inside()[mode].log()}
    for i in range(len(target.mode_weights)):
        out[f"chose_mode{i}"] = (mode == i).double()
    return out
