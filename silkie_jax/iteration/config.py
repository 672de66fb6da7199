"""What rounds are made of: a model to start from, instructions, a pool, judges, a training run, and how often."""

import os
from dataclasses import dataclass, field
from typing import Any

from silkie_jax.errors import UserError

STAGES = ("take", "respond", "rate", "build", "reference", "train", "merge")
REFERENCES = ("previous", "start")
KEEP = ("all", "last")
POLICY, START = "policy", "start"
"""What `local` may say in the files of pools and judges: the round's weights, and those from which all began."""


@dataclass
class StartConfig:
    """The weights from which all rounds start."""

    model: str
    adapter: str | None = None


@dataclass
class FirstConfig:
    """A round 0 on pairs that are there: nobody is asked."""

    corpus: str
    train: dict[str, Any] = field(default_factory=dict)  # keys of the training config that differ there


@dataclass
class IterateConfig:
    """Everything that rounds depend on, but for the files that it names."""

    start: StartConfig
    run_dir: str = ""  # the folder of all rounds
    instructions: str = ""  # a run with all instructions
    respond: str = ""  # a pool; `local: policy` is the round's weights, `local: start` those of the start
    rate: list[str] = field(default_factory=list)  # judges, with the same names
    train: str = ""  # a training config; model, corpus, run_dir, adapter and reference are the rounds'
    rounds: int = 1
    take: Any = "all"  # instructions of each round: a number, a list of them, or all of them every time
    first: FirstConfig | None = None
    each: list[dict[str, Any]] = field(default_factory=list)  # keys of the training config that differ by round
    reference: str = "previous"  # of training: the weights that a round begins with, or the start's
    merge: bool = False  # whether a round begins with the adapters so far merged into the start, and a new adapter
    keep: str = "all"  # policies and checkpoints: of all rounds, or of the last
    seed: int = 0


def load_iterate(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> IterateConfig:
    """Reads and checks a configuration; `extends` and `key=value` overrides are as in training.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    from silkie_jax.yaml_files import make, read_extended, with_overrides  # brings omegaconf, which `--help` need not

    config = make(with_overrides(read_extended(path), overrides), IterateConfig, str(path))
    _check(config, str(path))
    return config


def taken(config: IterateConfig, number: int) -> tuple[int, int] | None:
    """How many instructions a round (from 1) takes, and how many earlier ones took; None: all, every time."""
    if config.take == "all":
        return None
    counts = config.take if isinstance(config.take, list) else [config.take] * config.rounds
    return counts[number - 1], sum(counts[: number - 1])


def _check(config: IterateConfig, where: str) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{where}: {message}")

    missing = [key for key in ("run_dir", "instructions", "respond", "rate", "train") if not getattr(config, key)]
    need(not missing, f"{', '.join(missing)} must be set")
    need(bool(config.start.model), "start.model must be set")
    need(config.rounds >= 1, f"rounds must be at least 1, not {config.rounds}")
    need(config.reference in REFERENCES, f"reference: {config.reference!r} is unknown; choose previous or start")
    need(config.keep in KEEP, f"keep: {config.keep!r} is unknown; choose all or last")
    need(0 <= config.seed < 2**32, f"seed must be in [0, 2**32), not {config.seed}")
    need(config.first is None or bool(config.first.corpus), "first.corpus must be set")
    counts = config.take if isinstance(config.take, list) else [config.take]
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts)
    need(config.take == "all" or numbers, f"take must be a number of at least 1, a list of them, or all, not {counts}")
    for key in ("take", "each"):
        value = getattr(config, key)
        if isinstance(value, list) and (value or key == "take"):
            need(
                len(value) >= config.rounds,
                f"{key} has {len(value)} entries, one a round, but rounds is {config.rounds}",
            )
    for number, changes in enumerate([config.first.train if config.first else {}, *config.each]):
        ours = [key for key in changes if key.partition(".")[0] in ROUNDS_KEYS]
        name = f"each[{number - 1}]" if number else "first.train"
        need(not ours, f"{name}: {', '.join(ours)} is set by each round itself; leave it out")


ROUNDS_KEYS = ("model", "adapter", "corpus", "run_dir", "reference", "lora", "train_vision")
"""Keys of the training config that follow from the rounds, or that must be the same in all of them."""
