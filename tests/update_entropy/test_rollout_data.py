"""A step's own responses out of a file: what is read, what is refused, and a probe of the very batch."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("gguf", "peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.checkpoints import load_adapter, load_backbone, load_tokenizer  # noqa: E402
from lightning_toys.update_entropy.derivatives import trainable_parameters  # noqa: E402
from lightning_toys.update_entropy.forward import evaluate  # noqa: E402
from lightning_toys.update_entropy.grpo import ClipRange  # noqa: E402
from lightning_toys.update_entropy.objective import Objective  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import save_optimizer_state  # noqa: E402
from lightning_toys.update_entropy.plan import Plan  # noqa: E402
from lightning_toys.update_entropy.probe import probe  # noqa: E402
from lightning_toys.update_entropy.probe_result import ProbeResult  # noqa: E402
from lightning_toys.update_entropy.report import write_tables  # noqa: E402
from lightning_toys.update_entropy.rollout_data import RolloutData, check_fits, warn_of_another_policy  # noqa: E402
from lightning_toys.update_entropy.rollout_files import read_rollouts, to_sequences  # noqa: E402
from lightning_toys.update_entropy.sequences import Sequences, pad_ids  # noqa: E402
from lightning_toys.update_entropy.training import sample_rollouts  # noqa: E402
from tests.conftest import REPO, Runner  # noqa: E402
from tests.update_entropy.test_checkpoints import VOCABULARY, a_model, a_tokenizer, adapted  # noqa: E402
from tests.update_entropy.test_cli import QUIET  # noqa: E402
from tests.update_entropy.test_objective import a_batch, a_policy, a_state  # noqa: E402
from tests.update_entropy.test_optimizer_files import steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")

EXAMPLE = REPO / "docs" / "examples" / "entropy" / "rollouts.jsonl"
ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [4, 5], "response_ids": [6, 7, 2], "reward": 1, "old_logp": [-0.5, -1.0, -2.0]},
    {"prompt_ids": [4, 5], "response_ids": [8], "reward": 0.5, "old_logp": [-0.1]},
    {"prompt_ids": [9], "response_ids": [6, 2], "reward": 0, "old_logp": [0.0, -3]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    a_model("llama").save_pretrained(folder)
    a_tokenizer(folder)
    return load_tokenizer(folder)


def test_jsonl_and_npz_are_the_same_batch(tmp_path: Path, tokenizer: Any) -> None:
    found = to_sequences(read_rollouts(write(tmp_path / "u.jsonl", ROWS), "--data.file"), tokenizer)
    assert found == Sequences(
        [[4, 5], [4, 5], [9]], [[6, 7, 2], [8], [6, 2]], [0, 0, 1], [1.0, 0.5, 0.0], [], [r["old_logp"] for r in ROWS]
    )
    old = np.zeros((3, 4))
    for i, row in enumerate(ROWS):
        old[i, : len(row["old_logp"])] = row["old_logp"]
    np.savez(
        tmp_path / "u.npz", prompt_ids=pad_ids(found.prompts), response_ids=pad_ids(found.responses),
        reward=np.array([1, 0.5, 0]), old_logp=old, allow_pickle=False,
    )  # fmt: skip
    assert to_sequences(read_rollouts(str(tmp_path / "u.npz"), "--data.file"), tokenizer) == found
    names = {"response_ids": "completion_ids", "old_logp": "old_per_token_logps", "prompt_ids": "prompt_ids"}
    others = [{names.get(k, k): v for k, v in row.items()} | {"advantages": 0.25, "group": 7} for row in ROWS]
    trl = to_sequences(read_rollouts(write(tmp_path / "trl.jsonl", others), "--data.file"), tokenizer)
    assert trl.advantages == [0.25] * 3
    assert trl.prompt_index == [0, 0, 0]
    assert (trl.responses, trl.old_logp) == (found.responses, found.old_logp)


def test_texts_are_in_the_model_s_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "ab=", "completion": "cd", "advantage": 1.5},
        {"prompt": [{"role": "user", "content": "ab"}], "completion": "c", "advantage": -1.5},
    ]
    found = to_sequences(read_rollouts(write(tmp_path / "t.jsonl", rows), "--data.file"), tokenizer)
    assert found.prompts[0] == tokenizer.encode("ab=")
    assert found.prompts[1] == tokenizer.encode("ab\n")  # no template: a line
    assert found.responses == [[*tokenizer.encode("cd"), 2], [*tokenizer.encode("c"), 2]]
    assert found.advantages == [1.5, -1.5]
    assert all(math.isnan(r) for r in found.rewards)


class Letters:
    """A tokenizer that writes a token as a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("given", [False, True])
