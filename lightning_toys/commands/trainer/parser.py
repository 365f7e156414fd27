"""The parser, whose errors are one line with the flag, the value and what is allowed."""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from lightning_toys.commands.shipped import by_name
from lightning_toys.commands.trainer.arguments import SECTIONS, flags
from lightning_toys.commands.trainer.own_classes import chosen_in, defined_here
from lightning_toys.errors import did_you_mean


def all_subclasses(base: type) -> list[type]:
    """Return every imported subclass of ``base``, of subclasses too."""
    children: list[type] = base.__subclasses__()
    return [c for child in children for c in (child, *all_subclasses(child))]


def class_names() -> set[str]:
    """Return the names of the classes that a flag can name by its short name: what the experiments export."""
    bases = (LightningModule, LightningDataModule, Callback, Logger)
    names = {c.__name__ for base in bases for c in all_subclasses(base)}
    for module in experiments():
        names |= set(getattr(module, "__all__", ()))
    return {n for n in names if not n.startswith("_")}


def fitting(names: set[str], message: str) -> set[str]:
    """Return those names of exported classes that have a base which a message of jsonargparse asks for; all if none."""
    bases = tuple(defined_class(path) for path in re.findall(r"<class '(lightning_toys[\w.]+)'>", message))
    # two experiments may export classes of one name
    exported = [(n, getattr(m, n, None)) for m in experiments() for n in names & set(getattr(m, "__all__", ()))]
    found = {n for n, kind in exported if isinstance(kind, type) and bases and issubclass(kind, bases)}
    return found or names


def experiments() -> list[ModuleType]:
    """Return the experiments' packages that are imported."""
    return [m for name, m in list(sys.modules.items()) if name.startswith("lightning_toys.") and name.count(".") == 1]


def defined_class(path: str) -> type:
    """Return an imported class by its path."""
    module, _, name = path.rpartition(".")
    found: type = getattr(sys.modules[module], name)
    return found


def option_names(parser: LightningArgumentParser) -> set[str]:
    """Return every flag that the parser and the experiments' classes take."""
    names = {s for action in parser._actions for s in action.option_strings if s.startswith("--")}
    for action in parser._actions:  # of the verbs
        for verb in action.choices.values() if isinstance(action.choices, dict) else ():
            names |= {s for inner in verb._actions for s in inner.option_strings if s.startswith("--")}
    return names | class_options()


def class_options() -> set[str]:
    """Return every flag of the experiments' classes that are imported."""
    import inspect

    from lightning_toys.training.data import ToyDataModule
    from lightning_toys.training.module import ToyModule

    names: set[str] = set()
    for prefix, base in (("--model", ToyModule), ("--data", ToyDataModule)):
        for cls in all_subclasses(base):
            for name, parameter in inspect.signature(cls).parameters.items():
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "self":
                    continue
                names.add(f"{prefix}.{name}")
                names |= {f"{prefix}.{name}.{inner}" for inner in inner_options(parameter.annotation, cls)}
    return names


def inner_options(annotation: Any, cls: type) -> set[str]:
    """Return the fields of the dataclasses, and the parameters of the classes, that an annotation names."""
    import dataclasses
    import inspect

    found: set[str] = set()
    for word in re.findall(r"\w+", str(annotation)):
        inner = next((x for c in cls.__mro__ if (x := getattr(sys.modules[c.__module__], word, None))), None)
        if isinstance(inner, type) and inner.__module__.startswith("lightning_toys"):
            if dataclasses.is_dataclass(inner):
                found |= {f.name for f in dataclasses.fields(inner)}
            for sub in [inner, *all_subclasses(inner)]:
                found |= {p for p in inspect.signature(sub).parameters if p not in ("args", "kwargs")}
    return found


TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "a string"}


def plain_enum(dumper: yaml.SafeDumper, value: enum.Enum) -> yaml.Node:
    """Write an enumeration's member, such as the default of Timer's ``interval``, as its value."""
    return dumper.represent_data(value.value)


yaml.SafeDumper.add_multi_representer(enum.Enum, plain_enum)


class Refused(SystemExit):
    """A parser's error. No Exception: jsonargparse takes those for one branch of a Union that did not fit."""


