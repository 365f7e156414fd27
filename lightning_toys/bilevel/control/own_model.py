"""A model of the world of one's own: a network from somebody else's class, its derivatives by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.world_model import ModelPass, WorldModel
from lightning_toys.bilevel.trials import apart, copied, require_drawn_by_seed, require_solo
from lightning_toys.bilevel.vectors import Tensors, flatten
from lightning_toys.errors import ToyError, require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.own_classes import attempt, shape_of, trial_pair

FLAG = "--model.world_model"
TRIED = 3  # rows that a network is tried on
FORWARD = 1e-4  # of single precision's rounding in a forward pass, of two replicas and of one


class Dynamics:
    """Base of models of the world; its settings are its constructor's."""

    @property
    def label(self) -> str:
        """Its name in tables and figures: the class's."""
        return type(self).__name__

    def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
        """Return the network, called with s (R, B, S) and one-hot a (R, B, A): next state (R, B, S) and reward (R, B).

        Every parameter has a leading replica axis (R, ...); row r is drawn by ``seeds[r]`` alone
        (:func:`lightning_toys.training.noise.keyed_generator`, or :class:`lightning_toys.nets.ReplicaLinear`), and what
        replica r predicts depends on its own rows and parameters alone. Nothing is drawn when it is called. Autograd
        follows it, once at each step. All of that is tried on a few rows before anything is trained.

        Args:
            seeds: one seed a replica, R of them.
            states: S, dimensions of a state.
            actions: A, number of actions.
            width: ``--model.model_hidden_dim``.
        """
        raise NotImplementedError


class OwnWorldModel(WorldModel):
    """A :class:`Dynamics`' network in the place of :class:`WorldModel`'s.

    Args:
        dynamics: whose network it is.
        seeds: one seed a replica.
        states: S, dimensions of a state.
        actions: A, number of actions.
        width: of hidden layers.

    Raises:
        ToyError: ``build`` fails, or what it returns is no Module. What else it promises :func:`try_dynamics` looks at.
    """

    def __init__(self, dynamics: Dynamics, seeds: Sequence[int], states: int, actions: int, width: int) -> None:
        nn.Module.__init__(self)
        self.states, self.actions, self.separate = states, actions, False
        where = f"{FLAG}: {type(dynamics).__name__}.build"
        built = attempt(where, lambda: dynamics.build(seeds, states, actions, width))
        require(isinstance(built, nn.Module), f"{where} returns {type(built).__name__}; give a Module")
        self.net = built

    def output(self, inputs: Tensor) -> Tensor:
        """See :meth:`WorldModel.output`."""
        next_state, reward = self.net(inputs[..., : self.states], inputs[..., self.states :])
        return torch.cat([next_state, reward.unsqueeze(-1)], -1).unsqueeze(1)

    def forward_pass(self, inputs: Tensor) -> ModelPass:
        """See :meth:`WorldModel.forward_pass`; the graph is kept with it."""
        with torch.enable_grad():
            out = self.output(inputs.detach())
        return ModelPass((), out.detach(), out)

    def vjp(self, forward: ModelPass, next_state: Tensor, reward: Tensor) -> Tensors:
        """See :meth:`WorldModel.vjp`: by autograd."""
        assert forward.graph is not None
        cotangent = torch.cat([next_state, reward.unsqueeze(-1)], -1).unsqueeze(1)
        named = dict(self.named_parameters())
        learned = [p for p in named.values() if p.requires_grad]
        found = torch.autograd.grad(forward.graph, learned, cotangent, retain_graph=True, allow_unused=True)
        by_place = {id(p): g for p, g in zip(learned, found, strict=True)}
        return {n: torch.zeros_like(p) if (g := by_place.get(id(p))) is None else g for n, p in named.items()}