def test_a_probe_s_file_is_its_batch_under_any_loss(given: bool, tmp_path: Path) -> None:
    """Ratios come back; advantages only if they came with the batch, so that another scale or baseline is another."""
    model = a_policy()
    batch = a_batch(model)
    if given:
        batch = replace(batch, advantages=[0.5, -1.0, 0.25, 0.0, 2.0, -0.5, 1.0])
    evaluation = replace(batch, old_logp=[], advantages=[])
    plan = Plan(etas=[1e-3], per_sequence=False, second_order=False)
    state = a_state(trainable_parameters(model))

    def a_probe(u: Sequences, scale: Any) -> ProbeResult:
        o = Objective.from_flags("grpo", None, scale, ClipRange(0.2, 0.3))
        return probe(model, u, [evaluation], state, plan, 0.5, 0.7, objective=o)

    first = a_probe(batch, "none")
    write_tables(tmp_path, first, Letters())  # type: ignore[arg-type]
    back = to_sequences(read_rollouts(str(tmp_path / "sequences.npz"), "--data.file"), Letters())  # type: ignore[arg-type]
    with np.load(tmp_path / "sequences.npz") as file:
        assert Sequences.from_arrays(file) == batch
    assert replace(back, prompt_index=batch.prompt_index) == batch
    if given:  # they are what they are under any scale, and the ids, rewards and ratios are above
        return
    one, two = (a_probe(u, "group").evaluations[0] for u in (batch, back))
    assert one.leave_one_out is not None
    assert two.leave_one_out is not None
    torch.testing.assert_close(two.leave_one_out, one.leave_one_out, rtol=1e-12, atol=1e-14)
    assert two.update_se == pytest.approx(one.update_se, rel=1e-12)
    assert two.derivatives == one.derivatives
    assert one.derivatives["full"][0] != pytest.approx(first.evaluations[0].derivatives["full"][0], rel=1e-3)


WRONG: dict[str, tuple[Any, str]] = {
    "kind": ("x.csv", "x.csv is not read; give .jsonl"),
    "missing": ("nowhere.jsonl", "nowhere.jsonl is not there"),
    "no npz": (b"PK", "is no npz file of numbers"),
    "one": (ROWS[:1], "has 1 responses; give two or more"),
    "no response": ([{"prompt_ids": [1], "reward": 1}] * 2, "line 1 has no response_ids or completion_ids"),
    "empty": ([{**ROWS[0], "response_ids": []}] * 2, "its response is neither a text nor token ids"),
    "negative": ([{**ROWS[0], "prompt_ids": [-1]}] * 2, "its prompt is neither a text nor token ids"),
    "floats": ([{**ROWS[0], "prompt_ids": [1.5]}] * 2, "its prompt is neither a text nor token ids"),
    "reward": ([{**ROWS[0], "reward": "high"}] * 2, "its reward is high; give a finite number"),
    "truth": ([{**ROWS[0], "reward": True}] * 2, "its reward is True; give a finite number"),
    "length": ([{**ROWS[0], "old_logp": [-1.0]}] * 2, "its old_logp has 1 numbers, its response 3 tokens"),
    "positive": ([{**ROWS[0], "old_logp": [0.5, 0, 0]}] * 2, "its old_logp is not allowed; give finite numbers"),
    "text": ([{"prompt": "a", "response": "b", "reward": 1, "old_logp": [0]}] * 2, "old_logp of a text"),
    "uneven": ([ROWS[0], {k: v for k, v in ROWS[1].items() if k != "old_logp"}], "line 2 has no old_logp, unlike"),
    "worth": ([{k: v for k, v in ROWS[0].items() if k != "reward"}] * 2, "has neither reward nor advantage"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_responses_is_refused(name: str, tmp_path: Path) -> None:
    content, said = WRONG[name]
    path = tmp_path / "u.jsonl"
    if isinstance(content, str):
        path = tmp_path / content
        if content.endswith(".csv"):
            path.write_text("a\n1\n")
    elif isinstance(content, bytes):
        path = tmp_path / "u.npz"
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(ToyError) as caught:
        RolloutData(str(path))
    assert said in str(caught.value)
    assert str(caught.value).startswith("--data.file: ")
    assert "\n" not in str(caught.value)


def test_parquet_gives_the_responses_that_jsonl_gives(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "ab"}]
    for rows in (ROWS, [{"prompt": chat, "completion": "c", "advantage": i - 0.5, "group": "x"} for i in range(2)]):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "u.parquet")
        found = read_rollouts(str(tmp_path / "u.parquet"), "--data.file")
        assert found == read_rollouts(write(tmp_path / "u.jsonl", rows), "--data.file")
        assert len(found) == len(rows)
    pq.write_table(pa.Table.from_pylist([ROWS[0], {**ROWS[1], "response_ids": None}]), tmp_path / "u.parquet")
    with pytest.raises(ToyError, match=r"^--data.file: .*u.parquet row 2 has no response_ids or completion_ids"):
        RolloutData(str(tmp_path / "u.parquet"))


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fine = {"prompt_ids": np.ones((2, 3), int), "response_ids": np.ones((2, 3), int), "reward": np.ones(2)}
    for changes, said in (
        ({"reward": np.ones(3)}, r"reward has shape \(3,\) of float64; give \(2,\)"),
        ({"response_ids": np.ones((2, 3))}, "response_ids has shape .* of float64"),
        ({"prompt_ids": np.ones(2, int)}, r"prompt_ids has shape \(2,\)"),
    ):
        np.savez(tmp_path / "u.npz", allow_pickle=False, **{**fine, **changes})
        with pytest.raises(ToyError, match=f"^--data.file: .*{said}"):
            RolloutData(str(tmp_path / "u.npz"))
    np.savez(tmp_path / "u.npz", reward=np.ones(2), allow_pickle=False)
    with pytest.raises(ToyError, match="has no prompt_ids"):
        RolloutData(str(tmp_path / "u.npz"))


