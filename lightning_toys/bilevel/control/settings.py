"""How an agent is run: the solver of its bilevel problem, and the form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from lightning_toys.bilevel.checks import number_in, switches
from lightning_toys.bilevel.control.agents import InverseHessian
from lightning_toys.errors import REPEATS, bounded, check_settings, require


@dataclass(frozen=True)
class Form:
    """In what the code published with OMD (github.com/evgenii-nikishin/omd) differs from ours.

    Attributes: as :class:`Details`, and ``fresh_moments``: an agent that does not fit its model begins each inner loop
    with an empty Adam, which ``--model.solver.warm_opt`` says too.
    """

    orthogonal: bool = False
    separate_reward: bool = False
    target_each_step: bool = False
    fresh_batches: bool = False
    fresh_moments: bool = False
    cold_target: bool = False
    sampled_evaluation: bool = False
    vep_sum: bool = False


FORMS = {"ours": Form(), "published": Form(*[True] * 8)}


@dataclass
class Details:
    """Each difference between the forms by itself; None is as ``--model.form`` has it: false of ours, else true.

    Args:
        orthogonal: first weights are orthogonal, the last layer's .01 in size, and biases 0; else those of
            ``torch.nn.Linear``.
        separate_reward: the model's reward has a network of its own.
        target_each_step: the target values move at each step of the values, and not once an outer iteration; a gradient
            through the values is taken at the moved ones.
        fresh_batches: an agent that fits its model takes ``num_t_steps`` steps of the model and then ``num_q_steps`` of
            the values, a batch each; one that does not takes one outer iteration, whatever ``num_t_steps`` is.
        cold_target: a cold start sets the target values too. (The published one draws new first values each time.)
        sampled_evaluation: evaluations draw from softmax(mean_k Q / alpha), as training does, in place of its mode.
        vep_sum: vep's errors are summed over its functions, not averaged.

    Raises:
        ToyError: a value is not allowed.
    """

    orthogonal: bool | None = None
    separate_reward: bool | None = None
    target_each_step: bool | None = None
    fresh_batches: bool | None = None
    cold_target: bool | None = None
    sampled_evaluation: bool | None = None
    vep_sum: bool | None = None

    def __post_init__(self) -> None:
        switches("--model.details", **asdict(self))

    @property
    def given(self) -> dict[str, bool]:
        """Those that are not left to the form."""
        return {k: bool(v) for k, v in asdict(self).items() if v is not None}

    def of(self, form: str) -> Form:
        """Return the form ``ours`` or ``published`` with these in the place of its own."""
        return replace(FORMS[form], **self.given)


def form_label(form: str, details: Details) -> str:
    """Return what a run's name says of its form: nothing where it is ours.

    >>> form_label("published", Details(orthogonal=False, vep_sum=True))
    ', published form, not orthogonal'
    """
    changed = {k: v for k, v in details.given.items() if v != getattr(FORMS[form], k)}
    words = [f"{'' if v else 'not '}{k.replace('_', ' ')}" for k, v in changed.items()]
    return "".join(f", {w}" for w in (["published form"] if form == "published" else []) + words)


@dataclass
class Solver:
    """How the bilevel problem of a batch is solved.

    Args:
        num_q_steps: inner steps of an outer iteration, all on one batch.
        num_t_steps: outer iterations of an environment step, a batch each.
        warm_start: start each inner loop from the present values; otherwise from the initial ones.
        warm_opt: keep the inner optimiser's moments from one outer iteration to the next. None is the form's: ours
            keeps them for every agent, the published one for those that fit their model.
        inverse: of the inner Hessian in ``omd``: ``identity`` (as published), ``gauss_newton`` or ``hessian`` by
            conjugate gradient.
        cg_steps: iterations of conjugate gradient.
        cg_damping: c, added to the Hessian's diagonal.
        inner_value: ``funcbo`` treats the inner problem as solved (``exact``, which is ``vaml``: a loss of the model
            alone) or takes the present values (``lagged``).
        lag_damping: c of ``lagged``: 0 takes the values as they are, 1 takes them for solved.
        lag_clip: bound of ``lagged`` on each transition's error, in units of value; None is without.
        lag_target: ``lagged`` takes the target values in the place of the values.
        vep_values: random value functions of ``vep``.
        smoothing: the model follows the mean of the last so many outer gradients (arXiv 2601.15363); 1 is without.
        smoothing_present: b, the model follows b of the present gradient and 1 - b of that mean, which has the present
            one in it (OFBO's ``beta``).
        state_gradient: ``omd``, ``funcbo``, ``vaml`` and ``lagged`` send the gradient through V(s'_T) too; false trains
            the predicted reward alone, which is what the code published for funcbo does.

    Raises:
        ToyError: a value is not allowed.
    """

    num_q_steps: int = 1
    num_t_steps: int = 1
    warm_start: bool = True
    warm_opt: bool | None = None
    inverse: InverseHessian = "identity"
    cg_steps: int = 10
    cg_damping: float = 0.01
    inner_value: str = "exact"
    lag_damping: float = 0.5
    lag_clip: float | None = None
    lag_target: bool = False
    vep_values: int = 5
    smoothing: int = 1
    smoothing_present: float = 0.0
    state_gradient: bool = True

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.solver.")
        for name in ("num_q_steps", "num_t_steps", "cg_steps", "vep_values", "smoothing"):
            value = getattr(self, name)
            bounded(f"--model.solver.{name}", value, 1, REPEATS)
        for name in ("lag_damping", "smoothing_present"):
            number_in(f"--model.solver.{name}", getattr(self, name), lambda x: 0 <= x <= 1, "a number from 0 to 1")
        names = ("warm_start", "warm_opt", "lag_target", "state_gradient")
        switches("--model.solver", **{name: getattr(self, name) for name in names})
        if self.lag_clip is not None:
            bounded("--model.solver.lag_clip", self.lag_clip, 0.0, above=True)
        damping = self.cg_damping
        bounded("--model.solver.cg_damping", damping, 0.0)
        require(
            self.inner_value in ("exact", "lagged"),
            f"--model.solver.inner_value: {self.inner_value!r} is not allowed; give exact or lagged",
        )
