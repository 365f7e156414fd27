"""An agent from outside the package is tried for a step before anything is run: what does not fit is one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_toys.bilevel import AgentUpdate, BilevelControl, ModelGradient, ReplayData, Solver
from lightning_toys.bilevel.control.agents import ModelTargets, Problem, mle_gradient, mle_loss
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.settings import FORMS, Form
from lightning_toys.bilevel.vectors import flatten
from lightning_toys.errors import ToyError
from tests.bilevel.control.test_agents import ACTIONS, SEEDS, STATES, VALUE, batch_of, gradients
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.bilevel.control.test_updates import adams, same
from tests.conftest import REPO, Runner


@dataclass
class Faulty(AgentUpdate):
    """Fits its model as mle does, but for one fault."""

    fault: str = ""
    calls: int = 0

    def __post_init__(self) -> None:
        if self.fault == "response":
            self.response = "los"
        if self.fault == "fits":
            self.fits = None  # type: ignore[assignment]
        if self.fault in ("none", "claims"):
            self.response = "loss" if self.fault == "claims" else "none"
        if self.fault == "label":
            self.label = 3  # type: ignore[assignment]

    def networks(
        self, seeds: Sequence[int], states: int, actions: int, hidden: int, form: Form
    ) -> dict[str, nn.Module]:
        net: Any = MultiHeadMLP(seeds, "further", (states, 2))
        fault = self.fault
        if fault == "draws":
            net = MultiHeadMLP(range(50, 50 + len(seeds)), "further", (states, 2))
        if fault == "no networks":
            return None  # type: ignore[return-value]
        names = {"taken": "target", "later": "recent", "dotted": "a.b", "method": "forward"}
        return {names.get(fault, "values"): 3 if fault == "no module" else net}

    def targets(self, problem: Problem, predicted: ModelTargets | None = None) -> Tensor:
        y = super().targets(problem, predicted)
        if self.fault == "target shape":
            return y.unsqueeze(1)
        return y + y.mean(0) if self.fault == "targets mix" else y

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> Any:
        fault = self.fault
        self.calls += 1
        found, loss = mle_gradient(problem, problem.model.forward_pass(problem.inputs))
        first = next(iter(found))
        if fault == "mixes":
            found = {n: g + g.flip(0) for n, g in found.items()}
        if fault == "noise":
            found = {n: g + torch.randn_like(g) for n, g in found.items()}
        if fault == "left out":
            del found[first]
        if fault == "shape":
            found[first] = found[first][0]
        if fault == "not finite":
            found[first] = found[first] / 0
        if fault == "raises":
            raise ValueError("no such thing\nhere")
        if fault == "nothing":
            return None
        if fault == "no numbers":
            return ModelGradient([1, 2], loss)  # type: ignore[arg-type]
        return ModelGradient(None if fault in ("none", "claims") else found, loss.sum() if fault == "loss" else loss)

    def measures(self, problem: Problem, targets: ModelTargets) -> dict[str, Tensor]:
        found = {"mean_y": targets.y.mean(1)}
        if self.fault == "measure":
            return {"mean_y": targets.y}
        return {"td_error": found["mean_y"]} if self.fault == "measured" else found


BAD = [
    ("response", "Faulty.response: 'los' is not allowed; give one of loss, weights, values, solved, none"),
    ("fits", "Faulty.fits: None is not allowed; give True or False"),
    ("label", "Faulty.label: 3 is not allowed; give a text"),
    ("no networks", "Faulty.networks returns NoneType; give a dictionary of Modules by name"),
    ("taken", "Faulty.networks: the name 'target' is not allowed"),
    ("later", "Faulty.networks: the name 'recent' is not allowed"),
    ("dotted", "Faulty.networks: the name 'a.b' is not allowed"),
    ("method", "Faulty.networks: the name 'forward' is not allowed"),
    ("no module", "Faulty.networks: values is a int; give a Module"),
    ("draws", "Faulty.networks: values's w0 depends on more than its replica's seed"),
    ("target shape", "Faulty.targets is (2, 1, 16); give a tensor (2, 16)"),
    ("targets mix", "Faulty.targets mixes replicas"),
    ("mixes", "Faulty.gradient mixes replicas"),
    ("noise", "Faulty.gradient mixes replicas, or draws from a generator"),
    (
        "left out",
        "Faulty.gradient returns ['net.b0', 'net.b1', 'net.b2', 'net.w1', 'net.w2']; give each of the model's",
    ),
    ("shape", "Faulty.gradient: net.w0 is (1, 6, 4); give a tensor (2, 1, 6, 4)"),
    ("not finite", "Faulty.gradient: net.w0 has numbers that are not finite"),
    ("raises", "Faulty.gradient fails: ValueError: no such thing here"),
    ("nothing", "Faulty.gradient returns NoneType; give a ModelGradient"),
    ("no numbers", "Faulty.gradient returns list; give each of the model's"),
    ("claims", "Faulty.gradient returns no gradient, and response is 'loss'; give 'none'"),
    ("loss", "Faulty.gradient: loss is (); give a tensor (2,)"),
    ("measure", "Faulty.measures: mean_y is (2, 16); give a tensor (2,)"),
    ("measured", "Faulty.measures: 'td_error' is not allowed"),
]


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seeds", [[4, 1], [4]], ids=["two seeds", "one seed"])
@pytest.mark.parametrize(("fault", "says"), BAD, ids=lambda x: x if " is " not in x else "")
def test_what_is_no_agent_is_one_line(fault: str, says: str, seeds: list[int]) -> None:
    module = BilevelControl(Faulty(fault), seeds=seeds, hidden_dim=8, model_hidden_dim=4)
    with pytest.raises(ToyError) as error:
        module.measure(ReplayData(16, 40, 100))
    assert str(error.value).startswith("--model.agent: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["", "none"])
def test_an_agent_that_is_right_is_let_through(fault: str) -> None:
    """What it counts is not what the trial's copy counted, and torch's generator draws what it would have."""
    agent = Faulty(fault)
    module = BilevelControl(agent, seeds=[5], hidden_dim=8, model_hidden_dim=4, solver=Solver(smoothing=3))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    assert module.measure(ReplayData(16, 40, 100)) == {"states": 4, "actions": 2, "capacity": 100}
    assert torch.equal(torch.rand(3), wanted)
    assert agent.calls == 0


def test_a_thing_that_is_no_agent() -> None:
    with pytest.raises(ToyError, match=r"--model.agent: a int is not allowed; give an AgentUpdate"):
        BilevelControl(3)  # type: ignore[arg-type]
    with pytest.raises(ToyError, match=r"--model.agent: a type is not allowed; give an AgentUpdate"):
        BilevelControl(Faulty)  # type: ignore[arg-type]
    with pytest.raises(ToyError, match=r"--model.world_model: a type is not allowed; give a Dynamics"):
        BilevelControl(world_model=int)  # type: ignore[arg-type]


class Backwards(AgentUpdate):
    """mle with its gradient by autograd, the names the other way round, and the loss with its graph."""

    response = "loss"
    fits = False

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        assert targets is not None
        named = dict(reversed(list(problem.model.named_parameters())))
        loss = mle_loss(problem.predict(), problem.batch)
        found = torch.autograd.grad(loss.sum(), list(named.values()), create_graph=True)
        return ModelGradient(dict(zip(named, found, strict=True)), loss)


def test_a_gradient_is_taken_by_name() -> None:
    """Whatever the order of its names, the model steps as along the shipped one's."""

    class Forwards(Backwards):
        def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
            return ModelGradient(*mle_gradient(problem, problem.model.forward_pass(problem.inputs)))

    torch.set_default_dtype(torch.float64)
    found = []
    for agent in (Forwards(), Backwards()):
        # as wide as its inputs, so that shapes alone do not tell weights apart
        nets = AgentNetworks(SEEDS, STATES, ACTIONS, 5, STATES + ACTIONS, 2, agent, Solver(smoothing=2))
        learner, adam = Learner(nets, agent, Solver(smoothing=2), VALUE, 0.1, 0.01), adams(nets)
        for k in range(3):
            assert not learner.outer_iteration(batch_of(k), *adam).requires_grad
        assert not nets.get_buffer("recent").requires_grad  # else it would keep the graph of every step
        found.append(nets)
    assert same(found[0], found[1], 1e-10)
    first = AgentNetworks(SEEDS, STATES, ACTIONS, 5, STATES + ACTIONS, 2, Forwards(), Solver())
    moved = flatten(dict(found[1].model.named_parameters())) - flatten(dict(first.model.named_parameters()))
    assert moved.abs().max() > 1e-2