def test_what_the_model_does_not_read_is_refused(tmp_path: Path) -> None:
    model = a_model("llama")
    fine = Sequences([[3]], [[VOCABULARY - 1]], [0])
    check_fits(fine, model, "--data.file: u")
    with pytest.raises(ToyError, match=rf"--data.file: u has the token {VOCABULARY}; the model has {VOCABULARY}"):
        check_fits(Sequences([[3]], [[VOCABULARY]], [0]), model, "--data.file: u")
    with pytest.raises(ToyError, match=r"--data.file: u has a text of 65 tokens; the model reads 64"):
        check_fits(Sequences([[3] * 60], [[4] * 6], [0]), model, "--data.file: u")
    with pytest.raises(ToyError, match=r"^--data: RolloutData has a step's responses and nothing to train on"):
        RolloutData(write(tmp_path / "u.jsonl", ROWS)).setup("fit")
    with pytest.raises(ToyError, match=r"--data.file: null is not allowed"):
        RolloutData()


def test_prompts_of_the_file_are_sampled_from(tmp_path: Path, tokenizer: Any) -> None:
    data = RolloutData(write(tmp_path / "u.jsonl", ROWS))
    data.tokenizer = tokenizer  # type: ignore[misc]
    prompts = [data.encode_prompt(p) for p in data.problems(0, 0, "x", 5)]
    assert {tuple(p) for p in prompts} == {(4, 5), (9,)}
    assert sorted(map(tuple, prompts[:2])) == [(4, 5), (9,)]  # each once before any comes again
    assert data.max_response_length + 4 == 3
    assert data.given_evaluation(a_model("llama")) is None
    both = RolloutData(data.file, evaluation="update")
    both.tokenizer = tokenizer  # type: ignore[misc]
    assert both.given_evaluation(a_model("llama")) == both.given_update(a_model("llama"))
    # a prompt that comes again is the same cluster, whatever the number of its draw
    drawn = sample_rollouts(a_model("llama"), data, 0, 0, "evaluation", range(5), 2, 1.0, 5, [2])
    numbers = data.clusters(drawn)
    assert len(set(drawn.prompt_index)) == 5
    assert len(numbers) == 10
    assert set(zip(numbers, map(tuple, drawn.prompts), strict=True)) in (
        {(0, (4, 5)), (1, (9,))}, {(1, (4, 5)), (0, (9,))},
    )  # fmt: skip


