"""`silkie iterate`: rounds of public commands, each in a process of its own, so that memory and devices are given back.

There is no state beside what the commands leave: whatever was killed, the same call goes on where that ends.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from silkie_jax.endpoints.agents import check_same
from silkie_jax.errors import UserError
from silkie_jax.iteration.config import IterateConfig, taken
from silkie_jax.iteration.plan import Files, Round, Stage, available, make_plan
from silkie_jax.iteration.table import measured, table, write_json
from silkie_jax.locks import lock

SETTINGS, TABLE = "iterate.json", "table.md"
_SILKIE = (sys.executable, "-m", "silkie_jax.cli")
_FREE = ("rounds", "keep")
# Of training: what changes nothing that is computed. training/config_file.py has the same for a run that goes on, but
# reading it takes JAX.
MACHINE = (
    *("mesh", "batch_tokens", "remat", "attention", "features", "workers", "log_every", "evaluate_every"),
    *("evaluate_at_start", "evaluate_with", "checkpoint_every", "keep_checkpoints", "on_nonfinite", "wandb"),
)
Check = Callable[[Path], object]


def iterate(
    config: IterateConfig,
    *,
    until: str | None = None,
    plan: bool = False,
    check_pool: Check = lambda path: None,
    check_judge: Check = lambda path: None,
) -> None:
    """Runs, or goes on with, all rounds.

    Args:
        until: end after this stage of the first round that is not done.
        plan: print the commands instead of running them; the files that they name are written.
        check_pool, check_judge: refuse a file of a round before anything is asked.

    Raises:
        UserError: something is wrong with the settings, a command failed, or another process is at work.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    files = Files.read(config)
    rounds = make_plan(config, files)
    _check_room(config)
    root = Path(config.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root) as held:
        begun = (root / SETTINGS).is_file()
        if begun:
            _check_begun(root / SETTINGS, config, files)
        for one in rounds:
            _write_files(one, check_pool, check_judge)
        if not begun:
            _check_training(rounds)
        write_json(root / SETTINGS, _settings(config, files))
        first = _first_open(rounds)
        if plan:
            _print_plan(rounds, first)
            return
        for number, one in enumerate(rounds[first:], first + 1):
            reached = _run_round(one, until, held)
            if one.done:
                _report(root, rounds[:number], files)
                if config.keep == "last":
                    _remove_policies(rounds[: number - 1], config)
            if reached:
                print(
                    f"ended after {until} of round {one.number}, as --until asks; without it the same command goes on"
                )
                return
        if first == len(rounds):
            _report(root, rounds, files)


def _check_room(config: IterateConfig) -> None:
    """Refuses more instructions than there are."""
    there, last = available(Path(config.instructions)), taken(config, config.rounds)
    if last and sum(last) > there:
        raise UserError(f"take: all rounds take {sum(last):,} instructions, and {config.instructions} has {there:,}")


@contextmanager
def _alone(root: Path) -> Iterator[IO[str]]:
    """The folder's lock, which commands inherit: one that outlives this process keeps others out."""
    busy = f"another process, or a command that it left, is working on {root}: wait for it, or stop it first"
    with lock(root / "iterate.lock", busy) as held:
        yield held


# Settings


def _settings(config: IterateConfig, files: Files) -> dict[str, Any]:
    """All that the rounds depend on, as JSON holds it."""
    return json.loads(json.dumps({"config": _by_round(asdict(config)), **asdict(files)}, default=str))


def _by_round(config: dict[str, Any]) -> dict[str, Any]:
    """Lists of rounds as mappings, so that each entry is compared by itself."""
    rounds = range(config["rounds"])
    take = config["take"] if isinstance(config["take"], list) else [config["take"] for _ in rounds]
    each = config["each"] or [{} for _ in rounds]
    return config | {"take": {str(n): take[n] for n in rounds}, "each": {str(n): each[n] for n in rounds}}


def _of_rounds(config: dict[str, Any], count: int) -> dict[str, Any]:
    """What a configuration says about its first rounds: there may come more."""
    return config | {key: {n: v for n, v in config[key].items() if int(n) < count} for key in ("take", "each")}


def _check_begun(path: Path, config: IterateConfig, files: Files) -> None:
    """Compares the settings with those that the rounds began with.

    Raises:
        UserError: names what differs.
    """
    before, now = json.loads(path.read_text(encoding="utf-8")), _settings(config, files)
    common = min(before["config"]["rounds"], config.rounds)
    configs = [_of_rounds(some["config"], common) for some in (before, now)]
    check_same(configs[0], configs[1], "configuration", _FREE)
    check_same(before["pool"], now["pool"], "pool")
    check_same(before["judges"], now["judges"], "judge")
    trains = [{key: value for key, value in some["train"].items() if key not in MACHINE} for some in (before, now)]
    check_same(trains[0], trains[1], "training config")


def _check_training(rounds: list[Round]) -> None:
    """Refuses a training config before anybody is asked, in a process of its own: reading it takes JAX.

    Raises:
        UserError: it is not sound (its message is above).
    """
    for words in {one.changes: one.training for one in rounds}.values():
        if status := subprocess.run([*_SILKIE, *words, "--check"], stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"`silkie {shlex.join(words)}` would end with status {status} (its message is above)")


def _write_files(one: Round, check_pool: Check, check_judge: Check) -> None:
    for name, contents in one.files.items():
        path = one.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, contents)
        (check_pool if name == "pool.yaml" else check_judge)(path)


# Work


def _first_open(rounds: list[Round]) -> int:
    """The first round to work on: what comes after the last whose policy is there. (Earlier ones may be removed.)"""
    return max((number for number, one in enumerate(rounds, 1) if one.done), default=0)


def _print_plan(rounds: list[Round], first: int) -> None:
    for number, one in enumerate(rounds):
        for stage in one.stages:
            done = number < first or stage.done()
            print(f"{'# done: ' if done else ''}silkie {shlex.join(stage.words)}")


def _run_round(one: Round, until: str | None, held: IO[str]) -> bool:
    """Runs the stages of a round that are not done, up to `until`; says whether that was reached."""
    for stage in one.stages:
        if not stage.done():
            _run(stage, held)
        if stage.name == until:
            return True
    return False


def _run(stage: Stage, held: IO[str]) -> None:
    """One command in a process of its own, to its end.

    Raises:
        UserError: it failed, or left nothing.
        KeyboardInterrupt: it, or this process, was asked to stop.
    """
    print(f"\n== {stage}\n$ silkie {shlex.join(stage.words)}", flush=True)
    asked: list[int] = []
    process = subprocess.Popen([*_SILKIE, *stage.words], pass_fds=(held.fileno(),))

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the command by itself
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked or status == 130:
        raise KeyboardInterrupt(f"stopped in {stage}; run the same command to continue")
    if status:
        raise UserError(f"{stage} ended with status {status} (its message is above); the same command continues there")
    if stage.name != "reference" and not stage.done():
        raise UserError(f"{stage} ended well, but what it makes is not there: `silkie {shlex.join(stage.words)}`")


def _report(root: Path, rounds: list[Round], files: Files) -> None:
    text = table([measured(one, files.train) for one in rounds])
    (root / TABLE).write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)


def _remove_policies(rounds: list[Round], config: IterateConfig) -> None:
    """Removes weights and checkpoints of rounds that later ones need no more."""
    for one in rounds:
        kept = {one.folder / "train" / "adapter"} if config.merge else set()
        for folder in (*one.results, one.folder / "train" / "checkpoints", one.folder / "train" / "compiled"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
