"""`silkie train`: from a configuration to a trained adapter or model, resuming where it was cut off."""

import dataclasses
from functools import partial
from pathlib import Path

import jax

from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.hardware.distributed import StopRequest, as_the_first_host, together
from silkie_jax.hardware.kernel import sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.hardware.products import check_compute
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.batches import Batch, BatchSource
from silkie_jax.preference.drift import RATIO, measure_drift
from silkie_jax.scoring.features import find_features
from silkie_jax.scoring.fingerprints import Tower, tower_checksums
from silkie_jax.scoring.reference import identity, under_null
from silkie_jax.scoring.store import find_reference
from silkie_jax.training.benchmarks import Benchmarks
from silkie_jax.training.checkpoint import Checkpoints
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.config_file import check_same_run, save_config
from silkie_jax.training.data import Data, open_data
from silkie_jax.training.meters import Meters
from silkie_jax.training.metrics import MetricsWriter, check_wandb
from silkie_jax.training.result import is_finished, save_result
from silkie_jax.training.run_file import (
    CONDITION_FILE,
    RUN_FILE,
    as_it_began,
    check_contents,
    loaded_contents,
    read_contents,
    save_contents,
)
from silkie_jax.training.start import Start
from silkie_jax.training.trainer import Program, Trainer, kept_dtype, load_policy, with_adapter_form

_DRIFT_OF = 4096  # instructions whose lengths are compared: more would not change what is said


def train(config: TrainConfig, profile: int = 0) -> Path:
    """Runs or continues a training run and returns its folder.

    The folder holds config.yaml, run.json (what the run is known by), metrics.jsonl, checkpoints/, tensorboard/,
    skipped.jsonl (records that were cut or left out, and why), condition.txt (what the policy is to be asked, where it
    is trained with a condition) and at the end adapter/ (LoRA) and model/ (where base weights were trained). With
    `profile` an XLA trace of so many steps goes to profile/.

    Raises:
      UserError: what is wrong with the configuration, the model, the corpus or the folder.
      KeyboardInterrupt: the run was asked to stop and has saved a checkpoint.
    """
    run, main = Path(config.run_dir), jax.process_index() == 0
    say = print if main else lambda line: None
    with together():
        check_wandb(config.wandb)
        config = with_adapter_form(config)
        known = (run / RUN_FILE).exists()
        began = check_same_run(config, run / "config.yaml", may_move=known) if (run / "config.yaml").exists() else None
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    kernel = sound_kernel(config.attention, config.dtype, mesh, began.attention if began else None, say)
    config = dataclasses.replace(config, attention=kernel.name)
    with together():  # what is wrong with the data is said before gigabytes are read
        check_compute(config.compute, mesh)
        corpus, tokenizer = CorpusReader(config.corpus), Tokenizer.from_folder(config.model)
        contents = read_contents(corpus, tokenizer)
        check_contents(run, config, contents)
        data = open_data(config, mesh, corpus, tokenizer)
        condition = data.train.options.condition
        asked = condition.asked if condition else None
        benchmarks = Benchmarks(config, tokenizer, mesh, kernel, asked)
    tower, features = Tower(b"", b""), None
    if config.features == "precomputed":
        with together():
            options = kept_dtype(config), partial(sharding_of, mesh), config.codes
            tower = tower_checksums(config.model, config.dtype, *options)
            features = find_features(config, corpus, tower.computed)
            data.use_features(features)
    policy = load_policy(config, mesh)
    if features is not None:
        features.keep_nulls(config, policy, mesh)
    contents |= loaded_contents(config, policy, tower.kept)
    with together():
        check_contents(run, config, contents)
    depends = None
    if config.reference == "precomputed":
        depends = identity(config, policy, tokenizer, corpus, tower.computed)
    steps = config.steps or data.train.grid.plan.steps_of(config.epochs or 1)
    program = Program(config, policy.config, mesh, steps, policy)
    data.number_pairs(program.numbers_pairs)
    trainer = Trainer(program, program.start(policy))
    del policy
    checkpoints = Checkpoints(run / "checkpoints", config.keep_checkpoints)
    done = as_the_first_host(checkpoints.latest or 0)
    if as_the_first_host(done == steps and is_finished(config, run)):
        checkpoints.close()
        say(f"all {steps} steps of this run were done before; nothing is left to do")
        return run
    stored = None
    with together():
        if depends is not None:
            depends = as_it_began(depends, run, done)
            stored = find_reference(corpus.path, depends, len(corpus))
            null = config.stored_null_image
            data.use_reference(
                stored, find_reference(corpus.path, under_null(depends, null), len(corpus)) if null else None
            )
            contents["reference"] = depends.get("adapter")
    if done:
        state = trainer.state
        trainer.resume(*checkpoints.restore(done, state.trainable, state.optimizer, state.memory))
    with together():
        if main:
            save_config(config, run / "config.yaml")
            save_contents(run, contents)
            data.skipped.write(run / "skipped.jsonl")
            if asked:
                (run / CONDITION_FILE).write_text(asked + "\n", encoding="utf-8")
            print(describe(trainer, data, done), flush=True)
        metrics = MetricsWriter(run, done, steps, wandb=config.wandb, active=main)
    stop, start = StopRequest(), Start(config, done, stored.folder if stored else None, metrics.say)
    with stop, metrics:
        if main and done == 0 and config.objective == "dpo":
            warn_of_drift(data.train, metrics)
        step, complete = run_steps(trainer, data, benchmarks, checkpoints, metrics, done, start, stop, profile)
    checkpoints.close()
    if not complete:
        raise KeyboardInterrupt(f"stopped after step {step} of {steps}; run the same command to continue")
    with together():
        save_result(trainer, run)
    return run


