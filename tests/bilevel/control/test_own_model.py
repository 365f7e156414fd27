"""A model of the world from outside the package: parity with the shipped one, a run of the example, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.bilevel import BilevelControl, Dynamics
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.own_model import OwnWorldModel, try_dynamics
from lightning_toys.bilevel.control.settings import FORMS, Solver
from lightning_toys.errors import ToyError
from lightning_toys.nets import ReplicaLinear
from tests.bilevel.control.test_agents import ACTIONS, SEEDS, STATES, VALUE, batch_of, gradients
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.bilevel.control.test_updates import adams, same
from tests.conftest import REPO, Runner


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Shipped(Dynamics):
    """The shipped network, as somebody else's."""

    def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
        net = MultiHeadMLP(seeds, "model", (states + actions, width, width, states + 1))

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inside = net

            def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
                out = self.inside(torch.cat([state, action], -1))[:, 0]
                return out[..., :-1], out[..., -1]

        return Wrapped()


@pytest.mark.parametrize("agent", ["mle", "vep", "omd", "vaml"])
def test_the_shipped_network_as_ones_own(agent: str) -> None:
    """Three iterations end at the same parameters, and find the same errors."""
    found = []
    for dynamics in (None, Shipped()):
        nets = AgentNetworks(SEEDS, STATES, ACTIONS, 5, 4, 2, agent, Solver(smoothing=2), FORMS["ours"], dynamics)
        learner, adam = Learner(nets, agent, Solver(smoothing=2), VALUE, 0.1, 0.5), adams(nets)
        for k in range(3):
            learner.outer_iteration(batch_of(k), *adam)
        found.append((nets, learner.measure_errors(batch_of())))
    assert same(found[0][0], found[1][0], 1e-10)
    for name, value in found[0][1].items():
        assert torch.allclose(value, found[1][1][name], atol=1e-10), name
    fresh = AgentNetworks(SEEDS, STATES, ACTIONS, 5, 4, 2, agent, Solver(smoothing=2))
    assert not same(found[0][0].model, fresh.model, 1e-3)


