"""An agent is one class: what its values learn from, and the gradient that its model follows.

At each outer iteration an agent that ``fits`` its model steps it first, along a gradient that does not ask for the
values, and then its values on :meth:`AgentUpdate.targets`; one that does not steps its values first, and its model by
what became of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.agents import (
    InverseHessian,
    ModelTargets,
    Problem,
    funcbo_weights,
    half_squared_error,
    mle_gradient,
    omd_weights,
    vep_gradient,
)
from lightning_toys.bilevel.control.lagged import damped_error, wrong_side
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.settings import Form, Solver
from lightning_toys.bilevel.vectors import Tensors
from lightning_toys.errors import bounded, did_you_mean, require

RESPONSES = ("loss", "weights", "values", "solved", "none")  # see :class:`AgentUpdate`


class ModelGradient(NamedTuple):
    """What an agent's model descends.

    Attributes:
        gradient: by the names of the model's parameters, each of its parameter's shape (R, ...), all of them; None
            leaves the model as it is.
        loss: the loss that is shown (R,).
        residual: a linear solver's relative residual (R,), where there is one.
    """

    gradient: Tensors | None
    loss: Tensor
    residual: Tensor | None = None


class AgentUpdate:
    """Base of agents.

    R is the number of replicas and B that of a batch's transitions, whose tensors are (R, B, ...), see
    :class:`~lightning_toys.bilevel.control.replay.Batch`. What replica r gives depends on its own rows and networks
    alone, and nothing is drawn. One of somebody else's is tried for a step, on two replicas, before anything is run.

    Attributes:
        label: its name in tables and figures; by default the class's.
        fits: whether the model is stepped first, see the module.
        uses_model: whether the values learn from the model.
        response: what finite differences of the outer loss let respond to the model (``--model.check_gradient``):
            ``loss``, nothing, they are of the model's own loss; ``weights``, the values' weights; ``values``, the
            values themselves as they are; ``solved``, the values, which equal their targets; ``none``, there is nothing
            to check.
    """

    label = ""
    fits = True
    uses_model = True
    response = "none"

    def networks(
        self, seeds: Sequence[int], states: int, actions: int, hidden: int, form: Form
    ) -> dict[str, nn.Module]:
        """Return further networks by name, such as ``values``, which :meth:`gradient` finds in ``nets``.

        Every parameter has a leading replica axis (R, ...), and row r is drawn by ``seeds[r]`` alone
        (:func:`lightning_toys.training.noise.keyed_generator`). They are in checkpoints; nothing steps them. The names
        ``q``, ``target``, ``model``, ``start``, ``recent`` and ``seen`` are taken.

        Args:
            seeds: one seed a replica, R of them.
            states: S, dimensions of a state.
            actions: A, number of actions.
            hidden: width of the values' hidden layers.
            form: of the run.
        """
        return {}

    def targets(self, problem: Problem, predicted: ModelTargets | None = None) -> Tensor:
        """Return what the values are fitted to (R, B), without a graph: by default the model's targets y_T.

        Args:
            problem: the batch's: ``q`` and ``target_net`` map states (R, B, S) to values (R, K, B, A), ``y`` is (R, B).
            predicted: the model's targets, where they have been worked out already.
        """
        return (predicted or problem.model_targets()).y

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """Return the model's gradient.

        Args:
            nets: all networks: ``q``, ``target``, ``model`` and those of :meth:`networks`.
            problem: the batch's, at the values as they are.
            targets: the model's targets, as the values had them, ``y`` (R, B); None for an agent that fits its model.
        """
        raise NotImplementedError

    def measures(self, problem: Problem, targets: ModelTargets) -> dict[str, Tensor]:
        """Return what else validations measure, each (R,) by its name; only asked of an agent with a model.

        Args:
            problem: of the stored transitions that errors are measured on.
            targets: the model's targets there.
        """
        return {}


class MaximumLikelihood(AgentUpdate):
    """The model is fitted to next states and rewards."""

    label, response = "mle", "loss"

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`."""
        return ModelGradient(*mle_gradient(problem, problem.model.forward_pass(problem.inputs)))


class ValueEquivalence(AgentUpdate):
    """The model is fitted to what random functions see of next states (Grimm et al. 2020, arXiv 2011.03506).

    Args:
        functions: how many.
        summed: their errors are summed, as in the code published with OMD, in place of averaged.
    """

    label, response = "vep", "loss"

    def __init__(self, functions: int, summed: bool = False) -> None:
        self.functions, self.summed = functions, summed

    def networks(
        self, seeds: Sequence[int], states: int, actions: int, hidden: int, form: Form
    ) -> dict[str, nn.Module]:
        """See :meth:`AgentUpdate.networks`: the random functions."""
        sizes = (states, hidden, hidden, 1)
        values = MultiHeadMLP(seeds, "vep", sizes, self.functions, form.orthogonal)
        return {"values": values.requires_grad_(False)}

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`."""
        values = nets.get_submodule("values")
        assert isinstance(values, MultiHeadMLP)
        weight = float(self.functions) if self.summed else 1.0
        return ModelGradient(*vep_gradient(problem, problem.model.forward_pass(problem.inputs), values, weight))


class OptimalModelDesign(AgentUpdate):
    """OMD (Nikishin et al. 2021, arXiv 2106.03273): the outer loss through the values' weights."""

    label, fits, response = "omd", False, "weights"

    def __init__(self, inverse: InverseHessian, steps: int, damping: float, through_state: bool) -> None:
        self.inverse, self.steps, self.damping, self.through_state = inverse, steps, damping, through_state

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`."""
        assert targets is not None
        w, loss, residual = omd_weights(problem, self.inverse, self.steps, self.damping, targets.y)
        return ModelGradient(problem.model_vjp(targets, w, self.through_state), loss, residual)


class FunctionalBilevel(AgentUpdate):
    """funcBO (Petrulionyte et al. 2024, arXiv 2403.20233): the outer loss through the values.

    With the inner problem taken for solved the values drop out: the model descends mean (y_T - y)^2, a single-level
    loss, which is value-aware model learning (VAML, Farahmand et al. 2017) under the agent's own V.

    Args:
        solved: whether it is; else the values are taken as they are.
        through_state: whether the predicted state has a gradient.
        label: ``funcbo`` or ``vaml``.
    """

    fits = False

    def __init__(self, solved: bool, through_state: bool, label: str = "funcbo") -> None:
        self.solved, self.through_state, self.label = solved, through_state, label
        self.response = "solved" if solved else "values"

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`."""
        assert targets is not None
        w, loss = funcbo_weights(problem, targets.y, self.solved)
        return ModelGradient(problem.model_vjp(targets, w, self.through_state), loss)

    def measures(self, problem: Problem, targets: ModelTargets) -> dict[str, Tensor]:
        """See :meth:`AgentUpdate.measures`: of the values as they are, how many drive the model the wrong way."""
        return {} if self.solved else {"wrong_side": wrong_side(problem.td_error(problem.y), targets.y, problem.y)}


