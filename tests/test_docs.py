"""The documentation keeps up with the code: every command parses, every key is described, every file exists."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from silkie_jax.cli import make_parser
from silkie_jax.corpus.pairs import RULES
from silkie_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands() -> list[str]:
    """Indented lines that begin with `silkie`, but for those that give a command's form (`SRC`, `[--dtype ...]`)."""
    lines = [line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.startswith("silkie ") and not re.search(r"\[|\b(SRC|MODEL|CORPUS)\b", line)]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse(command):
    args = make_parser().parse_args(shlex.split(command)[1:])
    if hasattr(args, "overrides") and not hasattr(args, "topology"):
        given = dict(override.split("=") for override in args.overrides)
        assert {"model", "corpus", "run_dir"} <= given.keys()


def test_there_are_commands_for_every_verb():
    verbs = {shlex.split(command)[1] for command in commands()}
    assert verbs == {"convert", "corpus", "train", "reference", "compile", "score", "export", "chat"}


def keys(cls, prefix: str = "") -> set[str]:
    found = set()
    for field in dataclasses.fields(cls):
        nested = re.search(r"\b(\w+Config)\b", str(field.type))
        if nested:
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