def test_log_probabilities_of_another_policy_in_e_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model("llama")
    ids = Sequences([r["prompt_ids"] for r in ROWS], [r["response_ids"] for r in ROWS], [0, 0, 1])
    logp = evaluate(model, ids, 0.7).logp
    own = replace(ids, old_logp=[logp[i, :n].tolist() for i, n in enumerate(ids.lengths)])
    assert warn_of_another_policy(model, ids, 0.7) == 0
    assert warn_of_another_policy(model, own, 0.7) < 1e-6
    assert "old_logp" not in capsys.readouterr().err
    own.old_logp[2][1] -= 0.25
    assert warn_of_another_policy(model, own, 0.7) == pytest.approx(0.25, abs=1e-6)
    assert warn_of_another_policy(model, own, 1.0) != pytest.approx(0.25, abs=1e-3)
    assert (
        "--data.evaluation: its old_logp are up to 0.25 nats a token away from the policy's" in capsys.readouterr().err
    )


@pytest.fixture
def client(runner: Runner, tmp_path: Path) -> tuple[Runner, tuple[str, ...]]:
    """Somebody's backbone, adapter and AdamW, and the flags that name them."""
    a_model("llama").save_pretrained(tmp_path / "base")
    a_tokenizer(tmp_path / "base")
    model = adapted(load_backbone(tmp_path / "base", torch.float32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    steps(model, optimizer)
    model.save_pretrained(tmp_path / "adapter")
    save_optimizer_state(optimizer, model, tmp_path / "adamw.pt")
    flags = (
        "--model.backbone", str(tmp_path / "base"), "--model.adapter", str(tmp_path / "adapter"),
        "--model.optimizer_state", str(tmp_path / "adamw.pt"), "--model.plan.prompts", "2", "--model.plan.group", "3",
        "--model.plan.eval_prompts", "4", "--model.plan.etas", "[0.001]", "--model.eval_prompts", "4",
        "--model.plan.counterfactuals", "false", "--model.plan.second_order", "false", *QUIET,
    )  # fmt: skip
    return Runner(runner.root, runner.capture, "update_entropy", ()), flags


def summary(entropy: Runner, name: str) -> Any:
    return json.loads((entropy.folder("smollm2", name) / "probe" / "seed_0" / "summary.json").read_text())


def table(entropy: Runner, name: str) -> list[dict[str, str]]:
    with (entropy.folder("smollm2", name) / "probe" / "seed_0" / "sequences.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_a_probe_of_its_own_files_is_the_same_probe(client: tuple[Runner, tuple[str, ...]], tmp_path: Path) -> None:
    """U and E come back as token ids: every number is that of the probe that sampled them."""
    entropy, flags = client
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "answer": "a"}) + "\n" for p in ("ab", "cd=", "ef+g")))
    sampled = ("--data", "PromptData", "--data.file", str(prompts), "--data.reward", f"{__name__}.vowels",
               "--data.longest", "6")  # fmt: skip
    flags = tuple("true" if flags[i - 1] == "--model.plan.counterfactuals" else x for i, x in enumerate(flags))
    entropy.ok("test", "smollm2", *flags, *sampled, "--run.name", "sampled")
    files = entropy.folder("smollm2", "sampled") / "probe" / "seed_0"
    given = ("--data", "RolloutData", "--data.file", str(files / "sequences.npz"), "--data.evaluation")
    entropy.ok("test", "smollm2", *flags, *given, str(files / "eval_00_sequences.npz"), "--run.name", "given")
    one, two = (summary(entropy, n) for n in ("sampled", "given"))
    assert (one["draws_of_update"] >= 1, two["draws_of_update"]) == (True, 0)
    for a, b in zip(table(entropy, "sampled"), table(entropy, "given"), strict=True):
        assert (a["response"], a["reward"]) == (b["response"], b["reward"])
        for name in ("influence", "slope_without", "advantage"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-6, abs=1e-9)
    (x,), (y,) = one["evaluations"], two["evaluations"]
    assert y["slopes"]["full"]["value"] == pytest.approx(x["slopes"]["full"]["value"], rel=1e-9)
    assert y["slopes"]["full"]["update_se"] == pytest.approx(x["slopes"]["full"]["update_se"], rel=1e-6)
    assert y["changes"]["full"]["0.001"]["value"] == pytest.approx(x["changes"]["full"]["0.001"]["value"], rel=1e-9)
    assert "reward" not in json.loads((entropy.folder("smollm2", "given") / "results.json").read_text())["metrics"]
    # E sampled from U's prompts
    entropy.ok("test", "smollm2", *flags, *given[:4], "--run.name", "drawn")
    drawn = summary(entropy, "drawn")["evaluations"][0]
    assert drawn["sequences"] == 4
    assert drawn["prompts"] == len({r["prompt"] for r in table(entropy, "given")}) == 2  # not 4, the draws
    code, err = entropy.code("fit", "smollm2", "--model.backbone", flags[1], *given[:4], "--run.name", "x")
    assert code == 2
    assert "RolloutData has a step's responses and nothing to train on" in err


