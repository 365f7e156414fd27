"""A process that has imported everything and plays cases in children of its own, one line of JSON for each.

It reads {"make": CONFIG} or {"case": ..., "limit": SECONDS, "box": FOLDER} and answers with one line. Children begin
with all imports done, and with nothing that another case has left.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from tests.fuzz.mutations import Case
from tests.fuzz.play import play
from tests.fuzz.templates import make


def import_everything() -> None:
    """Import what cases import, so that children need not."""
    from lightning_toys.commands.trainer.start import prepare

    prepare()
    import lightning_toys.commands.compare.command
    import lightning_toys.commands.sweep.command
    import lightning_toys.commands.trainer.toys_cli  # noqa: F401
    from lightning_toys.commands.experiments import import_all

    import_all()
    for name in (
        *("peft", "gguf", "gymnasium", "torch.utils.tensorboard", "matplotlib.pyplot", "sklearn.neighbors"),
        *("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "scipy.stats"),
    ):
        importlib.import_module(name)


def make_in_child(config: str, root: Path) -> int:
    """Make a template; returns the child's status."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            make(config, root)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def serve(root: Path) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    import_everything()
    print(json.dumps({"ready": os.getpid()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            answer = {"status": make_in_child(request["make"], root)}
        else:
            case = Case(**request["case"])
            answer = play(case, root, Path(request["box"]), request["limit"], request.get("keep", False)).to_json()
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
