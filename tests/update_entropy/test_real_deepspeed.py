"""Checkpoints that DeepSpeed itself wrote (0.19.8, two ranks on CPUs, gloo) have the moments of torch's own training.

tests/data/deepspeed-0.19.8 was made by ``deepspeed.initialize`` of :class:`Net` and :func:`an_optimizer` with
``zero_optimization`` of stage 1 (zero1), 2 (zero2), and 2 with ``round_robin_gradients`` (rr), ``gradient_clipping`` 1,
three steps on rank r's inputs of :func:`losses`, then ``engine.save_checkpoint``; of its folders the two scripts that
DeepSpeed puts beside ``latest`` are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

for needed in ("peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import load_optimizer_state  # noqa: E402

FOLDER = Path(__file__).parents[1] / "data" / "deepspeed-0.19.8"
STEPS, RANKS = 3, 2


class Net(nn.Module):
    """Two matrices and three vectors: shards of two ranks cut through them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(7, 11), nn.Linear(11, 5, bias=False), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(torch.tanh(self.a(x))))
        return out


def an_optimizer(net: nn.Module) -> torch.optim.AdamW:
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95))


def losses(net: Net) -> Iterator[Tensor]:
    """The loss of each step: the mean of the ranks'."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(RANKS)]
    for _ in range(STEPS):
        inputs = [torch.randn(4, 7, generator=g) for g in generators]
        parts = [net(x).square().mean() + net.a.weight.mean() for x in inputs]
        yield torch.stack(parts).mean()


@pytest.mark.parametrize("name", ["zero1", "zero2"])
@pytest.mark.parametrize("below", ["", "global_step3"])
def test_the_moments_are_torch_s(name: str, below: str) -> None:
    net = Net()
    optimizer = an_optimizer(net)
    for loss in losses(net):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    found = load_optimizer_state(str(FOLDER / name / below), Net())
    names = dict(net.named_parameters())
    assert set(found.moments) == set(names)
    for n, p in names.items():
        m, h = found.moments[n], found.hyperparameters[n]
        assert m.step == STEPS
        for mine, true in ((m.exp_avg, "exp_avg"), (m.exp_avg_sq, "exp_avg_sq")):
            wanted = optimizer.state[p][true]
            # DeepSpeed's clipping adds 1e-6 to the norm elsewhere, and sums in another order
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        assert (h.lr, h.weight_decay, h.betas) == (
            (1e-3, 0.1, (0.8, 0.95)) if p.dim() > 1 else (2e-3, 0.0, (0.8, 0.95))
        )
    assert all(float(found.moments[n].exp_avg.abs().max()) > 0 for n in names)


def test_gradients_in_turn_are_refused() -> None:
    with pytest.raises(ToyError, match="was trained with round_robin_gradients"):
        load_optimizer_state(str(FOLDER / "rr"), Net())
