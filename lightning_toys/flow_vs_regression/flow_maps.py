"""Objectives whose networks jump: flow maps, learned by self-distillation, and other parametrisations of a flow.

Symbols as in ``objectives.py``: t = 0 is noise, t = 1 data, x_s = (1 - s) x0 + s x1, v = x1 - x0. A flow map
X_st(x) = x + (t - s) u_st(x) carries a point of time s to time t; u is its average velocity, and u_ss the velocity
itself. The network is fed the gap t - s beside the condition: u_st(x) = net(x, [c, t - s], s). sg is a target that
gradients stop at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.flow_vs_regression.objectives import Objective, Readout, expand_time
from lightning_toys.flows import Solver, interpolate
from lightning_toys.nets import ConditionalNet


def average_velocity(net: ConditionalNet, x: Tensor, c: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """Return u_st(x), (R, B, D).

    Args:
        net: fed x, [c, t - s] and s.
        x: (R, B, D).
        c: (R, B, C).
        s: the time of x, a number or (R, B, 1).
        t: the time that the jump goes to, likewise.
    """
    start, stop = expand_time(x, s), expand_time(x, t)
    out: Tensor = net(x, torch.cat([c, stop - start], dim=-1), start)
    return out


def jump(net: ConditionalNet, x: Tensor, c: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """Return X_st(x), (R, B, D); arguments as :func:`average_velocity`."""
    gap = expand_time(x, t) - expand_time(x, s)
    return x + gap * average_velocity(net, x, c, s, t)


class FlowMap(Objective):
    """What flow maps share: two times a row, and a readout of ``nfe`` equal jumps."""

    with_time = True
    samples_time = True
    times = 2
    extra_conditions = 1  # the gap

    def ordered(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return s <= t, (R, B, 1) each, of two independent times (R, B, 2)."""
        return times.amin(-1, keepdim=True), times.amax(-1, keepdim=True)

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`; ``nfe`` jumps, the ODE solver is not used."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            x = x0
            for k in range(nfe):
                x = jump(net, x, c, k / nfe, (k + 1) / nfe).to(x0)
            return x

        return Readout(f"jumps-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", n) for n in nfes]


class MeanFlow(FlowMap):
    """MeanFlow (Geng et al. 2025, arXiv 2505.13447): u = v + (t - s) du/ds along the path.

    In the paper noise is at t = 1, and the sign of its derivative is the opposite one. The rest of the rows, those with
    t = s, are plain flow matching.

    Args:
        share: of the rows that have t > s; the paper's best is a quarter.

    Raises:
        ToyError: ``share`` is not between 0 and 1.
    """

    def __init__(self, share: float = 0.25):
        bounded("--model.objective.share", share, 0.0, 1.0)
        self.share = share

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        s, stop = self.ordered(t)
        jumps = first_rows(s, self.share)
        stop = torch.where(jumps, stop, s)
        x, v, gap = interpolate(x0, x1, s), x1 - x0, stop - s

        def u(x: Tensor, gap: Tensor, s: Tensor) -> Tensor:
            out: Tensor = net(x, torch.cat([c, gap], dim=-1), s)
            return out

        with torch.no_grad():
            tangents = (v, -torch.ones_like(gap), torch.ones_like(s))
            derivative = torch.func.jvp(u, (x, gap, s), tangents)[1]
        return [u(x, gap, s) - (v + gap * derivative)]


class Shortcut(FlowMap):
    """Shortcut models (Frans et al. 2024, arXiv 2410.12557): a jump of 2d is two jumps of d.

    A share of the rows learns s(x, t, 2d) = sg[(s(x, t, d) + s(x', t + d, d)) / 2], x' = x + d s(x, t, d), where d is a
    power of two and t a multiple of 2d; the others are flow matching at d = 0, which also stands for the least d.

    Args:
        share: of the rows that learn jumps.
        steps: 1 / the least d, a power of two.

    Raises:
        ToyError: a setting is not allowed.
    """

    def __init__(self, share: float = 0.25, steps: int = 128):
        bounded("--model.objective.share", share, 0.0, 1.0)
        bounded("--model.objective.steps", steps, 2)
        require(
            steps >= 2 and steps & (steps - 1) == 0,
            f"--model.objective.steps: {steps} is not allowed; give a power of two, at least 2",
        )
        self.share, self.steps = share, steps

    def half_jump(self, net: ConditionalNet, x: Tensor, c: Tensor, s: Tensor, d: Tensor) -> Tensor:
        """Return s(x, s, d), (R, B, D), with d = 0 for the least d."""
        asked = torch.where(d <= 1 / self.steps, torch.zeros_like(d), d)
        out: Tensor = net(x, torch.cat([c, asked], dim=-1), s)
        return out

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`; the second of the times chooses d."""
        place, size = t[..., :1], t[..., 1:]
        jumps = first_rows(place, self.share)
        d = 2.0 ** -(1 + (size * math.log2(self.steps)).floor())  # 1/2, 1/4, ..., 1 / steps
        s = torch.where(jumps, (place / (2 * d)).floor() * 2 * d, place)
        x, v = interpolate(x0, x1, s), x1 - x0
        with torch.no_grad():
            first = self.half_jump(net, x, c, s, d)
            second = self.half_jump(net, x + d * first, c, s + d, d)
            target = torch.where(jumps, (first + second) / 2, v)
            gap = torch.where(jumps, 2 * d, torch.zeros_like(d))
        return [net(x, torch.cat([c, gap], dim=-1), s) - target]


class ConsistencyTraining(Objective):
    """Consistency training (Song et al. 2023, arXiv 2303.01469; Song and Dhariwal 2024, arXiv 2310.14189).

    f(x, s) = x + (1 - s) net(x, c, s) is the data of every point of a path: f(x_s, s) = sg f(x_s', s') with
    s' = s + 1 / steps, of one pair x0, x1; f(x, 1) = x. With several evaluations, the prediction is carried back to
    time k / nfe along the straight line to the same x0, and improved.

    Args:
        steps: intervals of time; fixed, where the papers let it grow.

    Raises:
        ToyError: ``steps`` is below 1.
    """

    with_time = True
    samples_time = True

    def __init__(self, steps: int = 32):
        bounded("--model.objective.steps", steps, 1)
        self.steps = steps

    def endpoint(self, net: ConditionalNet, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """Return f(x, s), (R, B, D)."""
        out: Tensor = x + (1 - s) * net(x, c, s)
        return out

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        s = (t * self.steps).floor().clamp(max=self.steps - 1) / self.steps
        later = s + 1 / self.steps
        with torch.no_grad():
            target = self.endpoint(net, interpolate(x0, x1, later), c, later)
        return [self.endpoint(net, interpolate(x0, x1, s), c, s) - target]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`; the ODE solver is not used."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            x = self.endpoint(net, x0, c, expand_time(x0, 0.0)).to(x0)
            for k in range(1, nfe):
                s = expand_time(x0, k / nfe)
                x = self.endpoint(net, interpolate(x0, x, s), c, s).to(x0)
            return x

        return Readout(f"consistency-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", n) for n in nfes]


class LagrangianFlowMap(FlowMap):
    """Lagrangian self-distillation (Boffi, Albergo and Vanden-Eijnden 2025, arXiv 2505.18825).

    Two terms: flow matching of u_ss, and dX_st(x_s)/dt = sg u_tt(X_st(x_s)), which says that jumps follow the velocity.

    Args:
        stop_gradient: whether gradients stop at the velocity where the jump ends.
    """

    def __init__(self, stop_gradient: bool = True):
        check_settings(LagrangianFlowMap, locals(), "--model.objective.")
        self.stop_gradient = stop_gradient

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        s, stop = self.ordered(t)
        diagonal = t[..., :1]
        matching = average_velocity(net, interpolate(x0, x1, diagonal), c, diagonal, diagonal) - (x1 - x0)
        x, gap = interpolate(x0, x1, s), stop - s

        def u(gap: Tensor) -> Tensor:
            out: Tensor = net(x, torch.cat([c, gap], dim=-1), s)
            return out

        velocity, slope = torch.func.jvp(u, (gap,), (torch.ones_like(gap),))[:2]
        end = x + gap * velocity
        moved = velocity + gap * slope  # dX_st / dt
        if self.stop_gradient:
            with torch.no_grad():
                wanted = average_velocity(net, end, c, stop, stop)
        else:
            wanted = average_velocity(net, end, c, stop, stop)
        return [matching, moved - wanted]


def first_rows(like: Tensor, share: float) -> Tensor:
    """Return which rows are among the first ``share`` of the batch, (B, 1); the batch is shuffled.

    Args:
        like: (R, B, 1).
        share: rounded to a whole number of rows.
    """
    rows = like.shape[1]
    return (torch.arange(rows, device=like.device) < round(share * rows)).unsqueeze(1)