class ToyParser(LightningArgumentParser):
    """A parser whose errors are one line with the flag, the value and what is allowed."""

    command: Sequence[str] = ()  # the words being parsed, for naming the flag in an error
    files: Mapping[str, Any] = {}  # and what the configuration files say, for naming the file

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # or --trainer.max_step would be max_steps, in silence

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turn jsonargparse's report into one line."""
        raise Refused(explain(message, type(self).command, self))


def flag_for(key: str, value: str | None, given: dict[str, str | None]) -> str:
    """Return the flag on the command line that set ``key`` (to ``value``, where that is known), or the key itself."""
    last = key.split(".")[-1]
    for name, given_value in given.items():
        if name.split(".")[-1].lstrip("-") == last and (value is None or given_value is None or value in given_value):
            return name
    return f"--{key}" if key.startswith(SECTIONS) else f"{key!r} in the configuration"


def explain(message: str, command: Sequence[str], parser: LightningArgumentParser) -> str:
    """Say in one line what is wrong with the command line, or in which of its files."""
    line = reason(message, command, parser)
    m = re.match(r"--([\w.]+)(?=: )|'([^']+)' in the configuration", line)
    if not m or m[0] in flags(command) or re.search(r" \(in .*\)$", line):
        return line
    name = next((f for f, c in reversed(list(ToyParser.files.items())) if (m[1] or m[2]) in key_tails(c)), None)
    if name is None:
        return line
    return f"{line} (in {name})" if m[1] else line.replace("the configuration", name, 1)


