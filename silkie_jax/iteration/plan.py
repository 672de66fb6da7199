"""Which commands make up the rounds, and how to see that one of them is done: by what it leaves, never by a note.

ROOT/round-01/pool.yaml, judge-NAME.yaml   with the round's weights in the place of `policy` and `start`
ROOT/round-01/run                          its instructions, responses and ratings
ROOT/round-01/corpus                       what they come to
ROOT/round-01/train                        its training run: the policy is `adapter` (and `model`) there
ROOT/round-01/merged                       with `merge`: the start and all adapters so far as one model
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from silkie_jax.corpus.shards import MANIFEST
from silkie_jax.endpoints.store import DATABASE, RunStore
from silkie_jax.errors import UserError
from silkie_jax.iteration.config import POLICY, START, IterateConfig, taken
from silkie_jax.scoring.store import PART
from silkie_jax.yaml_files import read_extended, read_yaml


@dataclass(frozen=True)
class Policy:
    """Weights: a model's folder, and a PEFT folder over it."""

    model: str
    adapter: str | None = None

    def fill(self, agent: dict[str, Any]) -> None:
        """Names the weights in the settings of an agent."""
        agent["local"] = self.model
        if self.adapter is not None:
            agent["adapter"] = self.adapter


@dataclass(frozen=True)
class Stage:
    """One command: the words after `silkie`, and whether what it is to leave is there."""

    round: int
    name: str
    words: tuple[str, ...]
    done: Callable[[], bool]

    def __str__(self) -> str:
        return f"round {self.round}, {self.name}"


@dataclass(frozen=True)
class Files:
    """What the files say that a configuration names."""

    pool: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    train: dict[str, Any]

    @classmethod
    def read(cls, config: IterateConfig) -> "Files":
        """Raises UserError where a file cannot be read, or two judges share a name."""
        judges: dict[str, dict[str, Any]] = {}
        for path in config.rate:
            judge = _plain(read_yaml(path))
            name = str(judge.setdefault("name", Path(path).stem))
            rubric = Path(path).parent / str(judge.get("rubric", ""))
            if rubric.is_file():  # a path from the judge's own folder, and a round's file lies elsewhere
                judge["rubric"] = os.path.abspath(rubric)
            if _judge_file(name) in map(_judge_file, judges):
                raise UserError(f"{path}: there are two judges {name!r}, or alike: give each a name of its own")
            judges[name] = judge
        return cls(_plain(read_yaml(config.respond)), judges, _plain(read_extended(config.train)))


@dataclass(frozen=True)
class Round:
    """A round of a plan.

    Attributes:
        number: from 1; 0 is the one on given pairs.
        folder: of all that it leaves.
        begins, ends: the weights before and after it.
        stages: in order.
        files: derived files by name, JSON (which is YAML).
        corpus: what it trains on.
        results: folders of the policy that its training leaves.
        training: the words of its training; `changes` tells apart configs that differ in more than folders.
    """

    number: int
    folder: Path
    begins: Policy
    ends: Policy
    stages: tuple[Stage, ...]
    files: Mapping[str, Any]
    corpus: Path
    results: tuple[Path, ...]
    training: tuple[str, ...]
    changes: str

    @property
    def done(self) -> bool:
        """Whether its policy is there."""
        return self.stages[-1].done()


def make_plan(config: IterateConfig, files: Files) -> list[Round]:
    """All rounds, from the one on given pairs where there is one.

    Raises:
        UserError: the rounds' reference cannot be had, or a judge that would prefer nothing.
    """
    _check(config, files)
    start = policy = Policy(config.start.model, config.start.adapter)
    adapters: list[str] = []
    found = []
    for number in range(0 if config.first else 1, config.rounds + 1):
        made = _round(config, files, number, start, policy, adapters)
        found.append(made)
        policy = made.ends
        adapters = [*adapters, str(made.folder / "train" / "adapter")]
    return found


