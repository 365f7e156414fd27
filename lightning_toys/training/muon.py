"""Muon for replica networks: momentum, orthogonalised by Newton-Schulz, on hidden matrices; AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.training.fused_adam import fused_step

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024; the same as torch.optim.Muon's
ITERATIONS = 5


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 by instructions of its own; of CPUs, as far as torch can say.

    A CPU that has none (AVX2) takes thirty times as long as in single precision.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {"avx512_bf16": True}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def orthogonalise(g: Tensor) -> Tensor:
    """Return about U V' of each matrix g = U S V', for g (R, m, n): singular values end between .68 and 1.2.

    Those below .002 of |g| come out smaller, as with any fixed number of steps. Here five of
    X <- a X + (b A + c A A) X with A = X X', from X = g / |g|; single precision is multiplied as bfloat16 where the
    device has instructions for it.
    """
    a, b, c = COEFFICIENTS
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7).view(-1, 1, 1)
    if g.dtype == torch.float32 and multiplies_bfloat16(g.device.type):
        x = x.bfloat16()  # twice as fast, and as torch.optim.Muon does
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if g.shape[-2] > g.shape[-1] else x).to(g)


def split_hidden(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trained weights between hidden layers, which Muon is for, and all other trained parameters."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    chosen = {name for name, p in named if ".hidden." in name and name.endswith(".weight")}
    return [p for name, p in named if name in chosen], [p for name, p in named if name not in chosen]


class ReplicaMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on parameters (R, m, n), one matrix a replica, and AdamW on the others.

    torch.optim.Muon takes single matrices only, and no other parameters beside them.

    Args:
        matrices: parameters (R, m, n) for Muon.
        others: parameters of any shape for AdamW.
        muon_lr: Muon's learning rate; its update has the scale sqrt(max(1, n / m)).
        lr: AdamW's learning rate.
        momentum: Muon's Nesterov momentum.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        muon_lr: float,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "muon": True, "lr": muon_lr},
            {"params": list(others), "muon": False, "lr": lr},
        ]
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self.muon_step if group["muon"] else self.adamw_step)(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, its counts of steps on the parameters' device: torch moves those for its own kinds only."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(p.device)

    def muon_step(self, group: dict[str, Any]) -> None:
        """Update the matrices."""
        beta, lr, decay = group["momentum"], group["lr"], group["weight_decay"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
            update = orthogonalise(p.grad.lerp(buffer, beta))
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * max(1.0, p.shape[-1] / p.shape[-2]) ** 0.5)

    def adamw_step(self, group: dict[str, Any]) -> None:
        """Update the others: torch.optim.AdamW's rule, with every tensor in one fused call."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        fused_step(torch._fused_adamw_, params, [self.state[p] for p in params], group, 1e-8)