def key_tails(content: Any, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Return the ends of every key's path in a configuration, as written and as flags have it."""
    for key, value in content.items() if isinstance(content, dict) else ():
        path = (*above, str(key))
        for parts in (path, tuple(p for p in path if p not in ("init_args", "class_path"))):
            yield from (".".join(parts[i:]) for i in range(len(parts)))
        yield from key_tails(value, path)


def two_classes(name: str, paths: Sequence[str], command: Sequence[str]) -> str:
    """Say that a last name is that of several imported classes, and where it stands."""
    said = f"{name!r} is not allowed, it is {len(paths)} classes here; give {' or '.join(paths)}"
    if flag := next((f for f, value in flags(command).items() if value == name), ""):
        return f"{flag}: {said}"
    for file, content in reversed(list(ToyParser.files.items())):
        for place, kind in chosen_in(content):
            if kind == name:
                return f"--{'.'.join(place)}: {said} (in {file})"
    return f"class_path: {said}"


def reason(message: str, command: Sequence[str], parser: LightningArgumentParser) -> str:
    """Say in one line what jsonargparse reports in many."""
    if m := re.search(r"^\s*-?\s*(--[\w.]+(?:, --[\w.]+)*: .*)$", message, re.MULTILINE):
        return m[1]  # a check of ours, reported through jsonargparse
    if m := re.search(
        r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: (.*)\.", message
    ):
        return two_classes(m[1], m[2].split(", "), command)
    if re.search(r"required: \w+\.model$", message):
        return "-c: no experiment chosen; give -c NAME (`lightning-toys list` shows the shipped ones) or --model CLASS"
    if m := re.search(r"the following arguments are required: ([\w, ]+)$", message.strip()):
        chosen = {n.rstrip("+"): v for n, v in flags(command).items() if v and re.fullmatch(r"(\w+\.)*[A-Z]\w+", v)}
        classes = [(n, v) for n, v in chosen.items() if not n.startswith("--run.")]
        if len(classes) == 1:  # else jsonargparse does not say which
            return f"{classes[0][0]}: {classes[0][1]} needs {m[1]}; give {classes[0][0]}.{m[1]}"
        return f"--model, --data: the class chosen has no {m[1]}, which it needs; give it"
    given = flags(command)
    if m := re.search(r"[uU]nrecognized arguments: (\S+)", message):
        name = m[1].split("=")[0]
        # jsonargparse takes the head off flags of a chosen class
        name = next((f"--{head}.{name[2:]}" for head in ("model", "data") if f"--{head}.{name[2:]}" in given), name)
        if not name.startswith("-") and (by_name(name) or Path(name).is_file()):
            return f"{name}: a configuration is given by its flag; did you mean -c {name}?"
        known = option_names(parser)
        if name in known:
            return f"{name}: the class chosen by {name.partition('.')[0]} does not take it"
        return f"{name}: no such flag{habit(name, known) or suggest(name, known)}"
    unknown = (
        r"[Oo]ption '(.+?)' is not accepted|accept option '(.+?)'|Key '(.+?)' is not expected",
        r'No action for key "(\S+?)"',
    )
    if m := re.search("|".join(unknown), message):
        key = next(g for g in m.groups() if g)
        name = flag_for(key, None, given)
        known = option_names(parser)
        hint = suggest(name, known) if name.startswith("--") else suggest_key(key, known)
        if f"did you mean {name}?" in hint:  # right for the class that another flag has to choose
            owner = name.rpartition(".")[0]
            if owner in ("--model", "--data") or owner in given:
                return f"{name}: the class chosen by {owner} does not take it"
            return f"{name}: the class chosen does not take it; give {owner} NAME before it"
        if f"did you mean {key!r}?" in hint:
            return f"{name}: the class chosen does not take it"
        return f"{name}: no such option{habit(name, known) or hint}"
    if m := re.search(r"pytorch\.loggers\.(?:\w+\.)?(\w+Logger)'", message):
        return f"--trainer.logger: {m[1]} cannot be used: {reason_of(m[1])}"
    key_match = re.search(r'(?:Parser key|key) "([^"]+)"', message)
    key = key_match[1] if key_match else ""
    if m := re.search(r"Expected a dot import path string: (\S+)", message):
        own = defined_here(m[1]) if m[1].isidentifier() else ""
        own = own or (m[1].replace(":", ".") if ":" in m[1] else "")
        hint = f"; did you mean {own!r}?" if own else suggest(m[1], fitting(class_names(), message))
        return f"{flag_for(key, m[1], given)}: no class {m[1]!r}{hint}"
    if m := re.search(r"typing\.Literal\[(.*?)\]\. Got value: (.*)", message):
        options = [o.strip().strip("'\"") for o in m[1].split(",")]
        value = m[2].strip()
        hint = did_you_mean(value, options)
        return f"{flag_for(key, value, given)}: {value!r} is not allowed; give one of {', '.join(options)}{hint}"
    if m := re.search(r"Expected an? (.*?)\. Got value: (.*)", message):
        kind = re.sub(r"<class '(.*?)'>", r"\1", m[1])
        return f"{flag_for(key, m[2].strip(), given)}: {m[2].strip()!r} is not allowed; give {article(kind)}"
    if said := constructor_error(message, given):
        return said
    if m := re.search(r"does not correspond to a subclass of (\w+)", message):
        value = next((v[1].strip() for v in [re.search(r"Given value: (.*)", message)] if v), "the class")
        base = BASES.get(m[1], m[1])
        return f"{flag_for(key, value, given)}: {value!r} is not allowed; give a class with {base} for its base"
    if m := re.search(r"Given value: (.*)", message):
        wanted = re.findall(r"Expected an? (.*)", message)
        names = [re.sub(r"<class '(.*?)'>", r"\1", w).split(". Got")[0] for w in wanted]
        names = ["MODULE.CLASS" if w.startswith("path but") else w for w in names]
        kinds = " or ".join(dict.fromkeys(article(k) if k in TYPES or "Sequence" in k else k for k in names))
        return f"{flag_for(key, m[1].strip(), given)}: {m[1].strip()!r} is not allowed; give {kinds or 'another value'}"
    return " ".join(message.split())


def null_keys(content: Any) -> Iterator[str]:
    """Return the keys that a configuration sets to null."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if value is None:
            yield str(key)
        yield from null_keys(value)


def constructor_error(message: str, given: dict[str, str | None]) -> str:
    """Return what a class's constructor has to say, among what jsonargparse reports of its union; empty if nothing.

    A constructor that meets null where it wants a number says little: the settings given as null are named too.
    """
    known = ("Expected", "Does not validate", "Import path", "Not a valid", "Discarded", "Problem with")
    for line in re.finditer(r"^\s*- (\S.*)$", message, re.MULTILINE):
        made = re.search(r"Given value: Namespace\(class_path='([\w.]+)'", message[line.end() :])
        if made and not line[1].startswith(known):
            said = f"{made[1]} cannot be made: {line[1].strip()}"
            null = {k for content in ToyParser.files.values() for k in null_keys(content)}
            null |= {n.rpartition(".")[2] for n, v in given.items() if v in ("null", "None")}
            named = [k for k in re.findall(r"\b(\w+)=None", message[line.end() :]) if k in null]
            return f"{said} (given as null: {', '.join(dict.fromkeys(named))})" if named else said
    return ""


BASES = {"LightningModule": "ToyModule", "LightningDataModule": "ToyDataModule"}
HABITS = {  # what people give elsewhere, by the flag's last word, and what it is here
    "optimizer": "an experiment has its own: give --model.lr, --model.weight_decay, or what `--model.help CLASS` lists",
    "lr_scheduler": "an experiment has its own rate: give --model.lr, or --model.lr_decay cosine where it is taken",
    "no_warm": "give --model.solver.warm_start false",
    "no_double": "give --model.double_q false",
    "learning_rate": "give --model.lr",
    "gpus": "give --trainer.accelerator gpu --trainer.devices N",
    "resume": "give --ckpt_path last",
    "resume_from_checkpoint": "give --ckpt_path last",
    "seed": "give --model.seeds '[0,1,2]'",
    "epochs": "give --trainer.max_epochs",
    "num_epochs": "give --trainer.max_epochs",
    "steps": "give --trainer.max_steps",
    "num_train_steps": "give --trainer.max_steps",
    "num_steps": "give --trainer.max_steps",
    "agent_type": "give --model.agent",
    "env_name": "give --model.env",
    "output_dir": "give --run.root",
    "device": "give --trainer.accelerator",
}


def habit(name: str, known: Iterable[str]) -> str:
    """Return a hint for a flag that is known elsewhere by another name, or here with a prefix."""
    last = name.rpartition(".")[2].lstrip("-")
    if last in HABITS and (name.count(".") == 0 or last.startswith("no_") or last == "learning_rate"):
        return f"; {HABITS[last]}"
    if name.count(".") == 0:
        same = sorted((k for k in known if k.rpartition(".")[2] == last and "." in k), key=lambda k: k.count("."))
        if same:
            return f"; did you mean {same[0]}?"
    return ""


def reason_of(logger: str) -> str:
    """Say why a logger of Lightning's cannot be made: usually its package is not installed."""
    import lightning.pytorch.loggers as known

    try:
        getattr(known, logger)()
    except ModuleNotFoundError as error:
        return " ".join(str(error).split())
    except Exception as error:
        if "sqlite:///" in str(error):  # MLflow 3, whose runs are no longer files by default
            return "MLflow 3 keeps its runs in a database; give --trainer.logger.tracking_uri sqlite:///mlflow.db too"
        return f"{' '.join(str(error).split())}; give it as --trainer.logger {logger} with --trainer.logger.* settings"
    return "give --trainer.logger.* settings that it takes"


def article(kind: str) -> str:
    """Name a Python type in words."""
    if "Sequence" in kind or "List" in kind or "list" in kind:
        return "a list such as '[0, 1]'"
    return TYPES.get(kind, f"a value of type {kind}")


def suggest_key(key: str, known: Iterable[str]) -> str:
    """Return the nearest name to a file's key as a hint: of what stands beside it there, else of all options."""
    tails = (tail.split(".") for content in ToyParser.files.values() for tail in key_tails(content))
    above = {parts[0] for parts in tails if len(parts) == 2 and parts[1] == key}
    named = [n.lstrip("-").split(".") for n in known]
    beside = {parts[-1] for parts in named if len(parts) > 1 and parts[-2] in above}
    return did_you_mean(key, beside) or did_you_mean(key, {parts[-1] for parts in named})


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name as a hint; the last part counts where the prefix is right."""
    known = set(known)
    prefix, dot, last = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == prefix}
    if dot and (hint := did_you_mean(last, siblings)):
        return f"; did you mean {prefix}.{hint.split(chr(39))[1]}?"
    return did_you_mean(name, known)