class Lagged(AgentUpdate):
    """funcBO (arXiv 2403.20233) with the values as they are, damped.

    The model descends by (1 - c) (d - y) + c (y_T - y), see :mod:`lightning_toys.bilevel.control.lagged`: c = 0 is
    ``funcbo`` with ``inner_value lagged``, c = 1 is ``vaml``. Its own rate is ``--model.lr``.

    Args:
        damping: c, from 0 to 1.
        clip: bound on the size of each transition's error, in units of value; None is without.
        target_values: the target values' d in the place of the values' own.
        through_state: whether the predicted state has a gradient.

    Raises:
        ToyError: a value is not allowed.
    """

    label, fits = "lagged", False

    def __init__(
        self,
        damping: float = 0.5,
        clip: float | None = None,
        target_values: bool = False,
        through_state: bool = True,
    ) -> None:
        require(0 <= damping <= 1, f"--model.agent.damping: {damping} is not allowed; give a number from 0 to 1")
        if clip is not None:
            bounded("--model.agent.clip", clip, 0.0, above=True)
        self.damping, self.clip, self.target_values, self.through_state = damping, clip, target_values, through_state
        plain = clip is None and not target_values
        self.response = "values" if plain and damping == 0 else "solved" if plain and damping == 1 else "none"

    def error(self, problem: Problem, targets: ModelTargets) -> Tensor:
        """Return the error that the model descends (R, K, B)."""
        d = problem.td_error(torch.zeros_like(problem.y))
        if self.target_values:
            q = problem.target_net.forward_pass(problem.batch.observation).output
            d = (q * problem.action_one_hot.unsqueeze(1)).sum(-1)
        return damped_error(d, targets.y, problem.y, self.damping, self.clip)

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`; the loss is that of the values, L_out."""
        assert targets is not None
        error = self.error(problem, targets)
        found = problem.model_vjp(targets, error.sum(1) / error.shape[2], self.through_state)
        loss = half_squared_error(problem.td_error(problem.y), torch.zeros_like(problem.y))
        return ModelGradient(found, loss)

    def measures(self, problem: Problem, targets: ModelTargets) -> dict[str, Tensor]:
        """See :meth:`AgentUpdate.measures`; of the values as they are, whatever the damping makes of them."""
        return {"wrong_side": wrong_side(problem.td_error(problem.y), targets.y, problem.y)}


class ModelFree(AgentUpdate):
    """Control: the same values on the targets of what happened, y, and no model. What a perfect model could give."""

    label, uses_model = "model_free", False

    def targets(self, problem: Problem, predicted: ModelTargets | None = None) -> Tensor:
        """See :meth:`AgentUpdate.targets`."""
        return problem.y

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        """See :meth:`AgentUpdate.gradient`: none; the loss is the values'."""
        with torch.no_grad():
            return ModelGradient(None, half_squared_error(problem.td_error(problem.y), torch.zeros_like(problem.y)))


# the agents that have a name, each made of the solver's settings and the form
NAMED: dict[str, Callable[[Solver, Form], AgentUpdate]] = {
    "mle": lambda s, f: MaximumLikelihood(),
    "vep": lambda s, f: ValueEquivalence(s.vep_values, f.vep_sum),
    "omd": lambda s, f: OptimalModelDesign(s.inverse, s.cg_steps, s.cg_damping, s.state_gradient),
    "funcbo": lambda s, f: FunctionalBilevel(s.inner_value == "exact", s.state_gradient),
    "vaml": lambda s, f: FunctionalBilevel(True, s.state_gradient, "vaml"),
    "lagged": lambda s, f: Lagged(s.lag_damping, s.lag_clip, s.lag_target, s.state_gradient),
    "model_free": lambda s, f: ModelFree(),
}


def make_agent(given: AgentUpdate | str, solver: Solver, form: Form) -> AgentUpdate:
    """Return an agent by its name, or one's own as it is.

    Raises:
        ToyError: there is none of that name, or it is no agent.
    """
    if not isinstance(given, str):
        kind = type(given).__name__
        require(isinstance(given, AgentUpdate), f"--model.agent: a {kind} is not allowed; give an AgentUpdate")
        return given
    own = f"; load_from_checkpoint takes it: agent={given.rpartition('.')[2]}(...)" if "." in given else ""
    require(
        given in NAMED,
        f"--model.agent: {given!r} is not allowed; give one of {', '.join(NAMED)}, or MODULE.CLASS{own}"
        f"{did_you_mean(given, NAMED)}",
    )
    return NAMED[given](solver, form)