def run_steps(
    trainer: Trainer,
    data: Data,
    benchmarks: Benchmarks,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    done: int,
    start: Start,
    stop: StopRequest,
    profile: int,
) -> tuple[int, bool]:
    """The loop itself; returns the number of updates done, and whether nothing is left: a stop may have been asked for.

    A stop in an evaluation leaves it out, and the run makes it good when it is continued.
    """
    program, config = trainer.program, trainer.program.config
    grid, held = data.train.grid, data.evaluation
    grid.shapes(range(program.steps))  # fixes one shape a length, the same at whatever step a run resumes
    evaluates = held is not None and (config.evaluate_at_start or config.evaluate_every)
    trainer.compile(
        grid.shapes(range(done, program.steps)),
        held.grid.shapes(range(held.steps_per_epoch)) if held and evaluates else (),
        metrics.say,
    )
    if evaluation_due(config, done, program.steps) and not as_the_first_host(metrics.evaluated(done)):
        found = evaluate(trainer, held, stop) if held else {}
        if found is None:
            return done, False
        if done == 0:
            found |= benchmarks.measure(trainer.model(), metrics.say)
        if found:
            metrics.write(done, found)
    meters, guard, trace = Meters(program), Guard(config, checkpoints), Trace(Path(config.run_dir), done, profile)
    step, stopping, complete = done, False, True
    for step, batch in enumerate(meters.waiting(data.train.iterate(done, program.steps, config.workers)), done + 1):
        trace.before(step)
        values = trainer.update(batch)
        start.check(values)
        guard.check(step, batch, values)
        meters.count(batch)
        last = step == program.steps
        logged: dict[str, float] = {}
        if step % config.log_every == 0 or last:
            logged |= {k: float(v) for k, v in jax.device_get(values).items()}
            logged |= trainer.learning_rates(skipped=bool(logged["skipped"]))
            logged |= {"epoch": step / data.train.steps_per_epoch, **meters.take()}
        if held and evaluation_due(config, step, program.steps):
            with meters.paused():
                found = evaluate(trainer, held, stop)
            stopping = found is None
            logged |= found or {}
        if benchmarks and not stopping and (step % config.checkpoint_every == 0 or last):
            with meters.paused():
                logged |= benchmarks.measure(trainer.model(), metrics.say)
        if logged:
            metrics.write(step, logged)
        metrics.advance()
        complete = last and not stopping
        stopping = stopping or stop.asked()
        if step % config.checkpoint_every == 0 or last or stopping:
            guard.finish()
            state = trainer.state
            checkpoints.save(step, state.trainable, state.optimizer, state.memory)
        if stopping:
            break
    trace.end()
    if step > done:
        metrics.say(meters.summary() + guard.summary())
    return step, complete