class ObservedReward(AgentUpdate):
    """vaml with the observed reward in the place of the predicted one."""

    fits = False

    def targets(self, problem: Problem, predicted: ModelTargets | None = None) -> Tensor:
        found = predicted or problem.model_targets()
        return found.y - found.prediction.reward + problem.batch.reward

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        assert targets is not None
        error = self.targets(problem, targets) - problem.y
        w = 2 * error / error.shape[1]
        whole, rewards = (problem.model_vjp(targets, w, through) for through in (True, False))
        return ModelGradient({n: g - rewards[n] for n, g in whole.items()}, error.square().mean(1))


def test_the_observed_reward_by_an_agent_of_ones_own() -> None:
    """What the page says of no_learn_reward: the targets' definition, and autograd's gradient of the loss."""
    torch.set_default_dtype(torch.float64)
    agent = ObservedReward()
    nets = AgentNetworks(SEEDS, STATES, ACTIONS, 5, 4, 2, agent, Solver())
    problem, batch = Learner(nets, agent, Solver(), VALUE, 0.1).problem(batch_of()), batch_of()
    state = problem.predict().next_state
    y = batch.reward + 0.9 * batch.not_terminated * VALUE.value(nets.target(state))
    assert torch.allclose(agent.targets(problem), y)
    loss = (y - problem.y).square().mean(1)
    found = agent.gradient(nets, problem, problem.model_targets())
    expected = gradients(loss, nets.model)
    assert found.gradient is not None
    assert all(torch.allclose(found.gradient[n], g, atol=1e-12) for n, g in expected.items())
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    torch.set_default_dtype(torch.float32)
    module = BilevelControl(ObservedReward(), hidden_dim=8, model_hidden_dim=4)
    assert module.measure(ReplayData(16, 40, 100))["states"] == 4