def _check(config: IterateConfig, files: Files) -> None:
    where = config.train
    lora, vision = files.train.get("lora", {}) is not None, files.train.get("train_vision", "none") != "none"
    if config.merge and (not lora or vision or config.start.adapter):
        raise UserError(
            f"{where}: merge: true adds a new adapter of each round to the start: it needs lora, train_vision: none, "
            "and a start without an adapter; merge that one first, with `silkie export`"
        )
    if config.reference == "start" and (not lora or vision or config.merge or config.start.adapter):
        raise UserError(
            f"{where}: reference: start is the start without the rounds' adapter: it needs lora, train_vision: none, "
            "merge: false and a start without an adapter; use reference: previous, or merge that adapter first"
        )
    for name, judge in files.judges.items():
        sides = [judge.get(side) or {} for side in ("policy", "start")]
        if (
            judge.get("kind") == "implicit"
            and [side.get("local") for side in sides] == [POLICY, START]
            and not config.first
        ):
            raise UserError(
                f"judge {name}: in round 1 the policy is the start itself, and all its implicit rewards are 0: name a "
                "corpus with pairs in first.corpus"
            )


def _round(
    config: IterateConfig, files: Files, number: int, start: Policy, policy: Policy, adapters: list[str]
) -> Round:
    folder = Path(config.run_dir) / f"round-{number:02d}"
    run, corpus, train = folder / "run", folder / "corpus", folder / "train"
    stages, derived = [], {}
    if number:
        derived = _derived(config, files, number, start, policy)
        taking = taken(config, number)
        count = ["--count", str(taking[0]), "--skip", str(taking[1])] if taking else []
        judges = [word for name in files.judges for word in ("--judge", str(folder / _judge_file(name)))]
        stages = [
            _stage(number, "take", has_instructions, run, config.instructions, run, *count, "--seed", config.seed),
            _stage(number, "respond", has_responses, run, run, "--pool", folder / "pool.yaml"),
            _stage(number, "rate", partial(has_ratings, names=tuple(files.judges)), run, run, *judges),
            _stage(number, "build", has_corpus, corpus, run, corpus),
        ]
    else:
        assert config.first is not None
        corpus = Path(config.first.corpus)
    training = _training(config, files, number, policy, corpus, train)
    lora, vision = files.train.get("lora", {}) is not None, files.train.get("train_vision", "none") != "none"
    results = ((train / "model",) if vision or not lora else ()) + ((train / "adapter",) if lora else ())
    if training["reference"] == "precomputed":
        # What lies beside a given corpus may be of other weights: there the command itself says what is missing.
        done = partial(has_reference, corpus) if number else partial(has_results, results)
        stages.append(Stage(number, "reference", _words("reference", config, training), done))
    words = _words("train", config, training)
    changes = json.dumps({**training, "model": "", "corpus": "", "run_dir": "", "adapter": bool(policy.adapter)})
    stages.append(Stage(number, "train", words, partial(has_results, results)))
    ends = Policy(
        str(train / "model") if vision or not lora else policy.model, str(train / "adapter") if lora else None
    )
    if config.merge:
        merged = folder / "merged"
        every = [*adapters, str(train / "adapter")]
        merging = ("export", config.start.model, str(merged), *(word for one in every for word in ("--adapter", one)))
        stages.append(Stage(number, "merge", merging, (merged / "config.json").is_file))
        ends, results = Policy(str(merged)), (*results, merged)
    return Round(number, folder, policy, ends, tuple(stages), derived, corpus, results, words, changes)


def _stage(number: int, verb: str, done: Callable[[Path], bool], leaves: Path, *arguments: object) -> Stage:
    return Stage(number, verb, ("corpus", verb, *map(str, arguments)), partial(done, leaves))


def _words(verb: str, config: IterateConfig, training: Mapping[str, Any]) -> tuple[str, ...]:
    return (verb, config.train, *(f"{key}={_value(value)}" for key, value in training.items()))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _training(
    config: IterateConfig, files: Files, number: int, policy: Policy, corpus: Path, train: Path
) -> dict[str, Any]:
    """Keys that a round's training config has of its own.

    The reference is what the round begins with: where that is an adapter, a copy of it (the base is shared), unless the
    file asks for `precomputed`. Or it is the start, which is there without the adapter.
    """
    changes = (config.first.train if config.first else {}) if not number else (config.each or [{}] * number)[number - 1]
    asked = files.train.get("reference")
    if {**files.train, **changes}.get("objective", "dpo") == "sft":
        reference = None
    elif config.reference == START:
        reference = "adapter_off"
    else:
        reference = "copy" if policy.adapter and asked != "precomputed" else asked
    return {
        **changes,
        "model": policy.model,
        "adapter": policy.adapter,
        "corpus": str(corpus),
        "run_dir": str(train),
        "reference": reference,
    }


