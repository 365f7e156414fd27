"""Policies sample and act outside of a Trainer as they did in `predict`, `test` and validations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import (
    BanditData,
    BanditPolicy,
    FlowPolicy,
    GaussianPolicy,
    MeanFlowPolicy,
    MixtureData,
    ThreeModes,
)
from lightning_toys.generative_policy.bandit import RotatingModes, turns_to_states
from lightning_toys.generative_policy.meanflow import AverageVelocity, log_det
from lightning_toys.generative_policy.metrics import mode_metrics
from lightning_toys.generative_policy.policy import GenerativePolicy
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

SHORT = ("--trainer.max_steps", "30", "--model.seeds", "[3,4]")
KINDS: dict[str, type[GenerativePolicy]] = {"gaussian": GaussianPolicy, "meanflow": MeanFlowPolicy, "flow": FlowPolicy}
CASES = [
    ("gaussian", ()),
    ("gaussian", ("--model.parameters", "free", "--model.bound", "clip")),
    ("meanflow", ("--model.target_std", "0.1")),
    ("meanflow", ("--model.target_std", "0.1", "--model.target_std_as", "sigma_min", "--model.form", "edm")),
    ("meanflow", ("--model.target_std", "0", "--model.evaluation.nfe", "[3]", "--model.network.kind", "film")),
    ("meanflow", ("--model.ema_decay", "0.5", "--model.evaluation.weights", "ema")),
    ("flow", ()),
]


def load(runner: Runner, variant: str) -> GenerativePolicy:
    path = runner.folder(variant) / "checkpoints" / "last.ckpt"
    return KINDS[variant].load_from_checkpoint(path, weights_only=True)


def normals(*shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, "test/sample").standard_normal(shape))


def untrained(kind: type[GenerativePolicy], **settings: object) -> GenerativePolicy:
    module = kind(seeds=[3, 4, 5], network=Network(hidden=16, activation="silu"), **settings)
    module.sizes = module.measure(MixtureData())
    module.configure_model()
    return module


@pytest.mark.parametrize(("variant", "flags"), CASES)
def test_a_loaded_policy_samples_what_predict_wrote(policies: Runner, variant: str, flags: tuple[str, ...]) -> None:
    policies.ok("fit", variant, *SHORT, *flags)
    policies.ok("predict", variant, *SHORT, *flags)
    with np.load(policies.folder(variant) / "predictions.npz") as file:
        wanted = torch.from_numpy(file["samples"])
    module = load(policies, variant)
    found = module.sample(200)
    assert found.shape == wanted.shape == (2, 200, 2)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found.double(), wanted)
    assert torch.equal(module(module.evaluation_noise("e", 200)), found)
    assert (found[0] - found[1]).abs().max() > 1e-3  # each replica by its own noise and weights
    assert (module.sample(200, index=1) - found).abs().mean() > 1e-3  # other noise
    torch.testing.assert_close(module.sample(50), found[:, :50], rtol=0, atol=1e-6)


def test_a_loaded_policy_scores_as_test_and_validation(policies: Runner) -> None:
    flags = (*SHORT, "--model.evaluation.nfe", "[2]", "--model.evaluation.test_nfe", "[1,4]")
    policies.ok("fit", "flow", *flags)
    results = policies.folder("flow") / "results.json"
    validated = json.loads(results.read_text())["metrics"]["tv"]["values"]
    policies.ok("test", "flow", *flags)
    tested = json.loads(results.read_text())["metrics"]
    module, target = load(policies, "flow"), ThreeModes()

    def measured(samples: Tensor, metric: str) -> list[float]:
        return [mode_metrics(x, target)[metric] for x in samples.double()]

    assert measured(module.sample(200), "tv") == tested["tv"]["values"] == validated
    for readout in ("euler-1", "euler-2", "euler-4", "dopri5"):
        for metric in ("tv", "off10"):
            assert measured(module.sample(200, readout), metric) == tested[f"{metric}@{readout}"]["values"]


@pytest.mark.parametrize("kind", KINDS.values())
def test_noise_without_a_replica_axis_is_every_replicas(kind: type[GenerativePolicy]) -> None:
    module, e = untrained(kind), normals(7, 2)
    found = module(e)
    assert found.shape == (3, 7, 2)
    assert torch.equal(found, module(e.expand(3, 7, 2)))
    assert (found[0] - found[1]).abs().max() > 1e-3  # by different weights
    assert (module(e.flip(0)).flip(1) - found).abs().max() < 1e-6  # row by row


def test_xi_is_the_noise_of_a_learned_sigma() -> None:
    module, e = untrained(MeanFlowPolicy, target_std=0.1).double(), normals(7, 2)
    zero, one = module(e, torch.zeros(7, 2)), module(e, torch.ones(3, 7, 2))
    net = module.evaluation_net
    assert isinstance(net, AverageVelocity)
    u, log_sigma = net(e.expand(3, 7, 2), torch.zeros(3, 7, 1).double(), torch.ones(3, 7, 1).double())
    assert log_sigma is not None
    torch.testing.assert_close(zero, e - u)
    torch.testing.assert_close(one - zero, log_sigma.exp().expand(3, 7, 2))
    torch.testing.assert_close(module(e), module(e, module.evaluation_noise("xi", 7)), rtol=0, atol=0)
    assert (module(e) - zero).abs().max() > 1e-3
    # a policy without a head has no use for it
    plain = untrained(MeanFlowPolicy)
    assert torch.equal(plain(e, torch.ones(7, 2)), plain(e))


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_weights_are_those_that_are_evaluated(kind: type[GenerativePolicy]) -> None:
    e = normals(7, 2)
    for weights in ("raw", "ema"):
        module = untrained(kind, ema_decay=0.5, evaluation={"weights": weights})
        before = module(e)
        for p in module.net.parameters():
            p.data += 1
        assert torch.equal(module(e), before) == (weights == "ema")


def test_forward_is_differentiable_in_the_noise() -> None:
    """The Jacobian of the one-step map is that whose determinant `entropy_exact` is taken of."""
    module, e = untrained(MeanFlowPolicy).double(), normals(7, 2)
    whole = torch.autograd.functional.jacobian(lambda z: module(z).sum(1), e)  # (R, 2, 7, 2): rows do not mix
    net = module.evaluation_net
    assert isinstance(net, AverageVelocity)
    wanted, sign = log_det(net, e.expand(3, 7, 2))
    found_sign, found = torch.linalg.slogdet(whole.permute(0, 2, 1, 3))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found_sign, sign)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 2), (3, 5, 1), (1, 3, 5, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ToyError) as error:
        untrained(FlowPolicy)(torch.zeros(shape))
    assert str(error.value) == f"e: shape {shape} is not allowed; give (M, 2) or (3, M, 2)"
    bandit = bandit_policy("gaussian")
    for act in (bandit, bandit.act):
        with pytest.raises(ToyError, match=r"^state: shape .* give \(M, 2\) or \(2, M, 2\)$"):
            act(torch.zeros(*shape[:-1], 7))


@pytest.mark.parametrize(
    ("kind", "readout", "known"),
    [
        (GaussianPolicy, "1", "direct"),
        (MeanFlowPolicy, "0", "1, 2, 8"),
        (MeanFlowPolicy, "euler-2", "1, 2, 8"),
        (FlowPolicy, "2", "euler-1, euler-2, euler-8, dopri5"),
        (FlowPolicy, "euler-0", "euler-1, euler-2, euler-8, dopri5"),
        (FlowPolicy, "rk4-4", "euler-1, euler-2, euler-8, dopri5"),
    ],
)
def test_unknown_readouts_are_refused(kind: type[GenerativePolicy], readout: str, known: str) -> None:
    module = untrained(kind)
    for call in (lambda: module.sample(5, readout), lambda: module(normals(5, 2), readout=readout)):
        with pytest.raises(ToyError) as error:
            call()
        assert str(error.value) == f"readout: {readout!r} is not allowed; give one such as {known}"


def test_what_else_is_refused() -> None:
    module = untrained(FlowPolicy)
    with pytest.raises(ToyError, match=r"^n: 0 is not allowed; give an integer >= 1, at most \d+$"):
        module.sample(0)
    with pytest.raises(ToyError, match=r"^index: -1 is not allowed; give an integer >= 0, at most \d+$"):
        module.sample(5, index=-1)
    with pytest.raises(ToyError, match=r"^xi: 4 rows are not allowed; give 5, as many as of e$"):
        module(normals(5, 2), normals(4, 2))
    for kind in KINDS.values():
        for call in (lambda m: m.sample(5), lambda m: m(normals(5, 2))):
            with pytest.raises(ToyError, match=rf"^{kind.__name__} has no networks yet: train it, or read it by"):
                call(kind())
    for bandit in (lambda: BanditPolicy()(normals(5, 2)), lambda: BanditPolicy().act(normals(5, 2))):
        with pytest.raises(ToyError, match=r"^BanditPolicy has no networks yet: train it, or read it by"):
            bandit()
    with pytest.raises(ToyError, match=r"^index: -1 is not allowed; give an integer >= 0, at most \d+$"):
        bandit_policy("gaussian").act(normals(5, 2), -1)


# the bandit


def bandit_policy(policy: str) -> BanditPolicy:
    module = BanditPolicy(policy, seeds=[3, 4], network=Network(hidden=16, activation="silu"))  # type: ignore[arg-type]
    module.sizes = module.measure(BanditData())
    module.configure_model()
    return module


@pytest.mark.parametrize("policy", ["gaussian", "meanflow", "flow"])
def test_a_loaded_bandit_policy_acts_as_in_predict_and_test(policies: Runner, policy: str) -> None:
    policies.small = ("--model.network.hidden", "16", "--model.draws", "8", "--figures.enabled", "false")
    flags = (*SHORT, "--model.policy", policy, *(("--model.nfe", "2") if policy == "flow" else ()))
    policies.ok("fit", "bandit", *flags)
    policies.ok("predict", "bandit", *flags)
    policies.ok("test", "bandit", *flags)
    folder = policies.folder("bandit")
    with np.load(folder / "predictions.npz") as file:
        written = dict(file)
    state, wanted = (torch.from_numpy(written[k]) for k in ("state", "action"))
    assert state.shape == (64, 8, 2)
    module = BanditPolicy.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    rows = state.reshape(-1, 2)
    found = module.act(rows)
    assert found.shape == (2, 512, 2)
    assert not found.requires_grad
    assert torch.equal(found.double().reshape(wanted.shape), wanted)
    assert torch.equal(module(rows), found)
    assert torch.equal(module.act(rows.expand(2, -1, -1)), found)
    assert (module.act(rows, index=1) - found).abs().max() > 1e-2
    bandit = RotatingModes()
    regret = bandit.max_reward - bandit.reward(rows.expand(2, -1, -1), found.double()).mean(1)
    assert regret.tolist() == json.loads((folder / "results.json").read_text())["metrics"]["regret"]["values"]


@pytest.mark.parametrize("policy", ["gaussian", "meanflow", "flow"])
def test_actions_depend_on_each_replicas_states_row_by_row(policy: str) -> None:
    module = bandit_policy(policy).double()
    state = torch.stack([turns_to_states(torch.arange(6) / 6), turns_to_states(torch.arange(6) / 7 + 0.3)]).double()
    found = module(state)
    for r in range(2):
        torch.testing.assert_close(found[r], module(state[r])[r], rtol=0, atol=1e-12)
    moved = state.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(moved)[1, 2, 0], moved)
    other = torch.ones(2, 6, dtype=torch.bool)
    other[1, 2] = False
    assert (slope[other] == 0).all()
    step = torch.zeros_like(state)
    step[1, 2] = torch.tensor([1e-6, 2e-6])
    difference = (module(state + step) - module(state - step))[1, 2, 0] / 2e-6
    assert (slope[1, 2] @ torch.tensor([1.0, 2.0]).double()).item() == pytest.approx(difference.item(), rel=1e-5)
    assert slope[1, 2].abs().max() > 1e-4
