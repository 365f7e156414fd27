"""A policy: a mixture of Gaussians, fitted by maximum likelihood or by the reverse KL.

lightning-toys fit -c generative_policy/flow --model my_policy.MixturePolicy --model.components 6
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_toys.generative_policy import Evaluation, GenerativePolicy
from lightning_toys.nets import keyed_uniform
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream


class MixtureParameters(nn.Module):
    """Weights, means and standard deviations; the first axis is the replicas', each drawn by its own seed."""

    def __init__(self, seeds: Sequence[int], components: int, dim: int) -> None:
        super().__init__()
        self.logits = keyed_uniform(seeds, "mixture.logits", (1, components), 0.01)
        self.means = keyed_uniform(seeds, "mixture.means", (1, components, dim), 1.0)
        self.raw = keyed_uniform(seeds, "mixture.raw", (1, components, dim), 0.01)

    @property
    def log_std(self) -> Tensor:
        """Return log of the standard deviations (R, 1, K, D)."""
        return self.raw - 1.0

    def log_prob(self, x: Tensor) -> Tensor:
        """Map x (R, B, D) to log q(x) (R, B)."""
        z = (x.unsqueeze(2) - self.means) * torch.exp(-self.log_std)
        each = (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return torch.logsumexp(self.logits.log_softmax(-1) + each, -1)

    def reverse_kl(self, log_p: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
        """Return KL(q, p) (R,) up to log p's constant, of normals e (R, K, n, D): sum_k w_k E_k[log q - log p].

        As many actions of each component, weighed by it, so that the gradient reaches the weights without a score.
        """
        x = (self.means[:, 0, :, None] + self.log_std.exp()[:, 0, :, None] * e).flatten(1, 2)
        gap = (self.log_prob(x) - log_p(x)).unflatten(1, e.shape[1:3]).mean(-1)
        return (self.logits[:, 0].softmax(-1) * gap).sum(-1)

    def sample(self, choice: Tensor, e: Tensor) -> Tensor:
        """Map uniforms ``choice`` (R, B) and normals e (R, B, D) to actions (R, B, D)."""
        edges = self.logits[:, 0].softmax(-1).cumsum(-1)
        k = torch.searchsorted(edges, choice.contiguous()).clamp(max=edges.shape[1] - 1)
        at = k[..., None, None].expand(*k.shape, 1, e.shape[-1])
        every = (v.expand(*k.shape, *v.shape[2:]) for v in (self.means, self.log_std.exp()))
        mean, std = (v.gather(2, at)[:, :, 0] for v in every)
        return mean + std * e


class MixturePolicy(GenerativePolicy):
    """sum_k w_k N(mu_k, diag(s_k^2)), on the target's samples, on actions out of a file, or on a known density.

    Args:
        seeds: one a replica.
        components: K.
        lr: Adam's learning rate.
        evaluation: how samples are drawn and evaluated.
        divergence: ``forward_kl``, maximum likelihood of the target's samples, or ``reverse_kl`` to its density.
    """

    readout_pattern = "direct"  # there is one way to sample

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        components: int = 8,
        lr: float = 0.01,
        evaluation: Evaluation | None = None,
        divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    ) -> None:
        super().__init__(seeds, lr)
        self.components, self.evaluation, self.divergence = components, evaluation or Evaluation(), divergence
        self.reads_data = divergence == "forward_kl"
        self.save_hyperparameters(logger=False, ignore="evaluation")  # plain values, for load_from_checkpoint

    @property
    def label(self) -> str:
        """What a comparison calls it."""
        return f"MixturePolicy of {self.components}"

    def build(self) -> nn.Module:
        """Return the parameters of the replicas that this process trains."""
        rows = max(1, self.sizes["batch_size"] // self.components)
        self.noise = NoiseStream(self.local_seeds, "e", (self.components, rows, self.dim))
        return MixtureParameters(self.local_seeds, self.components, self.dim)

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """Return each replica's loss (R,): of the likelihood a sum over its rows, divided by the rows of the step."""
        if not self.reads_data:  # on several processes each takes all rows
            e = self.noise.at(step, self.net.means)
            return self.net.reverse_kl(self.data.target.log_prob, e) * (batch.last - batch.first) / batch.total
        x, _ = batch.columns  # samples, and the noise that a flow would pair them with
        return -self.net.log_prob(x).sum(1) / batch.total

    def readouts(self, nfes: list[int], full: bool) -> list[str]:
        """Return the names of the ways to sample."""
        return ["direct"]

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """Map standard normals e and xi (R, n, D) to actions (R, n, D)."""
        return self.evaluation_net.sample(torch.special.ndtr(xi[..., 0]), e)

    def policy_metrics(self, readout: str, e: Tensor, main: bool, full: bool) -> dict[str, Tensor]:
        """Return what is known of the policy itself, one value a replica: its likelihood of other samples."""
        truth = torch.stack([self.data.reference(s, self.evaluation.samples) for s in self.seeds])
        out = {"nll": -self.evaluation_net.log_prob(truth.to(e)).mean(1)}
        if self.reads_data:
            return out
        x = self.sample(self.evaluation.samples).to(e)  # log p is a known density's
        return out | {"kl": (self.evaluation_net.log_prob(x) - self.data.target.log_prob(x)).mean(1)}