def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    shutil.copy(REPO / "docs" / "examples" / "own_classes" / "own_world_model.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_world_model  # type: ignore[import-not-found]

    return own_world_model


@pytest.mark.usefixtures("_from_the_repository")
def test_the_example_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reverse pass is autograd's; without a change the next state is the state."""
    own = example(monkeypatch, tmp_path)
    model, batch = OwnWorldModel(own.Residual(0.3), SEEDS, STATES, ACTIONS, 4), batch_of()
    inputs = torch.cat([batch.observation, model.one_hot(batch.action, batch.observation)], -1)
    g = torch.Generator().manual_seed(1)
    s, r = torch.randn(batch.observation.shape, generator=g), torch.randn(batch.reward.shape, generator=g)
    found = model(batch.observation, batch.action)
    expected = gradients((found.next_state * s).sum((1, 2)) + (found.reward * r).sum(1), model)
    with torch.no_grad():
        passed = model.forward_pass(inputs)
        given = model.vjp(passed, s, r)
    assert list(given) == [n for n, _ in model.named_parameters()]
    assert all(torch.allclose(given[n], expected[n], atol=1e-13) for n in expected)
    assert not passed.output.requires_grad
    still = OwnWorldModel(own.Residual(0.0), SEEDS, STATES, ACTIONS, 4)(batch.observation, batch.action)
    assert torch.equal(still.next_state, batch.observation)


@pytest.mark.usefixtures("_from_the_repository")
def test_the_example_from_another_folder(runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    own = example(monkeypatch, tmp_path)
    flags = ("--model.world_model", "own_world_model.Residual", "--model.world_model.scale", "0.2")
    words = (*SMALL, *QUIET, "--trainer.max_steps", "100", "--model.agent", "vaml", "--model.check_gradient", "2")
    control = Runner(runner.root, runner.capture, "bilevel", (*words, *flags))
    control.ok("fit", "control", "--run.name", "whole", "--trainer.max_steps", "60")
    control.ok("fit", "control", "--run.name", "whole", "--ckpt_path", "last")
    control.ok("test", "control", "--run.name", "whole", "--ckpt_path", "last")
    found = json.loads((control.folder("control", "whole") / "results.json").read_text())
    assert found["label"] == "vaml, model Residual of width 4"
    assert min(found["metrics"]["gradient_cosine"]["values"]) > 0.99
    loaded = BilevelControl.load_from_checkpoint(
        control.folder("control", "whole") / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert loaded.label == found["label"]
    kept = dict(BilevelControl(world_model=own.Residual(0.2)).hparams)
    assert kept["world_model"] == "own_world_model.Residual"
    with pytest.raises(ToyError, match=r"load_from_checkpoint takes it: world_model=Residual"):
        BilevelControl(**kept)
    code, err = control.code("fit", "control", "--model.world_model", "own_world_model.Residul")
    assert code == 2
    assert err.count("\n") == 1


class Bad(Dynamics):
    """A network that lacks something."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
        fault = self.fault
        if fault == "nothing":
            return None  # type: ignore[return-value]
        if fault == "fails":
            raise ValueError("no such file")

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = ReplicaLinear(seeds, "bad", states + actions, states + 1)
                if fault in ("global draws", "first seed"):
                    # as many a network does it: one start for another run, or another start for a replica's solo run
                    g = torch.Generator().manual_seed(seeds[0]) if fault == "first seed" else None
                    shape = (len(seeds), states + actions, states + 1)
                    self.out.weight = nn.Parameter(torch.randn(shape, generator=g))
                if fault == "frozen":
                    self.requires_grad_(False)
                if fault == "axis":
                    self.out = nn.Linear(states + actions, states + 1)  # type: ignore[assignment]

            def forward(self, state: Tensor, action: Tensor) -> Any:
                out = self.out(torch.cat([state, action], -1))
                if fault == "detached":
                    out = out.detach()
                if fault == "noise":
                    out = out + torch.randn_like(out)
                if fault == "mixes backwards":  # another replica's weights, at a value of 0
                    out = out + 0 * out.flip(0).detach() + (out.flip(0) - out.flip(0).detach())
                if fault == "mixes":
                    out = out + out.mean(0, keepdim=True)
                if fault == "not finite":
                    out = out / 0
                return out if fault == "one" else (out[..., :-1], out[..., -1:] if fault == "shape" else out[..., -1])

        return Net() if fault != "no parameters" else nn.Identity()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nothing", "Bad.build returns NoneType; give a Module"),
        ("fails", "Bad.build fails: ValueError: no such file"),
        ("axis", "out.weight is (4, 5) for 2 seeds; give a leading replica axis of 2"),
        ("global draws", "out.weight depends on more than its replica's seed"),
        ("first seed", "out.weight depends on more than its replica's seed"),
        ("no parameters", "has no parameters"),
        ("frozen", "no parameters that require a gradient"),
        ("detached", "network, differentiated, fails: RuntimeError"),
        ("one", "returns ['Tensor'] for 3 rows; give [(2, 3, 3), (2, 3)]"),
        ("shape", "returns [(2, 3, 3), (2, 3, 1)] for 3 rows"),
        ("not finite", "numbers that are not finite"),
        ("noise", "returns other numbers when it is called again"),
        ("mixes", "network mixes replicas"),
        ("mixes backwards", "network, differentiated, mixes replicas"),
    ],
)
@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[:1]], ids=["two seeds", "one seed"])
def test_what_is_no_model_is_one_line(fault: str, says: str, seeds: list[int]) -> None:
    """A run of one seed is tried with two: else no mixing could show."""
    with pytest.raises(ToyError) as error:
        try_dynamics(Bad(fault), seeds, STATES, ACTIONS, 4)
    assert says in str(error.value)
    assert str(error.value).startswith("--model.world_model: ")
    assert "\n" not in str(error.value)


def test_a_trial_leaves_nothing_behind() -> None:
    """A model that is right is let through, at any number of seeds; torch's generator draws what it would have."""

    class Counts(Shipped):
        built = 0

        def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
            self.built += 1
            torch.rand(1)
            return super().build(seeds, states, actions, width)

    model = Counts()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for seeds in ([4], [0, 1], [7, 8, 9]):
        try_dynamics(model, seeds, STATES, ACTIONS, 4)
    assert torch.equal(torch.rand(3), wanted)
    assert model.built == 0


@pytest.mark.usefixtures("_from_the_repository")
def test_a_model_is_tried_before_a_run(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(str(REPO / "tests" / "own_classes"))
    control = Runner(runner.root, runner.capture, "bilevel", (*SMALL, *QUIET, "--trainer.max_steps", "50"))
    flags = ("--model.agent", "vaml", "--model.seeds", "[3]", "--model.world_model", "reward_only.GlobalDraws")
    code, err = control.code("fit", "control", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert "--model.world_model: GlobalDraws's weight depends on more than its replica's seed" in err