def test_a_script_with_an_agent_that_is_checked(tmp_path: Path) -> None:
    """Its targets are handed over in the check as in training, though it descends a loss of its own."""
    module = BilevelControl(Backwards(), seeds=[0, 3], hidden_dim=8, model_hidden_dim=4, check_gradient=3)
    trainer = Trainer(
        max_steps=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, val_check_interval=60, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=ReplayData(16, 40, 100))
    assert module.last_report is not None
    assert min(module.last_report.metrics["gradient_cosine"]) > 0.999


@pytest.mark.usefixtures("_from_the_repository")
def test_an_agent_is_tried_before_a_run(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "tests" / "own_classes"))
    control = Runner(runner.root, runner.capture, "bilevel", (*SMALL, *QUIET, "--trainer.max_steps", "50"))
    code, err = control.code("fit", "control", "--model.agent", "reward_only.Mixing", "--model.seeds", "[3]")
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert "--model.agent: Mixing.gradient mixes replicas" in err


def test_forms_are_tried_too() -> None:
    """The published form's batches, cold starts and a target that moves at each step are those of the run."""
    for form in FORMS:
        for fits in (True, False):
            agent = Faulty()
            agent.fits = fits
            solver = Solver(warm_start=False, num_q_steps=3, num_t_steps=2)
            module = BilevelControl(agent, hidden_dim=8, model_hidden_dim=4, solver=solver, form=form)  # type: ignore[arg-type]
            assert module.measure(ReplayData(16, 40, 100))["states"] == 4
