"""Cases at random: what is changed, and into what. Everything is drawn from lists, so that a case stays small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.mutations import SPOILS, TENSORS, Case
from tests.fuzz.templates import BACKBONE, CONFIGS, settings_of

PLACES: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("places.yaml").read_text())
INTEGERS: list[Any] = [
    *(0, 1, 2, 3, 7, -1, -2, 10**9, 10**12, 10**18, 10**30, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    *(2**70, -(2**31), -(2**63), -(2**70)),
]
NUMBERS: list[Any] = [
    *(0.0, 0.5, 1.0, 1.5, -1.0, 1e-30, 1e-300, 5e-324, 1e6, 1e20, 1e30, 1e38, 3e38, 1e39, 1e300, 1.7e308, -1e300),
    *("<nan>", "<inf>", "<-inf>"),
]
WORDS: list[Any] = [
    *("", " ", "x", "flow", "null", "1e3", "-1", "éé", "é" * 200, "a" * 300, "../up", "a/b", ".", "..", "[/b]", "$(x)"),
    *("\x07", "a\nb", "1_000", "0x10", "yes", "!!python/name:os.system", "[1", "{a: 1}", "os.system", "builtins.print"),
    *("lightning_toys.flow_vs_regression.FlowVsRegression", "torch.nn.Linear", "Rotation", "=1+1", "\u202e", "🙂" * 60),
]
SHAPES: list[Any] = [
    *(None, True, False, [], {}, [0], [1, 2], [0, 0], ["a"], [[0]], [None], {"a": 1}, {"class_path": "os.system"}),
    *([2**63], [-1], [10**30], [0.5], ["<nan>"], [1e300], {"class_path": "Nowhere"}, {"init_args": {"a": 1}}),
    *(list(range(300)), "<delete>"),
]
# steps without end are the user's business: a run that takes years is none that hangs
PARTICULAR: dict[str, list[Any]] = {
    "trainer.max_steps": [0, 1, 2, 3, -1, -2, -5, 2**63, 2**70, 10**30, 1.5, "many", None, [2]],
    "trainer.max_epochs": [1, 2, -1, -2, 2**63, 2**70, 10**30, 1.5, "many", None],
    "trainer.min_steps": [0, 1, 2, -1, 2**70, "x", None],
    "trainer.min_epochs": [0, 1, 2, -1, 2**70, "x", None],
    "trainer.max_time": ["00:00:00:00", "x", {"seconds": 0}, {"days": 2**70}, "00:00:00:01", "99:99:99:99", 3, -1],
    "trainer.devices": [-3, -1, 0, 1, "auto", "x", 10**9, 2**31, 2**63, 2**70, [0], [0, 0], [7], [], "1,", "0,1", 1.5],
    "trainer.num_nodes": [-1, 0, 1, 2**31, 2**63, 10**9, "x", None, 1.5],
    "trainer.accelerator": ["cpu", "gpu", "cuda", "tpu", "mps", "hpu", "auto", "x", "", None, 3, ["cpu"], "CPU"],
    "trainer.strategy": [
        *("auto", "ddp", "ddp_spawn", "fsdp", "deepspeed", "single_device", "x", "", 3, "ddp_notebook", "single_xla"),
        *(
            "ddp_find_unused_parameters_true",
            "model_parallel",
            "fsdp_cpu_offload",
            "deepspeed_stage_3",
            "ddp_fork",
            None,
        ),
    ],
    "trainer.precision": [
        *(16, 32, 64, "16", "32", "64", "bf16", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "32-true", "64-true"),
        *("transformer-engine", "transformer-engine-float16", "x", "", None, 8, "64-mixed", [32], "32-true "),
    ],
    "trainer.profiler": ["simple", "advanced", "pytorch", "xla", "x", "", 3, None],
    "trainer.logger": [True, False, None, 3, "x", [], [None], "TensorBoardLogger", "CSVLogger"],
    "trainer.callbacks": [
        *([], [None], "x", 3, {"class_path": "Timer"}, [{"class_path": "LambdaCallback"}]),
        *([{"class_path": "LambdaCallback", "init_args": {"on_train_start": "builtins.print"}}], ["EarlyStopping"]),
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "x"}}],
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "eval/l2", "patience": 2**70}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2**70}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "elsewhere", "save_top_k": -2}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"filename": "é" * 200, "every_n_train_steps": 1}}],
        [{"class_path": "Timer", "init_args": {"duration": "99:00"}}],
        [{"class_path": "ModelSummary", "init_args": {"max_depth": 2**70}}],
        [{"class_path": "RichProgressBar"}],
        [{"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "/"}}],
    ],
    "trainer.default_root_dir": ["x", "", 3],
    "trainer.plugins": ["x", 3, [], "LightningEnvironment", "SLURMEnvironment", "BitsandbytesPrecision", [None]],
    "trainer.fast_dev_run": [True, False, 1, 2, 0, -1, "x", 2**70],
    "model.init_args.compile": [False, None, "x", 3, [True], "auto"],  # what is true takes a compiler's half a minute
}
NAMES = ["é" * 200, "é" * 127, "a" * 255, "a" * 200, "..", "a/b", "", " ", "a\nb", "-x", "$x", "[/b]"]
VARIANTS = ["é" * 200, "a" * 256, "..", "", "[draft]", "=1+1", "🙂" * 60, "\udcff"]
CKPTS = ["last", "best", "", ".", "..", "x" * 300, "/dev/null", "case.yaml", "logs", "http://x/y", "\udcff"]
FLAGS: list[Any] = [
    *(["--run.name", w] for w in NAMES), *(["--run.variant", w] for w in VARIANTS),
    *(["--ckpt_path", w] for w in CKPTS),
    ["--print_config", None], ["--print_config", "x"], ["--help", None], ["--version", None], ["--nonsense", "3"],
    ["--model", "Nowhere"], ["--data", "Nowhere"], ["--model", "os.system"], ["--model.nonsense", "3"], ["--", None],
    ["--config", "nowhere.yaml"], ["-c", "case.yaml"], ["-c", "logs"], ["--trainer", "{}"], ["--verbose", "x"],
    ["--weights_only", "false"], ["--seed_everything", "3"], ["--trainer.fast_dev_run", "true"], ["stray", None],
    ["--model.seeds", "[" * 300 + "]" * 300], ["--model.seeds+", "3"], ["--trainer.callbacks+", "Timer"],
]  # fmt: skip
COMPARE: list[Any] = [
    *(["--out", w] for w in ("out", "", "file", "case.yaml/x", "x" * 300, "case.yaml")),
    ["--baseline", "x"], ["--baseline", ""], ["--nonsense", "1"], ["nowhere", None], ["case.yaml", None],
    ["--out", None],
    *(["--html", w] for w in ("page.html", "out/page.html", "page", "", "file/page.html", "x" * 300 + ".html")),
]  # fmt: skip
VALUES: list[Any] = [
    *(
        "<delete>",
        None,
        True,
        0,
        -1,
        1,
        3,
        2**63,
        2**70,
        -(2**70),
        1.5,
        "<nan>",
        "<inf>",
        1e300,
        "",
        "x",
        "0.0.1",
        "2.6.6",
    ),
    *("99.0", "1.0rc1", "nonsense", [], {}, [0], [1, 2], ["a"], [[]], {"a": 1}, {"0": 0}, [2**70], "é" * 300, "a\nb"),
]
TABLES = [  # in the place of a metrics.csv
    *("step\n", "step,a\n1,2\n", "step,a\nx,2\n", "step,step\n1,1\n", "step,a\n1,nan\n", "step,a\n2,1\n1,1\n"),
    *("step,a\n-5,1\n", "step,a\n99999999999999999999999999,1\n", "step,a\n" + "9" * 5000 + ",1\n", "step,a\n2,x\n"),
    *("step,a\n1,2,3\n", "step,a\n1\n", 'step,"a\n', "a\n1\n", "step,a\r1,2\r", "step,a\n1e3,2\n", "step,a\n2,1e999\n"),
]
TEXTS = [
    *("", "{}", "[]", "3", "null", "a" * 9999, "[" * 3000, '{"a": NaN}', "\udcff\udcfe", "\0", '"', "model: {}\n"),
    *('{"metrics": 3}', '{"status": "done"}', '{"metrics": {"l2": 1}}', '{"done": true}', "{" * 9999, "- 1\n- 2\n"),
]
CONTENT: list[Any] = [*TABLES, *TEXTS]
MARKS = [": ", "[", "\t", "é", "\0", "- ", "&a ", "*a", "?", "\udcff", "!!python/name:os.system ", "{", "%", "|"]
ANY: SearchStrategy[Any] = st.sampled_from([*INTEGERS, *NUMBERS, *WORDS, *SHAPES])
CHEAP = ("flow_vs_regression", "bilevel")  # two cells of a sweep in some seconds
BATCH = 50  # cases drawn at a time, so that case k needs none but those of its batch
VERBS = (*["fit"] * 12, *["resume"] * 12, *["test"] * 5, *["validate"] * 2, *["predict"] * 2, *["compare"] * 6, "sweep")


def like(path: str, value: Any) -> SearchStrategy[Any]:
    """Return what is put in the place of a setting: mostly of its own kind, and far out."""
    if path in PARTICULAR:
        return st.sampled_from(PARTICULAR[path])
    if isinstance(value, bool):
        return st.sampled_from([not value, not value, None, 3, "x"])
    if isinstance(value, int):
        return st.sampled_from(INTEGERS) | st.sampled_from(INTEGERS) | ANY
    if isinstance(value, float):
        return st.sampled_from(NUMBERS) | st.sampled_from(NUMBERS) | ANY
    if isinstance(value, list):
        inner = like("", value[0]) if value else ANY
        return st.lists(inner, max_size=3) | st.lists(inner, max_size=3) | st.sampled_from(SHAPES)
    return ANY


def as_word(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, str):
        return value[1:-1] if value.startswith("<") and value.endswith(">") else value
    return json.dumps(value)


def spoils(words: list[str]) -> SearchStrategy[list[str]]:
    """Return what is done to a file: mostly an accident, sometimes another content."""
    accident = st.sampled_from([[what] for what in SPOILS if what != "word"])
    return accident | st.sampled_from([["word", word] for word in words])


@st.composite
def changes_of(draw: DrawFn, config: str, verb: str, root: Path) -> list[Any]:
    """Draw one change."""
    known = settings_of(config, root)
    kinds = ["config"] * 6 + ["setting"] * 2 + ["text", "flag"]
    if verb in ("resume", "test", "validate", "predict"):
        kinds += ["checkpoint"] * 8 + ["file"] * 3
    if verb == "resume":
        kinds += ["file"] * 4
    if verb == "compare":
        kinds = ["file"] * 3 + ["json"] * 6 + ["flag"]
    if config == BACKBONE and verb != "compare":
        kinds += ["model"] * 6 + ["model_json"] * 8
    kind = draw(st.sampled_from(kinds))
    if kind == "config":
        path = draw(st.sampled_from(sorted(known)))
        cut = draw(st.integers(0, 9)) == 0  # a whole branch
        path = path.rpartition(".")[0] or path if cut else path
        return ["config", path, draw(ANY if cut else like(path, known.get(path)))]
    if kind == "setting":
        path = draw(st.sampled_from(sorted(known)))
        flag = f"--{path.replace('.init_args', '').replace('.class_path', '')}"
        return ["flag", flag, as_word(draw(like(path, known[path]))).replace("\0", "")]
    if kind == "text":
        what = draw(st.sampled_from(["cut", "insert", "double", "drop"]))
        return ["text", what, draw(st.integers(0, 100)) / 100, draw(st.sampled_from(MARKS))]
    if kind == "flag":
        return ["flag", *draw(st.sampled_from(COMPARE if verb == "compare" else FLAGS))]
    if kind == "checkpoint":
        tensors = [f"tensor:{name}" for name in TENSORS]
        if draw(st.booleans()):
            where = draw(st.sampled_from(["state_dict/*", "state_dict/{}", "optimizer_states/0/state/0/{}", "toy/{}"]))
            return ["checkpoint", where.format(draw(st.integers(0, 9))), draw(st.sampled_from(tensors))]
        return ["checkpoint", draw(st.sampled_from(PLACES["stored"])), draw(st.sampled_from([*VALUES, *tensors]))]
    if kind == "file":
        return [
            "file",
            draw(st.sampled_from(PLACES["run_files"])),
            draw(st.sampled_from(SPOILS)),
            draw(st.sampled_from(CONTENT)),
        ]
    if kind == "json":
        return ["json", "results.json", draw(st.sampled_from(PLACES["results"])), draw(ANY | st.sampled_from(VALUES))]
    if kind == "model":
        return ["model", draw(st.sampled_from(PLACES["model_files"])), *draw(spoils(TEXTS))]
    json_files = [name for name in PLACES["model_files"] if name.endswith(".json") and "index" not in name]
    return ["model_json", draw(st.sampled_from(json_files)), draw(st.sampled_from(PLACES["model_keys"])), draw(ANY)]


@st.composite
def cases(draw: DrawFn, root: Path, configs: Sequence[str]) -> Case:
    """Draw a case: a configuration, a verb, and one change to four."""
    verb = draw(st.sampled_from(VERBS))
    config = draw(st.sampled_from([c for c in configs if c.startswith(CHEAP)] if verb == "sweep" else configs))
    changes = draw(st.lists(changes_of(config, verb, root), min_size=1, max_size=4))
    return Case(config, verb, changes)


def drawn(root: Path, number: int, batch: int, count: int = BATCH, configs: Sequence[str] = CONFIGS) -> list[Case]:
    """Return a batch of cases; a function of the two numbers."""
    found: dict[str, Case] = {}  # by its changes: many that are drawn at first are alike

    @seed(number * 1_000_003 + batch)
    @settings(
        max_examples=3 * count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(root, configs))
    def draw(case: Case) -> None:
        found.setdefault(json.dumps(case.changes), case)

    draw()
    return (list(found.values()) * count)[:count]