def vowels(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    return [sum(c in "aeiou" for c in x) + 0.1 * len(x) for x in responses]


@pytest.mark.slow
def test_the_example_file_with_a_penalty_and_a_bonus(client: tuple[Runner, tuple[str, ...]], tmp_path: Path) -> None:
    entropy, flags = client
    given = ("--data", "RolloutData", "--data.file", str(EXAMPLE), "--data.evaluation", "update")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    losses = ("--model.loss", "dapo", "--model.scale_rewards", "group")
    said = entropy.ok("test", "smollm2", *flags, *given, *losses, "--run.name", "plain")
    assert "the loss that the step is of: dapo" in said
    rows = table(entropy, "plain")
    assert [r["response"] for r in rows][:2] == ["sixlesstwoisfour", "shehasfive"]  # the tokenizer has no space
    assert [int(r["prompt_number"]) for r in rows] == [0, 0, 0, 1, 1, 1]
    std = float(np.std([1, 0, 1], ddof=1)) + 1e-4
    assert float(rows[0]["advantage"]) == pytest.approx((1 / 3) / std)
    more = ("--model.beta", "0.1", "--model.entropy_coef", "0.5")
    said = entropy.ok("test", "smollm2", *flags, *given, *losses, *more, "--run.name", "more")
    assert "KL penalty 0.1; entropy bonus 0.5" in said
    loss = summary(entropy, "more")["loss"]
    assert (loss["beta"], loss["entropy_coef"]) == (0.1, 0.5)
    slopes = [summary(entropy, n)["evaluations"][0]["slopes"]["grad"]["value"] for n in ("plain", "more")]
    assert slopes[1] > slopes[0]  # the bonus raises the entropy
    same = write(
        tmp_path / "same.jsonl", [{**r, "reward": 1.0} for r in map(json.loads, EXAMPLE.read_text().splitlines())]
    )
    code, err = entropy.code("test", "smollm2", *flags, *given[:3], same, *losses, "--run.name", "same")
    assert code == 2
    assert "--data.file: every advantage in it is 0" in err


@pytest.mark.slow
def test_old_log_probabilities_change_the_step(client: tuple[Runner, tuple[str, ...]], tmp_path: Path) -> None:
    """Those of the policy itself change nothing; a ratio beyond its range takes a token's gradient away."""
    entropy, flags = client
    model = load_adapter(load_backbone(tmp_path / "base", torch.float32), tmp_path / "adapter")
    ids = Sequences([r["prompt_ids"] for r in ROWS], [r["response_ids"] for r in ROWS], [0, 0, 0])
    logp = evaluate(model, ids).logp
    norms: dict[str, float] = {}
    said: dict[str, str] = {}
    for name in ("none", "own", "beyond"):
        rows = [{k: v for k, v in r.items() if k != "old_logp"} | {"group": 0} for r in ROWS]
        for i, row in enumerate(rows):
            if name != "none":
                below = 1.0 if name == "beyond" and row["reward"] == 1 else 0.0  # its advantage is above 0
                row["old_logp"] = [float(x) - below for x in logp[i, : len(row["response_ids"])]]
        given = ("--data", "RolloutData", "--data.file", write(tmp_path / f"{name}.jsonl", rows))
        said[name] = entropy.ok("test", "smollm2", *flags, *given, "--data.evaluation", "update", "--run.name", name)
        norms[name] = summary(entropy, name)["gradient_norm"]
    assert norms["own"] == pytest.approx(norms["none"], rel=1e-5)
    assert ["its old_logp are up to 1 nats" in said[name] for name in norms] == [False, False, True]
    assert norms["beyond"] < 0.95 * norms["none"]
