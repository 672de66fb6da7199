"""The documentation keeps up with the code: every command parses, every key is described, every file exists."""

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

import silkie_jax
from silkie_jax.cli import make_parser
from silkie_jax.corpus.pairs import RULES
from silkie_jax.training.config import TrainConfig
from tests.test_imports import ALLOWED, ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands() -> list[str]:
    """Indented lines that begin with `silkie`, but for those that give a command's form (`SRC`, `[--dtype ...]`)."""
    lines = [line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.startswith("silkie ") and not re.search(r"\[|\b(SRC|MODEL|CORPUS)\b", line)]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse(command):
    args = make_parser().parse_args(shlex.split(command)[1:])
    if hasattr(args, "overrides") and not hasattr(args, "topology") and not hasattr(args, "plan"):
        given = dict(override.split("=") for override in args.overrides)
        assert {"model", "corpus", "run_dir"} <= given.keys()


def verbs_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """All verbs below a parser, those of verbs too."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = [verb for action in below for verb in action.choices.values()]
    return [*found, *(verb for one in found for verb in verbs_of(one))]


@pytest.mark.parametrize("verb", verbs_of(make_parser()), ids=lambda verb: verb.prog)
def test_every_verb_has_an_example_that_parses(verb):
    example = verb.epilog.removeprefix("example:").strip()
    assert example.startswith(verb.prog)
    make_parser().parse_args(shlex.split(example)[1:])


def test_there_are_commands_for_every_verb():
    verbs = {shlex.split(command)[1] for command in commands()}
    assert verbs == {
        "convert",
        "corpus",
        "train",
        "reference",
        "compile",
        "iterate",
        "score",
        "export",
        "chat",
        "serve",
        "evaluate",
    }


def keys(cls, prefix: str = "") -> set[str]:
    found = set()
    for field in dataclasses.fields(cls):
        nested = re.search(r"\b(\w+Config)\b", str(field.type))
        if nested and not str(field.type).startswith("list["):
            module = __import__(cls.__module__, fromlist=["_"])
            found |= keys(getattr(module, nested.group(1)), f"{prefix}{field.name}.")
        else:
            found.add(prefix + field.name)
    return found


def key_table() -> list[list[str]]:
    """The cells of each row of the table of keys: keys, defaults, meaning."""
    table = (ROOT / "docs/train.md").read_text(encoding="utf-8").split("## Keys")[1].split("##")[0]
    return [line.split("|")[1:] for line in table.splitlines() if line.startswith("| `")]


def test_every_config_key_is_described_and_no_other():
    assert {key for cells in key_table() for key in re.findall(r"`([^`]+)`", cells[0])} == keys(TrainConfig)


def test_described_defaults_are_the_defaults():
    """Of keys with plain numbers and names; null ones resolve to what the table says in words."""
    defaults = TrainConfig()
    compared = 0
    for names, values, *_ in key_table():
        for key, value in zip(re.findall(r"`([^`]+)`", names), values.split(","), strict=False):
            default = defaults
            for part in key.split("."):
                default = getattr(default, part)
            if isinstance(default, bool):
                assert value.strip() == str(default).lower(), key
                compared += 1
            elif isinstance(default, int | float):
                assert float(value) == default, key
                compared += 1
            elif isinstance(default, str):
                assert value.strip() == default, key
                compared += 1
    assert compared > 20


def test_every_loss_and_pair_rule_is_described():
    from silkie_jax.preference.losses import LOSSES

    text = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in LOSSES)
    assert all(re.search(rf"`{rule}`|name: {rule}", text) for rule in RULES)


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_tree_is_what_is_there():
    """Of both packages, every folder with code and every module of the top, with what it is for."""
    shown, folders = set(), [ROOT]
    for line in ARCHITECTURE.split("\n\n")[1].splitlines():
        indent, name, about = re.fullmatch(r"( +)(\S+)(?: +(\S.*))?", line).groups()
        folders[len(indent) // 2 - 1 :] = [folders[len(indent) // 2 - 2] / name]
        shown.add(folders[-1].relative_to(ROOT).as_posix())
        assert about or name == "silkie_jax/", f"{name} is not explained"
    found = {"silkie_jax", "data_prep", "tests/reference"}
    for package in ("silkie_jax", "data_prep"):
        modules = {path.parent for path in (ROOT / package).rglob("*.py")} | set((ROOT / package).glob("*.py"))
        found |= {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    assert shown == found - {"silkie_jax/models", "data_prep/judging/ratings"}


def test_the_table_of_arrows_is_the_tested_one():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*)\|$", ARCHITECTURE, re.MULTILINE)
    shown = {package: set(re.findall(r"`(\w+)`", names)) for package, names in rows}
    rooms = {f"data_prep.{room}": below for room, below in ROOMS.items()}
    assert shown == ALLOWED | rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_in_the_text_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "silkie_jax", ROOT / "data_prep")), name
    for module in re.findall(r"(?:python -m |`)(benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for module, names in re.findall(r"^ +from ((?:silkie_jax|data_prep)[\w.]*) import (.+)$", text, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    for name in re.findall(r"\bsilkie_jax\.(\w+)\(", text):
        assert hasattr(silkie_jax, name), name


def test_every_benchmark_is_described():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common", "turns", "workload"}
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert {name for name in scripts if not re.search(rf"benchmarks[./]{name}\b", text)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
