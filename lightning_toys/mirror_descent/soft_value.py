"""A soft value function learned by regression, and the guidance by its gradient: Doob's h-transform without the answer.

The tilted target's score at a level is that of q plus the gradient of log E[exp(lambda Q(a_0)) | x], x the noised pair
(the exact energy guidance of Lu et al. 2023, arXiv 2304.12824; the soft value of Uehara et al. 2024, arXiv 2407.13734).
A network v(x, abar) is fitted to exp(lambda Q(a_0)) over pairs (x_0, x): the loss exp(v) - exp(lambda Q) v, that of a
Poisson regression, has v = log E[exp(lambda Q) | x] for its minimiser, as the squared error of exp(v) does, and unlike
that one counts relative errors where exp(v) is small.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.errors import MOST, REPEATS, bounded
from lightning_toys.mirror_descent.energy import grad_without_autocast
from lightning_toys.mirror_descent.guidance import GuidanceRule
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.model import JointModel
from lightning_toys.mirror_descent.reverse_process import MAX_LOG_SNR
from lightning_toys.mirror_descent.tilt import Reward
from lightning_toys.nets import ReplicaLinear
from lightning_toys.training.noise import keyed_generator

BLOCKS = 4  # of clean draws that the pairs are made of
BATCH = 2048
RATE = 3e-3
KEPT: dict[bytes, ValueNet] = {}  # fitted, by the hash of what they are a function of
MOST_KEPT = 8


class ValueNet(nn.Module):
    """v (B,) of x (D, B) and abar (B,): g of the level alone, and sqrt(abar) times a network of both.

    The factor takes the gradient to 0 at the noisy end, where x says nothing of a_0. The network has two hidden layers
    of SiLU; g is linear in the same numbers that tell it the level.

    Args:
        dim: D.
        hidden: width.
        seed: of the first weights.
    """

    def __init__(self, dim: int, hidden: int, seed: int) -> None:
        super().__init__()
        sizes = [dim + 3, hidden, hidden, 1]
        self.layers = nn.ModuleList(
            ReplicaLinear([seed], f"soft value.{i}", *pair) for i, pair in enumerate(itertools.pairwise(sizes))
        )
        self.level = ReplicaLinear([seed], "soft value.level", 3, 1)

    def forward(self, x: Tensor, abar: Tensor) -> Tensor:
        """Return v."""
        level = torch.stack([torch.logit(abar) / MAX_LOG_SNR, abar.sqrt(), (1 - abar).sqrt()]).to(x)
        h = torch.cat([x, level]).T.unsqueeze(0)
        first, second, last = self.layers
        h = nn.functional.silu(first(h))
        h = nn.functional.silu(second(h))
        out: Tensor = abar.sqrt() * last(h)[0, :, 0] + self.level(level.T.unsqueeze(0))[0, :, 0]
        return out


class SoftValue(GuidanceRule):
    """Guidance by a soft value function that is learned from draws of q and their rewards, before the first step.

    The fit is a function of its settings, q and the reward: all seeds of a run share it, so that intervals over
    seeds are those of draws given one fit; give another ``fit_seed`` for another. Its evaluations, ``BATCH`` a step,
    are not counted in the cost of a sample.

    Args:
        joint: as of :class:`GuidanceRule`.
        reward: likewise.
        lambda_scale: likewise.
        fit_steps: steps of Adam.
        hidden: width of the network.
        fit_seed: of pairs and first weights.

    Raises:
        ToyError: a setting is out of bounds.
    """

    name = "soft_value"
    uses_beta = False

    def __init__(
        self,
        joint: Any,
        reward: Reward,
        lambda_scale: float,
        fit_steps: int = 2000,
        hidden: int = 64,
        fit_seed: int = 0,
    ) -> None:
        super().__init__(joint, reward, lambda_scale)
        flag = "--model.samplers: SoftValue's"
        bounded(f"{flag} fit_steps", fit_steps, 1, REPEATS)
        bounded(f"{flag} hidden", hidden, 1, 4096)
        bounded(f"{flag} fit_seed", fit_seed, 0, MOST)
        self.fit_steps, self.hidden, self.fit_seed = fit_steps, hidden, fit_seed
        self.net: ValueNet | None = None

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`; ``beta`` is not used."""
        return model.score(level, x) + self.value_gradient(model, level, x)

    def value_gradient(self, model: JointModel, level: Any, x: Tensor) -> Tensor:
        """Return the gradient (D, B) in x of the learned v at x (D, B) of a level."""
        with torch.inference_mode(False), grad_without_autocast(x.device.type):
            if self.net is None:
                self.net = self.fitted(model, x)
            inputs = x.detach().clone().requires_grad_(True)
            v = self.net(inputs, torch.full_like(inputs[0], level.abar))
            (out,) = torch.autograd.grad(v.sum(), inputs)
        return out

    def loss(self, v: Tensor, r: Tensor) -> Tensor:
        """Return the loss of v (B,) where lambda Q is r (B,), both less the same constant."""
        return (v.exp() - r.exp() * v).mean()

    def fitted(self, model: JointModel, like: Tensor) -> ValueNet:
        """Return the network after its fit, in the dtype and on the device of ``like``; one that was fitted is kept."""
        clean = self.joint.clean
        noise = Noise(
            [(self.fit_seed, block) for block in range(BLOCKS)], "soft value", torch.zeros((), dtype=torch.float32)
        )
        x0 = model.draw(noise, clean)
        r = self.lambda_scale * clean.value_of(self.reward).value(x0[: self.joint.action_dim].double())
        r = (r - r.max()).float()
        settings = (
            f"{type(self).__qualname__} {self.fit_steps} {self.hidden} {self.fit_seed} {like.dtype} {like.device}"
        )
        pairs = torch.cat([x0.float(), r.unsqueeze(0)]).numpy().tobytes()
        key = hashlib.blake2b(pairs + settings.encode(), digest_size=16).digest()
        if key not in KEPT:
            while len(KEPT) >= MOST_KEPT:
                KEPT.pop(next(iter(KEPT)))
            KEPT[key] = self.fit(x0.float(), r).to(like)
        return KEPT[key]

    def fit(self, x0: Tensor, r: Tensor) -> ValueNet:
        """Return the network after ``fit_steps`` of Adam, its rate falling as a cosine.

        Args:
            x0: clean pairs (D, n).
            r: lambda Q (n,), its largest 0.
        """
        net = ValueNet(len(x0), self.hidden, self.fit_seed).float()  # as x0, whatever dtype modules are made in
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        for step in range(self.fit_steps):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / self.fit_steps))
            rng = keyed_generator(self.fit_seed, step, "soft value")
            rows = torch.from_numpy(rng.integers(0, x0.shape[1], BATCH))
            log_snr = rng.uniform(-MAX_LOG_SNR, MAX_LOG_SNR, BATCH)
            abar = torch.from_numpy((1 / (1 + np.exp(-log_snr))).astype(np.float32))
            eps = torch.from_numpy(rng.standard_normal((len(x0), BATCH), dtype=np.float32))
            x = abar.sqrt() * x0[:, rows] + (1 - abar).sqrt() * eps
            optimizer.zero_grad(set_to_none=True)
            self.loss(net(x, abar), r[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return net.requires_grad_(False)