def _derived(config: IterateConfig, files: Files, number: int, start: Policy, policy: Policy) -> dict[str, Any]:
    """The pool and the judges of a round: weights in the place of `policy` and `start`, and seeds of its own."""
    pool = copy.deepcopy(files.pool)
    lot = f"{config.seed} {pool.get('seed', 0)} {number}"
    pool["seed"] = int.from_bytes(hashlib.sha256(lot.encode()).digest()[:4], "big") >> 1
    found: dict[str, Any] = {"pool.yaml": pool} | {
        _judge_file(name): copy.deepcopy(j) for name, j in files.judges.items()
    }
    for agent in _agents(list(found.values())):
        if agent.get("local") in (POLICY, START):
            if "adapter" in agent:
                raise UserError(f"local: {agent['local']} brings its adapter along; leave out adapter")
            (policy if agent["local"] == POLICY else start).fill(agent)
    return found


def _agents(settings: Any) -> Iterator[dict[str, Any]]:
    """All mappings that have `local`, at any depth."""
    if isinstance(settings, dict):
        if "local" in settings:
            yield settings
        settings = list(settings.values())
    for value in settings if isinstance(settings, list) else ():
        yield from _agents(value)


def _judge_file(name: str) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)
    return f"judge-{plain}.yaml"


def _plain(given: Any) -> dict[str, Any]:
    return OmegaConf.to_container(given)  # type: ignore[return-value]


# What a stage leaves


def has_instructions(run: Path) -> bool:
    """Instructions are stored at once, or none is."""
    return _asked(run, lambda store: store.settings("instructions") is not None)


def has_responses(run: Path) -> bool:
    """All requests were planned and none is open, of whatever stage comes before rating."""
    return _asked(
        run, lambda store: store.settings("responses planned") == _count(store) and not _open(store, "stage != 'rate'")
    )


def has_ratings(run: Path, names: tuple[str, ...]) -> bool:
    """A judge's settings are stored with its requests."""
    return _asked(
        run,
        lambda store: (
            all(store.settings(f"judge:{name}") is not None for name in names) and not _open(store, "stage = 'rate'")
        ),
    )


def has_corpus(corpus: Path) -> bool:
    """The manifest comes last."""
    return (corpus / MANIFEST).is_file()


def has_reference(corpus: Path) -> bool:
    """All parts of one identity; a round's corpus has no other."""
    if not has_corpus(corpus):
        return False
    parts = -(-json.loads((corpus / MANIFEST).read_text(encoding="utf-8"))["records"] // PART)
    return any(len(list(folder.glob("part-*.npz"))) >= parts for folder in corpus.glob("reference/*"))


def has_results(results: tuple[Path, ...]) -> bool:
    """Folders that appear whole or not at all."""
    return all(folder.is_dir() for folder in results)


def _asked(run: Path, question: Callable[[RunStore], bool]) -> bool:
    if not (run / DATABASE).is_file():
        return False
    try:
        with RunStore.open(run) as store:
            return question(store)
    except UserError:  # killed as it was made: the command itself makes it whole, or says what is wrong
        return False


def _count(store: RunStore) -> int:
    return store.db.execute("SELECT count(*) FROM instructions").fetchone()[0]


def _open(store: RunStore, which: str) -> bool:
    sql = f"SELECT 1 FROM requests WHERE {which} AND state NOT IN ('ok', 'failed') LIMIT 1"
    return store.db.execute(sql).fetchone() is not None


def available(instructions: Path) -> int:
    """How many instructions there are.

    Raises:
        UserError: there is no such run.
    """
    with RunStore.open(instructions) as store:
        return _count(store)
