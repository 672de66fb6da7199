"""Where metrics go: the terminal, metrics.jsonl, TensorBoard, and wandb where it is asked for."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from silkie_jax.errors import UserError
from silkie_jax.preference.drift import RATIO
from silkie_jax.training.run_file import run_id

_SHOWN = (
    "loss",
    "sft_loss",
    "mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "grad_norm",
    "pairs_per_second",
    "responses_per_second",
    "eval_loss",
    "eval_mean_token_accuracy",
    RATIO,
)


class MetricsWriter:
    """Writes one JSON object a logged step; continuing at `step` first forgets what a killed run logged beyond it.

    What is written again for the last step, an evaluation that a stop had cut off, joins its line. Only the first
    process of several writes.
    """

    def __init__(self, run_dir: Path, step: int, total: int, *, wandb: str | None = None, active: bool = True):
        self.active = active
        self._bar = tqdm(total=total, initial=step, desc="train", unit="step", disable=not active, dynamic_ncols=True)
        if not active:
            return
        self._path = run_dir / "metrics.jsonl"
        kept = _lines(self._path, step)
        _store(self._path, kept)
        self._last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        self._file = self._path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._wandb = _start_wandb(wandb, run_dir) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of one step everywhere."""
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        line = {"step": step, **finite}
        if self._last.get("step") == step:
            line = self._last | line
            self._file.close()
            _store(self._path, [*_lines(self._path, step - 1), json.dumps(line) + "\n"])
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._last = line
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        self.say(f"step {step}  {shown}")

    def evaluated(self, step: int) -> bool:
        """Whether the last line is this step's and has its evaluation."""
        if not self.active:
            return False
        return self._last.get("step") == step and any(name.startswith("eval_") for name in self._last)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.active:
            self._file.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def _lines(path: Path, step: int) -> list[str]:
    """The lines up to `step`, without one that was cut off while it was written."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return kept


def _store(path: Path, lines: list[str]) -> None:
    """Makes these lines the file, at once."""
    part = path.with_suffix(".tmp")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)


def check_wandb(project: str | None) -> None:
    """Refuses a configuration that asks for wandb where it is not installed, before anything is loaded."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is set in the config but not installed; pip install wandb, or set wandb=null")


def _start_wandb(project: str, run_dir: Path) -> Any:
    import wandb

    # A run that was interrupted continues its curves, and runs whose folders have one name do not meet.
    name = run_dir.absolute().name
    return wandb.init(project=project, id=run_id(run_dir), name=name, dir=str(run_dir), resume="allow")
