"""Muon for replica networks: momentum, orthogonalised by Newton-Schulz, on hidden matrices; AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.nets import ReplicaLinear
from lightning_toys.training.fused_adam import fused_step

MARKS = ("hidden", "blocks")  # names of the part of a network that lies between its first and its last layer
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


def matrices(net: nn.Module) -> list[Tensor]:
    """Return the matrices (R, m, n) of a network, in the order in which it holds them; a bias (R, 1, n) is none."""
    out: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, ReplicaLinear):
            out.append(module.weight)
        else:
            out += [p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1]
    return list(dict.fromkeys(out))  # shared ones once


def hidden_matrices(net: nn.Module) -> list[Tensor]:
    """Return the matrices between hidden layers, which Muon is for.

    A module with a part named ``hidden`` or ``blocks`` says so itself: all matrices of that part, and none of its own
    others. Where a module holds such modules, or a ``ModuleDict`` of several networks, each is asked for its own. In
    any other, such as a ``Sequential``, they are all matrices but the first and the last.
    """
    parts = dict(net.named_children())
    named = [parts.pop(name) for name in MARKS if name in parts]
    if named or any(has_networks(part) for part in parts.values()) or isinstance(net, nn.ModuleDict):
        others = [part for part in parts.values() if not named or has_networks(part)]
        return [p for part in named for p in matrices(part)] + [p for part in others for p in hidden_matrices(part)]
    return matrices(net)[1:-1]


def has_networks(net: nn.Module) -> bool:
    """Whether a module is, or has within it, one whose parts say what they are; see :func:`hidden_matrices`."""
    return any(isinstance(m, nn.ModuleDict) or not {*MARKS}.isdisjoint(dict(m.named_children())) for m in net.modules())


def split_hidden(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trained weights between hidden layers, which Muon is for, and all other trained parameters."""
    trained = [p for p in net.parameters() if p.requires_grad]
    chosen = {id(p) for p in hidden_matrices(net)}
    return [p for p in trained if id(p) in chosen], [p for p in trained if id(p) not in chosen]


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
