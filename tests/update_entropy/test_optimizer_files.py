"""AdamW's state out of files: what was saved is what is loaded, and what does not fit is refused in one line."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, read_state
from lightning_toys.update_entropy.optimizer_files import (
    load_optimizer_state,
    save_optimizer_state,
    with_positive_rates,
)

peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))

# peft 0.21 asks a model of transformers 5.23 for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")

VOCABULARY = 32


def a_model(layers: int = 1, hidden: int = 16) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager",
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(model: Any, rank: int = 4, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide what is loaded
                p.normal_()
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for k in range(count):
        ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def same(found: AdamWState, live: AdamWState) -> None:
    """Assert that two states are one, bit by bit; and that no two parameters share moments, or order would not show."""
    assert found.hyperparameters == live.hyperparameters
    assert set(found.moments) == set(live.moments)
    for name, m in live.moments.items():
        f = found.moments[name]
        assert f.step == m.step > 0
        assert torch.equal(f.exp_avg, m.exp_avg)
        assert torch.equal(f.exp_avg_sq, m.exp_avg_sq)
        assert (f.max_exp_avg_sq is None) == (m.max_exp_avg_sq is None)
        if f.max_exp_avg_sq is not None and m.max_exp_avg_sq is not None:
            assert torch.equal(f.max_exp_avg_sq, m.max_exp_avg_sq)
    norms = [float(m.exp_avg.norm()) for m in live.moments.values()]
    assert len(set(norms)) == len(norms)
    assert all(n > 0 for n in norms)


def refused_state(path: Path, model: nn.Module, *parts: str) -> str:
    with pytest.raises(ToyError) as caught:
        load_optimizer_state(path, model)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("--model.optimizer_state: ")
    for part in (path.name, *parts):
        assert part in line
    return line


# --- files that are read


@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_own_file_round_trips(amsgrad: bool, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    p = trained(model)
    optimizer = torch.optim.AdamW(
        [{"params": p[2:], "lr": 3e-3, "betas": (0.8, 0.95)}, {"params": p[:2]}], weight_decay=0.1, amsgrad=amsgrad
    )
    steps(model, optimizer)
    save_optimizer_state(optimizer, model, file)
    live = read_state(optimizer, model.named_parameters())
    same(load_optimizer_state(file, model), live)
    with pytest.raises(ToyError, match="is there already") as caught:
        save_optimizer_state(optimizer, model, file)
    assert "\n" not in str(caught.value)
    same(load_optimizer_state(file, model), live)
    content = torch.load(file, weights_only=True)  # names may come by group
    content["names"] = [content["names"][:2], content["names"][2:]]
    torch.save(content, file)
    same(load_optimizer_state(file, model), live)


def test_saving_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    for act in (
        lambda: save_optimizer_state(torch.optim.AdamW(net.parameters()), nn.Linear(2, 2), tmp_path / "a.pt"),
        lambda: save_optimizer_state(torch.optim.SGD(net.parameters(), 0.1), net, tmp_path / "a.pt"),
        lambda: save_optimizer_state(torch.optim.AdamW(net.parameters()), net, tmp_path / "no" / "a.pt"),
    ):
        with pytest.raises(ToyError) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "bare"])
def test_named_groups_of_torch_match_through_wrappers(wrapper: str, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"

    def called(name: str) -> str:
        if wrapper == "bare":  # as an adapter's file has them
            return name.removeprefix("base_model.model.").replace(".default", "")
        return wrapper + name

    named = [(called(n), p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named[::-1], lr=1e-3)  # names, not order, decide
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    same(load_optimizer_state(file, model), read_state(optimizer, model.named_parameters()))


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("lora", [False, True])
def test_the_file_of_transformers_trainer(lora: bool, tmp_path: Path) -> None:
    model = adapted(a_model()) if lora else a_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=3, per_device_train_batch_size=2, weight_decay=0.1,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts())
    trainer.train()
    live = read_state(trainer.optimizer.optimizer, model.named_parameters())
    assert {h.weight_decay for h in live.hyperparameters.values()} == ({0.1} if lora else {0.0, 0.1})
    folder = tmp_path / "checkpoint-3"
    assert "param_names" not in torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"][0]
    same(load_optimizer_state(folder, model), live)
    same(load_optimizer_state(folder / "optimizer.pt", model), live)
    other = adapted(a_model(), rank=2) if lora else a_model(layers=2)
    refused_state(folder, other, "is wanted" if lora else "no state for model.layers.1")


def test_one_group_without_names_goes_by_order(tmp_path: Path) -> None:
    model, file = a_model(), tmp_path / "optimizer.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    live = read_state(optimizer, model.named_parameters())
    same(load_optimizer_state(file, model), live)
    torch.save({"optimizer": optimizer.state_dict()}, file)
    same(load_optimizer_state(file, model), live)
    content = optimizer.state_dict()
    second = content["state"].pop(1)
    torch.save(content, file)
    assert refused_state(file, model, "no state for model.layers.0.self_attn.q_proj.weight (16, 16)").count(";") == 0
    content["state"][0], content["state"][1] = second, content["state"][0]
    torch.save(content, file)
    refused_state(file, model, "shape (16, 16) for model.embed_tokens.weight where (32, 16) is wanted")


class Fitted(lightning.LightningModule):
    """A model under a name of its own, beside one that has the same parameters' names."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.policy = model
        self.kind = kind
        if kind == "critic":
            self.critic = nn.Linear(VOCABULARY, 1)

    def training_step(self, batch: dict[str, Tensor]) -> None:
        out = self.policy(**batch)
        loss = out.loss + (self.critic(out.logits).mean() if self.kind == "critic" else 0)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        if self.kind == "named":
            return torch.optim.AdamW([(n, p) for n, p in self.named_parameters() if p.requires_grad][::-1])
        if self.kind == "critic":
            return [torch.optim.AdamW(self.critic.parameters()), torch.optim.AdamW(self.policy.parameters(), lr=1e-4)]
        if self.kind == "groups":
            p = trained(self)
            return torch.optim.AdamW([{"params": p[:3], "lr": 1e-4}, {"params": p[3:]}])
        return torch.optim.AdamW(self.parameters())


