"""Each loss against its formula, written out token by token: value and gradient, at ratio 1 and away from it.

The formulas are those of TRL 1.10 (commit f2cd577, trl/trainer/grpo_trainer.py and rloo_trainer.py) for dr_grpo with a
length, grpo, dapo, bnpo, cispo, gspo (importance_sampling_level="sequence" with loss_type="grpo") and rloo, and for
scale_rewards; dr_grpo without a length is this experiment's own.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.grpo import ClipRange
from lightning_toys.update_entropy.losses import LOSSES, PolicyLoss, RewardScale, ScoredResponses
from lightning_toys.update_entropy.objective import Objective

# three prompts of three responses; all of the second earn the same
BATCH = ScoredResponses([0, 0, 0, 7, 7, 7, 9, 9, 9], [2, 4, 1, 3, 2, 5, 1, 3, 2], [1, 0, 0.5, 1, 1, 1, 0, 0, 1])
N, WIDTH, LOW, HIGH = 9, 5, 0.2, 0.3
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dr_grpo": {}, "dr_grpo length": {"length": 7}, "grpo": {}, "dapo": {}, "token_mean": {}, "bnpo": {},
    "bnpo parts": {"sequences": 4}, "cispo": {"ratio_max": 1.1}, "gspo": {}, "rloo": {}, "reinforce": {},
    "reinforce none": {"baseline": "none"},
}  # fmt: skip


def objective(case: str, scale: RewardScale = "none") -> Objective:
    return Objective.from_flags(case.split()[0], ARGUMENTS[case], scale, ClipRange(LOW, HIGH))


def log_probabilities(moved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """l_k, l_k^old and the mask; moved ratios go beyond both ends of the range."""
    g = torch.Generator().manual_seed(2)
    mask = (torch.arange(WIDTH) < torch.tensor(BATCH.lengths).unsqueeze(1)).double()
    old = -torch.rand(N, WIDTH, generator=g, dtype=torch.float64) * 3 * mask
    new = old + (0.25 * torch.randn(N, WIDTH, generator=g, dtype=torch.float64) * mask if moved else 0)
    return new, old, mask


def advantage(case: str, scale: str, i: int) -> float:
    group = [j for j in range(N) if BATCH.prompt_index[j] == BATCH.prompt_index[i]]
    rewards = [float(r) for r in BATCH.rewards]
    if case == "rloo":
        base = statistics.mean(rewards[j] for j in group if j != i)
    elif case.startswith("reinforce"):
        base = 0.0 if case.endswith("none") else statistics.mean(rewards)
    else:
        base = statistics.mean(rewards[j] for j in group)
    among = {"none": [], "group": [rewards[j] for j in group], "batch": rewards}[scale]
    return (rewards[i] - base) / (statistics.stdev(among) + 1e-4 if among else 1.0)


def weight(case: str, i: int) -> float:
    """What a response's objective counts in the mean."""
    T = BATCH.lengths
    if case == "dr_grpo":
        return 1 / (3 * 3 * max(T[j] for j in range(N) if BATCH.prompt_index[j] == BATCH.prompt_index[i]))
    if case == "bnpo parts":  # micro-batches of rows 0-3, 4-7, 8
        return 1 / (3 * sum(T[4 * (i // 4) : 4 * (i // 4) + 4]))
    return {"dr_grpo length": 1 / (N * 7), "grpo": 1 / (N * T[i]), "dapo": 1 / 23, "token_mean": 1 / 23, "bnpo": 1 / 23,
            "cispo": 1 / 23}.get(case, 1 / N)  # fmt: skip


def by_hand(case: str, scale: str, new: Tensor, old: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient in l (N, T)."""
    total, gradient = 0.0, torch.zeros(N, WIDTH, dtype=torch.float64)
    for i, length in enumerate(BATCH.lengths):
        A, n = advantage(case, scale, i), weight(case, i)
        differences = [float(new[i, k] - old[i, k]) for k in range(length)]
        if case in ("gspo", "rloo"):  # one ratio a response
            share = 1 / length if case == "gspo" else 1.0
            ratio = math.exp(share * sum(differences))
            inside = min(max(ratio, 1 - LOW), 1 + HIGH)
            total -= n * min(ratio * A, inside * A)
            live = ratio * A <= inside * A
            gradient[i, :length] = -n * A * ratio * share * live
            continue
        for k, d in enumerate(differences):
            ratio = math.exp(d)
            if case == "cispo":
                total -= n * min(ratio, 1.1) * A * float(new[i, k])
                gradient[i, k] = -n * min(ratio, 1.1) * A
            elif case.startswith("reinforce"):
                total -= n * A * float(new[i, k])
                gradient[i, k] = -n * A
            else:
                inside = min(max(ratio, 1 - LOW), 1 + HIGH)
                total -= n * min(ratio * A, inside * A)
                gradient[i, k] = -n * A * ratio * (ratio * A <= inside * A)
    return total, gradient


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_value_and_gradient_are_the_formulas(case: str, moved: bool, scale: RewardScale) -> None:
    o, (new, old, mask) = objective(case, scale), log_probabilities(moved)
    new.requires_grad_()
    A, n = o.advantages(BATCH), o.loss.normalization(BATCH)
    value, outside = o.value(new, old, mask, A, n)
    (gradient,) = torch.autograd.grad(value, new)
    wanted, wanted_gradient = by_hand(case, scale, new.detach(), old)
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-14)
    assert bool(wanted_gradient.abs().max() > 1e-3)
    assert (int(outside) > 0) == (moved and not case.startswith("reinforce"))
    # a part of the responses, as a rank or a micro-batch has it, makes its part of the loss
    rows = torch.tensor([0, 3, 4, 8])
    rest = torch.tensor([i for i in range(N) if i not in rows.tolist()])
    parts = [o.value(new[x], old[x], mask[x], A[x], n[x])[0] for x in (rows, rest)]
    assert float(sum(parts).detach()) == pytest.approx(float(value.detach()), rel=1e-12, abs=1e-13)  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_probes_weights_are_minus_the_gradient_on_policy(case: str, scale: RewardScale) -> None:
    new, old, _ = log_probabilities(moved=False)
    found = objective(case, scale).token_weights(BATCH, WIDTH)
    torch.testing.assert_close(found, -by_hand(case, scale, new, old)[1], rtol=1e-12, atol=1e-16)
    assert torch.equal(objective(case, scale).token_weights(BATCH, 1), found[:, :1])


def test_rewards_are_scaled_by_the_deviation_with_n_minus_1() -> None:
    """Two responses of rewards 1 and 0, one and three tokens: the deviation is 1 / sqrt 2."""
    two = ScoredResponses([0, 0], [1, 3], [1.0, 0.0])
    o = Objective.from_flags("dapo", None, "group", ClipRange())
    A = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert o.advantages(two).tolist() == pytest.approx([A, -A], rel=1e-12)
    assert o.token_weights(two, 3).tolist() == [pytest.approx(x) for x in ([A / 4, 0, 0], [-A / 4] * 3)]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("case", [c for c in ARGUMENTS if not c.startswith("reinforce")])
def test_a_group_of_equal_rewards_has_no_advantage(case: str, scale: RewardScale) -> None:
    assert objective(case, scale).advantages(BATCH)[3:6].tolist() == [0, 0, 0]
    alone = ScoredResponses([4], [3], [1.0])  # nor has one response without others
    assert objective(case, scale).advantages(alone).tolist() == [0]


def test_every_name_is_tested() -> None:
    assert {c.split()[0] for c in ARGUMENTS} == set(LOSSES)
    described = {objective(c).describe() for c in ARGUMENTS}
    assert len(described) == len(LOSSES)
    assert all("0.8 to 1.3" in d for d in described)


# --- losses of one's own


class Halved(PolicyLoss):
    """Half of REINFORCE with the group's mean."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def normalization(self, batch: Any) -> Tensor:
        return torch.full((len(batch.rewards),), self.factor, dtype=torch.float64)


class FirstToken(Halved):
    """Weighs the first token of a response alone."""

    def objective(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, A: Tensor, clip_range: Any
    ) -> tuple[Tensor, Tensor]:
        return A * logp[:, 0], torch.zeros_like(mask, dtype=torch.bool)


def test_a_loss_of_ones_own() -> None:
    o = Objective.from_flags(f"{__name__}.Halved", {"factor": 0.25}, "none", ClipRange())
    assert o.token_weights(BATCH, WIDTH)[0].tolist() == [0.125, 0.125, 0, 0, 0]
    first = Objective.from_flags(f"{__name__}.FirstToken", None, "none", ClipRange())
    assert first.token_weights(BATCH, WIDTH)[0].tolist() == [0.25, 0, 0, 0, 0]  # tokens may weigh differently


@pytest.mark.parametrize(
    ("name", "arguments", "scale", "said"),
    [
        ("ppo", None, "none", "--model.loss: ppo is not allowed; give one of dr_grpo, grpo, dapo"),
        ("no.such", None, "none", "--model.loss: no module 'no'; give one of dr_grpo"),
        ("math.pi", None, "none", "--model.loss: math.pi is no lightning_toys.update_entropy.PolicyLoss"),
        ("dapo", {"length": 3}, "none", "--model.loss_arguments: {'length': 3} is not allowed for dapo"),
        ("dr_grpo", {"length": 0}, "none", "--model.loss_arguments.length: 0 is not allowed; give an integer >= 1"),
        ("bnpo", {"sequences": 0}, "none", "--model.loss_arguments.sequences: 0 is not allowed"),
        ("cispo", {"ratio_max": 0}, "none", "--model.loss_arguments.ratio_max: 0 is not allowed; give a number > 0"),
        ("reinforce", {"baseline": "group"}, "none", "--model.loss_arguments.baseline: group is not allowed"),
        ("dapo", None, "prompt", "--model.scale_rewards: prompt is not allowed; give none, group or batch"),
    ],
)
def test_losses_that_are_none(name: str, arguments: Any, scale: Any, said: str) -> None:
    with pytest.raises(ToyError) as caught:
        Objective.from_flags(name, arguments, scale, ClipRange())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