def evaluation_due(config: TrainConfig, step: int, steps: int) -> bool:
    """Whether the instructions held out are evaluated after this step of a run."""
    if step == 0:
        return config.evaluate_at_start
    return config.evaluate_every > 0 and (step % config.evaluate_every == 0 or step == steps)


class Guard:
    """Watches for gradients that are not finite, one step behind, so that the devices never wait for the host."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._pending: tuple[int, Batch, jax.Array] | None = None
        self._skipped: list[int] = []

    def check(self, step: int, batch: Batch, values: dict[str, jax.Array]) -> None:
        """Looks at the step before this one.

        Raises:
          UserError: it was not finite and the configuration says to stop.
        """
        self.finish()
        self._pending = (step, batch, values["skipped"])

    def finish(self) -> None:
        """Looks at the last step too."""
        if self._pending is None:
            return
        step, batch, flag = self._pending
        self._pending = None
        if not float(flag):
            return
        self._skipped.append(step)
        if self._config.on_nonfinite == "stop":
            self._checkpoints.close()
            last = self._checkpoints.latest
            raise UserError(
                f"step {step}: loss or gradient is not finite; records of its batch: {', '.join(batch.ids)}; "
                f"the last good checkpoint is {'none' if last is None else f'of step {last}'}; "
                "lower optimizer.learning_rate, or set on_nonfinite=skip"
            )

    def summary(self) -> str:
        """What was skipped, if anything."""
        return f"; {len(self._skipped)} updates skipped as not finite: {self._skipped}" if self._skipped else ""


class Trace:
    """An XLA trace of some steps, after two that warm up, for TensorBoard's profiler or Perfetto."""

    def __init__(self, run: Path, done: int, steps: int):
        self._folder, self._first, self._last = run / "profile", done + 3, done + 2 + steps
        self._on = False

    def before(self, step: int) -> None:
        """Starts or ends the trace where `step` is the first or is beyond the last."""
        if self._first <= step <= self._last and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif step > self._last:
            self.end()

    def end(self) -> None:
        """Ends it if it runs."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def evaluate(trainer: Trainer, source: BatchSource, stop: StopRequest) -> dict[str, float] | None:
    """Means over the pairs (sft: tokens) of all held-out rows, under trl's names with eval_ before them.

    None: a stop was asked for before the last batch.
    """
    sums: dict[str, float] = {}
    weight = 0.0
    count = source.steps_per_epoch
    for number, batch in enumerate(source.iterate(0, count, trainer.program.config.workers), start=1):
        values, share = trainer.evaluate(batch)
        weight += share
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        if stop.asked() and number < count:
            return None
    return {f"eval_{name}": value / max(weight, 1) for name, value in sums.items()}


def warn_of_drift(source: BatchSource, metrics: MetricsWriter) -> None:
    """Says once, before the first step, that chosen and rejected responses differ in length (drift.py), if they do."""
    drift = measure_drift(source.texts(_DRIFT_OF))
    if drift.matters:
        metrics.write(0, {RATIO: drift.ratio})
        mend = "the policy will learn length, too: see Lengths of responses in docs/train.md"
        metrics.say(f"warning: {drift}; {mend}")


def describe(trainer: Trainer, data: Data, done: int) -> str:
    """What is about to run, in a few lines."""
    program, config = trainer.program, trainer.program.config
    count = sum(x.size for x in jax.tree.leaves(trainer.state.trainable))
    held = len(data.evaluation.indices) if data.evaluation else 0
    listed = " (listed in skipped.jsonl)" if data.skipped.too_long or data.skipped.cut else ""
    shape = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    return "\n".join(
        (
            f"{len(data.train.indices)} instructions to train on, {held} held out; {data.skipped}{listed}",
            f"{count:,} trained parameters, mesh {shape}, {config.batch_rows} x {config.accumulate} rows an update",
            f"continuing after step {done} of {program.steps}" if done else f"{program.steps} steps",
        )
    )