# the loader reads eight short lines; worker processes would cost more than they bring
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "named", "critic", "groups"])
def test_a_lightning_checkpoint(kind: str, tmp_path: Path) -> None:
    model = a_model() if kind == "critic" else adapted(a_model())
    module = Fitted(model, kind).train()
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Texts(), batch_size=2))
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    live = read_state(trainer.optimizers[-1], module.named_parameters())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    live = AdamWState(*({n: part[f"policy.{n}"] for n in names} for part in (live.hyperparameters, live.moments)))
    same(load_optimizer_state(file, model), live)
    refused_state(file, adapted(a_model(hidden=32)), "is wanted" if kind != "critic" else "optimiser 0")
    if kind == "critic":
        content = torch.load(file, weights_only=True)
        content["optimizer_states"].append(content["optimizer_states"][1])
        torch.save(content, file)
        refused_state(file, model, "optimiser 1; optimiser 2")


# --- optimiser states that are refused

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.default.weight" for x in "AB")


@pytest.fixture(scope="module")
def stepped() -> tuple[Any, dict[str, Any]]:
    model = adapted(a_model())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    steps(model, optimizer)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names[:2] == [A, B]
    return model, {"optimizer": optimizer.state_dict(), "names": names}


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change_it(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change_it


def state(number: int, key: str, value: Any) -> Callable[[Any], None]:
    return put("optimizer", "state", number, key, value=value)


def group(key: str, value: Any) -> Callable[[Any], None]:
    return put("optimizer", "param_groups", 0, key, value=value)


def no_group(key: str) -> Callable[[Any], None]:
    return lambda content: content["optimizer"]["param_groups"][0].pop(key)


NAN = torch.full((4, 16), torch.nan)
WRONG: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "no state": (lambda c: c["optimizer"]["state"].pop(0), (f"no state for {A} (4, 16)",)),
    "no name": (put("names", 0, value="other"), (f"no state for {A}", "nothing takes the state of other (4, 16)")),
    "too few names": (lambda c: c["names"].pop(), ("3 names of 4 parameters",)),
    "a name twice": (put("names", 1, value=A), (f"no state for {B}", f"nothing takes the state of {A} (16, 4)")),
    "alike": (put("names", slice(0, 2), value=[f"module.{A}", f"_orig_mod.{A}"]), (f"no state for {A}",)),
    "loose": (put("optimizer", "state", 9, value={"step": 1}), ("number 9 is in no group",)),
    "shape": (state(0, "exp_avg", torch.zeros(4, 8)), (f"shape (4, 8) for {A} where (4, 16) is wanted",)),
    "shape of squares": (state(0, "exp_avg_sq", torch.zeros(8)), (f"shape (8,) for {A} where (4, 16)",)),
    "shape of maxima": (state(0, "max_exp_avg_sq", torch.zeros(3)), (f"shape (3,) for {A} where (4, 16)",)),
    "steps": (state(1, "step", torch.tensor(5.0)), (f"step 3 for {A}, 5 for {B}",)),
    "half a step": (state(0, "step", torch.tensor(2.5)), (f"step 2.5 for {A}",)),
    "nan steps": (state(0, "step", torch.tensor(torch.nan)), (f"step nan for {A}",)),
    "steps below 0": (lambda c: [s.update(step=-1) for s in c["optimizer"]["state"].values()], (f"step -1 for {A};",)),
    "a vector of steps": (state(0, "step", torch.ones(2)), (f"step of {A}",)),
    "nan": (state(0, "exp_avg", NAN), (f"exp_avg of {A} is not finite",)),
    "nan squares": (state(0, "exp_avg_sq", NAN), (f"exp_avg_sq of {A} is not finite",)),
    "squares below 0": (state(0, "exp_avg_sq", -torch.ones(4, 16)), (f"exp_avg_sq of {A} is below 0",)),
    "no squares": (lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"), (f"no exp_avg_sq for {A}",)),
    "no maximum": (group("amsgrad", True), (f"no max_exp_avg_sq for {A}",)),
    "more moments": (state(0, "exp_avg_slow", NAN), ("exp_avg_slow", "AdamW does not keep")),
    "momentum": (group("momentum", 0.9), ("group 0", "momentum")),
    "no betas": (no_group("betas"), ("it has no betas",)),
    "no eps": (no_group("eps"), ("it has no eps",)),
    "no amsgrad": (no_group("amsgrad"), ("it has no amsgrad",)),
    "betas": (group("betas", (0.9, 1.5)), ("betas (0.9, 1.5)",)),
    "lr": (group("lr", "fast"), ("no numbers",)),
    "Adam": (group("decoupled_weight_decay", False), ("as Adam's is",)),
    "no correction": (group("bias_correction", False), ("bias_correction is off",)),
    "format": (lambda c: c.pop("optimizer"), ("holds no state of an optimiser",)),
    "alike, and one the same": (
        put("names", 1, value=f"module.{A}"),
        (f"model: no state for {B} (16, 4); nothing takes the state of module.{A} (16, 4)",),
    ),
    "no list of names": (put("names", value=4), ("0 names of 4 parameters",)),
    "names that are none": (put("names", value=[["a"], 3]), ("2 names of 4 parameters",)),
    "no groups": (put("optimizer", "param_groups", value=[]), ("holds no state of an optimiser",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_states_that_do_not_fit(case: str, stepped: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    (model, content), file = stepped, tmp_path / "state.pt"
    torch.save(content, file)
    assert load_optimizer_state(file, model).moments.keys() == set(content["names"])
    content = copy.deepcopy(content)
    act, parts = WRONG[case]
    act(content)
    torch.save(content, file)
    refused_state(file, model, *parts)


def test_the_list_is_cut_short(tmp_path: Path) -> None:
    model, file = adapted(a_model(layers=3)), tmp_path / "state.pt"
    torch.save(torch.optim.AdamW(trained(model)).state_dict(), file)
    line = refused_state(file, model, "and 4 more")
    assert line.count("no state for") == 8


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RAdam", "NAdam", "Adamax", "RMSprop"])
def test_other_optimisers_are_refused(kind: str, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    optimizer = getattr(torch.optim, kind)(trained(model), lr=1e-3, weight_decay=0.1)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    refused_state(file, model, "group 0 is not AdamW's")


def test_files_that_are_none(tmp_path: Path, stepped: tuple[Any, dict[str, Any]]) -> None:
    model, content = stepped
    file = tmp_path / "state.pt"
    refused_state(file, model, "is not there")
    refused_state(tmp_path, model, "holds no optimiser's state; give a folder with optimizer.pt")
    torch.save({**content, "when": datetime.timedelta(1)}, file)
    refused_state(file, model, "pickled datetime.timedelta")
    file.write_bytes(b"rubbish")
    refused_state(file, model, "cannot be read")
    torch.save(torch.zeros(3), file)
    refused_state(file, model, "holds no state of an optimiser")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": []}, file)
    refused_state(file, model, "holds no state of an optimiser")
    torch.save(content, file)
    refused_state(file, a_model().requires_grad_(False), "trains nothing")


# --- the end of a schedule


def scheduled(model: Any) -> torch.optim.AdamW:
    """AdamW of two groups with rates of their own, at the end of a linear schedule of three steps."""
    p = trained(model)
    optimizer = torch.optim.AdamW([{"params": p[:2], "lr": 1e-4}, {"params": p[2:], "lr": 2e-5}], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 3)
    for _ in range(3):
        steps(model, optimizer, 1)
        schedule.step()
    return optimizer


def test_the_last_checkpoint_of_a_schedule_has_the_rates_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The direction is that of torch's own next step at the initial rates, group by group."""
    model, file = adapted(a_model()), tmp_path / "optimizer.pt"
    optimizer = scheduled(model)
    torch.save(optimizer.state_dict(), file)
    assert {g["lr"] for g in optimizer.param_groups} == {0.0}
    state = with_positive_rates(load_optimizer_state(file, model), file)
    said = capsys.readouterr().err
    assert (
        "optimizer.pt has learning rate 0, the end of its schedule; the rates that it began with, up to 0.0001" in said
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [state.hyperparameters[n].lr for n in names] == [1e-4] * 2 + [2e-5] * (len(names) - 2)
    theta = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    gradient = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k, (n, p) in enumerate(theta.items())
    }
    step = AdamWStep.from_gradient(theta, gradient, state)
    at_zero = AdamWStep.from_gradient(theta, gradient, load_optimizer_state(file, model))  # ratios survive eta 0
    for group, lr in zip(optimizer.param_groups, (1e-4, 2e-5), strict=True):
        group["lr"] = lr
    named = dict(model.named_parameters())
    for n in names:
        named[n].grad = gradient[n]
    optimizer.step()
    for n in names:
        torch.testing.assert_close(step.eta * step.direction[n], named[n].detach() - theta[n], rtol=1e-3, atol=3e-7)
        assert torch.equal(step.direction[n], at_zero.direction[n])


def test_a_rate_of_zero_without_an_initial_one_is_refused_or_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = adapted(a_model()), tmp_path / "optimizer.pt"
    optimizer = torch.optim.AdamW(trained(model), lr=0.0)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    state = load_optimizer_state(file, model)
    with pytest.raises(ToyError, match=r"^--model.optimizer_state: .* learning rate 0 .*--model.plan.reference_eta$"):
        with_positive_rates(state, file)
    assert with_positive_rates(state, file, 3e-4).lr == 3e-4
    assert "taken as 0.0003 in all of them" in capsys.readouterr().err
    live = torch.optim.AdamW(trained(model), lr=1e-5)
    steps(model, live)
    positive = read_state(live, model.named_parameters())
    assert with_positive_rates(positive, file, 3e-4) is positive  # a rate that is there is kept
