"""What 8-bit weights and 8-bit products cost in quality: log-probabilities, and DPO's margins, against bfloat16's cost.

    python -m benchmarks.quality QUICKSTART [--steps 100] [--seeds 3] [--of int8 fp8] [--held-out 0.15]
        [--runs FOLDER] [--out results]

QUICKSTART is a finished folder of `python -m examples.quickstart`: its model `sft` is trained on its `corpus` with the
quickstart's recipe of DPO, but for its likelihood term, as many times as there are seeds, in float32, in bfloat16, and
in bfloat16 with `quantize: int8` and with `compute: fp8`. A seed gives the adapter, the order, and which instructions
are held out; on those everything is measured. The yardstick is float32, and what bfloat16 is off by, everybody
accepts. Shown are

- log-probabilities before training, of chosen and rejected responses, and of the difference of a pair;
- margins of reward after it, with the numerics of training, and with the adapter over the original weights in
  float32, which is what `silkie export` gives.

Runs are kept in --runs (left out: a temporary folder), where the same command continues. All is meant for a CPU, whose
products in 8 bits are those of a GPU, slowly; about an hour of two cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.common import keep
from silkie_jax.errors import UserError

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "quickstart-dpo.yaml"
EXACT, USUAL = "float32", "bfloat16"
NUMERICS: dict[str, dict[str, str]] = {
    EXACT: {"dtype": "float32"},
    USUAL: {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "fp8": {"dtype": "bfloat16", "compute": "fp8"},
}
"""Name -> keys of the training configuration."""
BATCH = 8  # rows that are scored at once


class Scores(NamedTuple):
    """Log-probabilities of the responses of pairs."""

    chosen: Float[np.ndarray, "P"]
    rejected: Float[np.ndarray, "P"]

    @property
    def difference(self) -> Float[np.ndarray, "P"]:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Found:
    """What one run gave: its first loss, and margins of reward of the pairs held out."""

    first_loss: float
    trained: Float[np.ndarray, "P"]  # with the numerics of training
    exported: Float[np.ndarray, "P"]  # in float32 over the original weights


class World:
    """A quickstart's model and corpus, and one seed's training on them.

    Raises:
      UserError: the folder has no model or no corpus.
    """

    def __init__(self, folder: Path, runs: Path, seed: int, steps: int, held_out: float):
        from silkie_jax.corpus import CorpusReader, split
        from silkie_jax.corpus.pairs import pairs
        from silkie_jax.training.data import row_options

        self.model, self.corpus, self.runs, self.seed = folder / "sft", folder / "corpus", runs, seed
        for path in (self.model, self.corpus):
            if not path.is_dir():
                raise UserError(f"{folder} has no folder {path.name}; make one with `python -m examples.quickstart`")
        self.keys = [f"seed={seed}", f"steps={steps}", f"evaluation_fraction={held_out}"]
        corpus, config = CorpusReader(self.corpus), self.config(EXACT)
        _, held = split(corpus.index, held_out, seed)
        rule = row_options(config, corpus).rule
        assert rule is not None  # of DPO there is always one
        compared = [(record, pairs(record, rule)) for record in corpus.batch(held.tolist())]
        self.held = [(record, found) for record, found in compared if found]
        if not self.held:
            raise UserError(f"--held-out {held_out} of {self.corpus} leaves no pair to measure on; give more")

    @property
    def pairs(self) -> int:
        return sum(len(found) for _, found in self.held)

    def config(self, name: str):
        """The training of this seed with these numerics."""
        from silkie_jax.training.config_file import load_config

        own = [f"{key}={value}" for key, value in NUMERICS[name].items()]
        paths = [f"model={self.model}", f"corpus={self.corpus}", f"run_dir={self.runs / f'{name}-{self.seed}'}"]
        # Two devices at most, as the quickstart has: another number would take the sums in another order.
        more = ["reference=adapter_off", "sft_weight=0", "log_every=1", f"mesh.data={_devices()}"]
        return load_config(RECIPE, [*paths, *self.keys, *more, *own])

    def scores(self, name: str, adapter: Path | None = None) -> Scores:
        """Of the pairs held out, with these numerics."""
        from silkie_jax.checkpoints.weights import load_model
        from silkie_jax.hardware.mesh import make_mesh
        from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
        from silkie_jax.scoring.scorer import Scorer

        config = self.config(name)
        model = load_model(self.model, dtype=config.dtype, adapter=adapter, quantize=config.codes)
        lengths = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
        tokenizer, mesh = Tokenizer.from_folder(self.model), make_mesh(1)
        scorer = Scorer(model, tokenizer, mesh, batch_rows=BATCH, few_programs=True, **lengths)
        found = [scored.logps for scored in scorer([record for record, _ in self.held])]
        both = [logps[list(pair)] for logps, (_, some) in zip(found, self.held, strict=True) for pair in some]
        return Scores(*np.array(both, np.float64).T)

    def train(self, name: str, before: dict[str, Scores]) -> Found:
        """One run, and what its adapter makes of the pairs held out."""
        from silkie_jax.training.loop import train

        config = self.config(name)
        run = train(config)
        first = _first_line(run / "metrics.jsonl")["loss"]

        def margins(numerics: str) -> Float[np.ndarray, "P"]:
            after = self.scores(numerics, run / "adapter")
            return config.beta * (after.difference - before[numerics].difference)

        trained = margins(name)
        return Found(first, trained, trained if name == EXACT else margins(EXACT))


def _first_line(path: Path) -> dict[str, float]:
    import json

    with path.open(encoding="utf-8") as lines:
        return json.loads(next(lines))


def _devices() -> int:
    import jax

    return min(2, jax.device_count())


def rms(values: Float[np.ndarray, "P"]) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def of_logps(before: list[dict[str, Scores]]) -> list[str]:
    """The table of log-probabilities before training; over the seeds' pairs together."""
    lines = [
        "| | chosen: mean, RMS | x bfloat16 | rejected: mean, RMS | x bfloat16 | a pair's difference | x bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    names = [name for name in before[0] if name != EXACT]

    def off(name: str, side: str) -> Float[np.ndarray, "P"]:
        return np.concatenate([getattr(scores[name], side) - getattr(scores[EXACT], side) for scores in before])

    for name in names:
        cells = []
        for side in ("chosen", "rejected", "difference"):
            values = off(name, side)
            mean = "" if side == "difference" else f"{values.mean():+.3f}, "
            cells += [f"{mean}{rms(values):.3f}", f"{rms(values) / rms(off(USUAL, side)):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def of_margins(found: dict[str, list[Found]]) -> list[str]:
    """The table of margins after training: means over the seeds, and each seed's."""
    lines = [
        "| | first loss - log 2, largest | margin as trained | pairs in order | margin exported | pairs in order "
        "| off float32's run, RMS a pair: as trained | x bfloat16 | exported | x bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def over_seeds(values: Iterable[float], digits: int) -> str:
        values = list(values)
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{statistics.fmean(values):.{digits}f} ({each})"

    def apart(name: str, which: Callable[[Found], Float[np.ndarray, "P"]]) -> float:
        runs = zip(found[name], found[EXACT], strict=False)
        return rms(np.concatenate([which(ours) - exact.exported for ours, exact in runs]))

    for name, runs in found.items():
        # Of a loss in float32, as the step reports it.
        cells = [f"{max(abs(run.first_loss - float(np.float32(np.log(2)))) for run in runs):.1e}"]
        for which in (lambda run: run.trained, lambda run: run.exported):
            cells.append(over_seeds((float(which(run).mean()) for run in runs), 3))
            cells.append(over_seeds((float((which(run) > 0).mean()) for run in runs), 2))
        for which in (lambda run: run.trained, lambda run: run.exported):
            usual = apart(USUAL, which) if found.get(USUAL) else 0
            value = apart(name, which)
            cells += [f"{value:.4f}", f"{value / usual:.2f}" if usual else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Trains, measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path, help="a finished folder of `python -m examples.quickstart`")
    parser.add_argument("--steps", type=int, default=100, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3)
    of = [name for name in NUMERICS if name not in (EXACT, USUAL)]
    parser.add_argument("--of", nargs="+", choices=of, default=of, help="beside float32 and bfloat16")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the instructions")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the runs")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    # As many devices as the quickstart has; JAX reads this when it first looks for devices.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    names = [EXACT, USUAL, *args.of]
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(runs.resolve() / "compiled"))
        worlds = [World(args.quickstart, runs, seed, args.steps, args.held_out) for seed in range(args.seeds)]
        before = [{name: world.scores(name) for name in names} for world in worlds]
        found: dict[str, list[Found]] = {name: [] for name in names}

        def save(finished: bool = False) -> None:
            done = {name: runs for name, runs in found.items() if runs}
            pairs = ", ".join(str(world.pairs) for world in worlds)
            lines = [
                f"`python -m benchmarks.quality {' '.join(sys.argv[1:])}`",
                "",
                f"{args.seeds} seeds, {args.steps} steps, {pairs} pairs held out. In brackets: each seed.",
                "",
                "Log-probabilities before training, nats off those in float32:",
                "",
                *of_logps(before),
            ]
            if done:
                lines += ["", f"Margins of reward after {args.steps} steps of DPO:", "", *of_margins(done)]
            keep("quality", "\n".join(lines), args.out, finished=finished)

        save()
        for world, first in zip(worlds, before, strict=True):
            for name in names:
                found[name].append(world.train(name, first))
                save()
        save(finished=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