def try_dynamics(dynamics: Dynamics, seeds: Sequence[int], states: int, actions: int, width: int) -> None:
    """Hold a model of one's own to its contract, see :meth:`Dynamics.build`, on a few rows.

    Its network is built for two replicas and for the second of them alone, whatever the number of a run's seeds.

    Args:
        dynamics: whose network it is.
        seeds: of the run.
        states: S, dimensions of a state.
        actions: A, number of actions.
        width: of hidden layers.

    Raises:
        ToyError: says what it lacks.
    """
    name, pair = type(dynamics).__name__, trial_pair(seeds)
    with apart():
        models = [OwnWorldModel(copied(dynamics), s, states, actions, width) for s in (pair, pair[1:])]
        both, alone = (dict(m.net.named_parameters()) for m in models)
        require(len(both) > 0, f"{FLAG}: {name}'s network has no parameters")
        learned = any(p.requires_grad for p in both.values())
        require(learned, f"{FLAG}: {name}'s network has no parameters that require a gradient; it learns nothing")
        for n, p in both.items():
            require_drawn_by_seed(f"{FLAG}: {name}'s {n}", p, alone.get(n, torch.empty(0)))
        normal = torch.from_numpy(keyed_generator(0, 0, "own/world_model").standard_normal((2, TRIED, states)))
        rows = normal.to(next(iter(both.values())))
        action = torch.eye(actions).to(rows)[torch.arange(TRIED) % actions].expand(2, -1, -1)
        inputs = torch.cat([rows, action], -1)
        where = f"{FLAG}: {name}'s network"
        found, again = (attempt(where, lambda: models[0].net(rows, action)) for _ in range(2))
        shapes = [shape_of(x) for x in found] if isinstance(found, tuple | list) else [type(found).__name__]
        wanted = [(2, TRIED, states), (2, TRIED)]
        require(shapes == wanted, f"{where} returns {shapes} for {TRIED} rows; give {wanted}")
        require(all(bool(x.isfinite().all()) for x in found), f"{where} returns numbers that are not finite")
        repeats = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        require(repeats, f"{where} returns other numbers when it is called again; let it draw nothing")
        for x, y in zip(found, attempt(where, lambda: models[1].net(rows[1:], action[1:])), strict=True):
            require_solo(where, x, y, FORWARD)
        try_gradient(where, models, inputs)


def try_gradient(where: str, models: Sequence[OwnWorldModel], inputs: Tensor) -> None:
    """Hold the gradient of a network of two replicas to that of the second alone, see :func:`try_dynamics`."""
    shape = (2, TRIED, models[0].states + 1)
    drawn = torch.from_numpy(keyed_generator(0, 0, "own/cotangent").standard_normal(shape)).to(inputs)

    def gradient(model: OwnWorldModel, rows: Tensor, cotangent: Tensor) -> Tensor:
        return flatten(model.vjp(model.forward_pass(rows), cotangent[..., :-1], cotangent[..., -1]))

    tried = zip(models, (inputs, inputs[1:]), (drawn, drawn[1:]), strict=True)
    both, alone = (attempt(f"{where}, differentiated,", partial(gradient, *given)) for given in tried)
    require(bool(both.isfinite().all()), f"{where} has a gradient that is not finite")
    require_solo(f"{where}, differentiated,", both, alone)


def check_dynamics(given: Dynamics | str | None) -> tuple[str | None, Dynamics | None]:
    """Return the path of a class of one's own, and itself; None is the shipped model.

    Raises:
        ToyError: it is a word, or no :class:`Dynamics`.
    """
    if given is None:
        return None, None
    if not isinstance(given, str):
        kind = type(given)
        require(isinstance(given, Dynamics), f"{FLAG}: a {kind.__name__} is not allowed; give a Dynamics")
        return f"{kind.__module__}.{kind.__qualname__}", given
    own = f"; load_from_checkpoint takes it: world_model={given.rpartition('.')[2]}(...)" if "." in given else ""
    raise ToyError(f"{FLAG}: {given!r} is not allowed; give MODULE.CLASS, a Dynamics{own}")
