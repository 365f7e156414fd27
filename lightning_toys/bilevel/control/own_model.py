"""A model of the world of one's own: a network from somebody else's class, its derivatives by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.world_model import ModelPass, WorldModel
from lightning_toys.bilevel.vectors import Tensors
from lightning_toys.errors import ToyError, require

FLAG = "--model.world_model"
TRIED = 3  # rows that a network is tried on


class Dynamics:
    """Base of models of the world; its settings are its constructor's."""

    @property
    def label(self) -> str:
        """Its name in tables and figures: the class's."""
        return type(self).__name__

    def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
        """Return the network, called with s (R, B, S) and one-hot a (R, B, A): next state (R, B, S) and reward (R, B).

        Every parameter has a leading replica axis (R, ...); row r is drawn by ``seeds[r]``, and what replica r predicts
        depends on its own rows and parameters alone. Autograd follows it, once at each step.

        Args:
            seeds: one seed a replica.
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
        ToyError: the network is not what :meth:`Dynamics.build` promises.
    """

    def __init__(self, dynamics: Dynamics, seeds: Sequence[int], states: int, actions: int, width: int) -> None:
        nn.Module.__init__(self)
        self.states, self.actions, self.separate = states, actions, False
        name = type(dynamics).__name__
        try:
            built = dynamics.build(seeds, states, actions, width)
            require(isinstance(built, nn.Module), f"{FLAG}: {name}.build returns {type(built).__name__}; give a Module")
            self.net = built  # type: ignore[assignment]
            check_network(name, built, len(seeds), states, actions)
        except ToyError:
            raise
        except Exception as error:  # of somebody else's code
            said = " ".join(str(error).split())[:200] or "not given"
            raise ToyError(f"{FLAG}: {name}.build fails ({type(error).__name__}: {said})") from error

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


def check_network(name: str, net: nn.Module, replicas: int, states: int, actions: int) -> None:
    """Hold a network to its contract, on a few rows.

    Raises:
        ToyError: says what it lacks.
    """
    parameters = dict(net.named_parameters())
    require(len(parameters) > 0, f"{FLAG}: {name}'s network has no parameters")
    for n, p in parameters.items():
        axis = p.dim() > 0 and p.shape[0] == replicas
        require(axis, f"{FLAG}: {name}'s {n} is {tuple(p.shape)}; give a leading replica axis of {replicas}")
    like = next(iter(parameters.values()))
    rows = torch.linspace(-1, 1, replicas * TRIED * states).view(replicas, TRIED, states).to(like)
    action = torch.eye(actions).to(like)[torch.arange(TRIED) % actions].expand(replicas, -1, -1)
    with torch.no_grad():
        found = net(rows, action)
        pair = isinstance(found, tuple | list) and len(found) == 2
        shapes = [tuple(x.shape) for x in found] if pair else [type(found).__name__]
        wanted = [(replicas, TRIED, states), (replicas, TRIED)]
        require(shapes == wanted, f"{FLAG}: {name}'s network returns {shapes} for {TRIED} rows; give {wanted}")
        finite = all(bool(x.isfinite().all()) for x in found)
        require(finite, f"{FLAG}: {name}'s network returns numbers that are not finite")
        moved = rows.clone()
        moved[0] += 1  # of the first replica alone: no other may see it
        again = net(moved, action)
        same = all(torch.allclose(x[1:], y[1:], atol=1e-6) for x, y in zip(found, again, strict=True))
        require(same, f"{FLAG}: {name}'s network mixes replicas; replica r depends on its own rows alone")


def check_dynamics(given: Dynamics | str | None) -> tuple[str | None, Dynamics | None]:
    """Return the path of a class of one's own, and itself; None is the shipped model.

    Raises:
        ToyError: it is a word.
    """
    if not isinstance(given, str):
        return (None if given is None else f"{type(given).__module__}.{type(given).__qualname__}"), given
    own = f"; load_from_checkpoint takes it: world_model={given.rpartition('.')[2]}(...)" if "." in given else ""
    raise ToyError(f"{FLAG}: {given!r} is not allowed; give MODULE.CLASS, a Dynamics{own}")
