"""`silkie train`: from a configuration to a trained adapter or model, resuming where it was cut off."""

import dataclasses
import json
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from silkie_jax.corpus import CorpusReader, split
from silkie_jax.corpus.pairs import check_rule
from silkie_jax.errors import UserError
from silkie_jax.preference.batches import Batch, BatchSource, RowOptions, usable_records
from silkie_jax.qwen_vl.lora import add_lora, linears
from silkie_jax.qwen_vl.model import QwenVL
from silkie_jax.qwen_vl.peft import save_adapter
from silkie_jax.qwen_vl.tokenizer import Tokenizer
from silkie_jax.qwen_vl.weights import load_model, save_model
from silkie_jax.training.checkpoint import Checkpoints
from silkie_jax.training.config import TrainConfig, check_same_run, save_config
from silkie_jax.training.mesh import batch_sharding, batch_shards, make_mesh, replicated, sharding_of
from silkie_jax.training.metrics import MetricsWriter
from silkie_jax.training.step import (
    Objective,
    Step,
    branch_count,
    decay_mask,
    make_optimizer,
    make_schedule,
    trainable_filter,
)


def train(config: TrainConfig) -> Path:
    """Runs or continues a training run and returns its folder.

    The folder holds config.yaml, metrics.jsonl, checkpoints/, tensorboard/, skipped.jsonl (rows that were cut or left
    out, and why) and at the end adapter/ (LoRA) and model/ (where base weights were trained).

    Raises:
      UserError: what is wrong with the configuration, the model, the corpus or the folder.
    """
    run = Path(config.run_dir)
    mesh = make_mesh(config.mesh)
    main = jax.process_index() == 0
    if (run / "config.yaml").exists():
        check_same_run(config, run / "config.yaml")
    data = open_data(config, mesh)
    trainer = Trainer(config, mesh, data.train.steps_per_epoch)
    checkpoints = Checkpoints(run / "checkpoints", config.keep_checkpoints)
    if main:
        save_config(config, run / "config.yaml")
    done = checkpoints.latest or 0
    if done:
        trainer.restore(checkpoints, done)
    print_start(config, trainer, data, mesh, done) if main else None
    stop = StopRequest()
    with stop, MetricsWriter(run, done, trainer.steps, wandb=config.wandb, active=main) as metrics:
        step = run_steps(config, trainer, data, checkpoints, metrics, done, stop)
    checkpoints.close()
    if step < trainer.steps:
        raise KeyboardInterrupt(f"stopped after step {step}; run the same command to continue")
    trainer.save_result(run)
    return run


def run_steps(
    config: TrainConfig,
    trainer: "Trainer",
    data: "Data",
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    done: int,
    stop: "StopRequest",
) -> int:
    """The loop itself; returns the number of updates done, which is short of all where a stop was asked for."""
    skipped = SkippedRows(Path(config.run_dir) / "skipped.jsonl", metrics)
    rates = Rates()
    step = done
    for step, batch in enumerate(data.train.iterate(done, trainer.steps, config.workers), start=done + 1):
        values = trainer.update(batch)
        skipped.note(batch)
        rates.count(batch)
        last = step == trainer.steps
        logged: dict[str, float] = {}
        if step % config.log_every == 0 or last:
            logged |= {k: float(v) for k, v in jax.device_get(values).items()}
            logged["learning_rate"] = float(trainer.schedule(step - 1))
            logged["epoch"] = step / data.train.steps_per_epoch
            logged |= rates.take()
        if data.evaluation and (step % config.evaluate_every == 0 or last):
            logged |= trainer.evaluate(data.evaluation)
            rates = Rates()
        if logged:
            metrics.write(step, logged)
        metrics.advance()
        if step % config.checkpoint_every == 0 or last or stop.asked:
            checkpoints.save(step, trainer.trainable, trainer.optimizer_state)
        if stop.asked:
            break
    skipped.summary()
    return step


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of training, and of the held-out instructions where there are any."""

    train: BatchSource
    evaluation: BatchSource | None
    unusable: int  # records without a pair under the rule


def open_data(config: TrainConfig, mesh: Mesh) -> Data:
    """Opens the corpus, holds the evaluation split out, and keeps the records that the pair rule gives a pair."""
    corpus = CorpusReader(config.corpus)
    rule = config.pair_rule or ("mean_rating" if corpus.aspects else "given")
    check_rule(rule, corpus.aspects)
    options = RowOptions(rule, config.objective, config.max_length, config.max_prompt_length)
    tokenizer = Tokenizer.from_folder(config.model)
    train, evaluation = split(corpus.index, config.evaluation_fraction, config.seed)
    kept, held = usable_records(corpus, train, options), usable_records(corpus, evaluation, options)
    if not len(kept):
        raise UserError(f"corpus {config.corpus}: no record has a pair under pair_rule {rule!r}; choose another rule")
    # Rows are filled up to what the mesh splits evenly; which of them are this host's follows from the sharding.
    rows = -(-config.batch_rows // batch_shards(mesh)) * batch_shards(mesh)
    local = np.zeros(rows, bool)
    for (index,) in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        local[index] = True
    make = partial(
        BatchSource,
        corpus,
        tokenizer=tokenizer,
        options=options,
        image_size=image_size(config.model),
        rows=config.batch_rows,
        padded_rows=rows,
        local=local,
    )
    return Data(
        make(indices=kept, accumulate=config.accumulate, seed=config.seed),
        make(indices=held, seed=None) if len(held) else None,
        len(train) + len(evaluation) - len(kept) - len(held),
    )


def image_size(folder: str) -> int:
    from silkie_jax.qwen_vl.config import QwenVLConfig

    return QwenVLConfig.from_folder(folder).visual.image_size


class Trainer:
    """The model, what of it is trained, and the compiled step, on one mesh."""

    def __init__(self, config: TrainConfig, mesh: Mesh, steps_per_epoch: int):
        self.config, self.mesh = config, mesh
        self.steps = config.steps or max(1, round((config.epochs or 1) * steps_per_epoch))
        model = build_model(config, mesh)
        chosen = trainable_filter(lora=bool(config.lora), train_vision=config.train_vision)
        self.graph, self.trainable, self.frozen = nnx.split(model, chosen, ...)
        # What is trained is kept in float32, whatever it is computed in; what is not, in the type of computation.
        self.trainable = _cast(self.trainable, jnp.float32)
        self.frozen = _cast(self.frozen, jnp.dtype(config.dtype))
        self.reference = jax.tree.map(jnp.copy, self.trainable) if config.reference == "copy" else None
        o = config.optimizer
        self.schedule = make_schedule(o.schedule, o.learning_rate, self.steps, o.warmup_ratio or 0.0)
        optimizer = make_optimizer(
            self.schedule,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
            decayed=decay_mask,
        )
        where = jax.tree.map(lambda x: x.sharding, self.trainable)
        state_where = _optimizer_shardings(optimizer, self.trainable, where, mesh)
        self.optimizer_state = jax.jit(optimizer.init, out_shardings=state_where)(self.trainable)
        objective = Objective(config.loss, config.loss_options, config.reference, config.remat)
        self.step = Step(
            self.graph,
            objective,
            optimizer,
            mesh=mesh,
            vision_trained=config.train_vision != "none",
            shardings=(where, state_where),
        )

    def update(self, batch: Batch) -> dict[str, jax.Array]:
        """One update; returns the step's metrics, still on the devices."""
        self.trainable, self.optimizer_state, metrics = self.step.train(
            self.trainable,
            self.optimizer_state,
            self.frozen,
            self.reference,
            put(batch.arrays, self.mesh),
            branches=branch_count(int(batch.arrays["label_branches"].max())),
        )
        return metrics

    def evaluate(self, source: BatchSource) -> dict[str, float]:
        """Means over the pairs (sft: tokens) of all held-out rows, named as trl names them, eval_*."""
        sums: dict[str, float] = {}
        weight = 0.0
        for batch in source.iterate(0, source.steps_per_epoch, self.config.workers):
            values, count = jax.device_get(
                self.step.evaluate(
                    self.trainable,
                    self.frozen,
                    self.reference,
                    put(batch.arrays, self.mesh),
                    branches=branch_count(int(batch.arrays["label_branches"].max())),
                )
            )
            weight += float(count)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {f"eval_{name}": value / max(weight, 1) for name, value in sums.items()}

    def restore(self, checkpoints: Checkpoints, step: int) -> None:
        """Continues from a checkpoint."""
        self.trainable, self.optimizer_state = checkpoints.restore(step, self.trainable, self.optimizer_state)

    def save_result(self, run: Path) -> None:
        """Writes adapter/ where there is one, and model/ where weights of the base were trained."""
        model = nnx.merge(self.graph, self.trainable, self.frozen)
        base = self.config.model
        if not self.config.lora or self.config.train_vision != "none":
            save_model(model, run / "model", like=self.config.model, dtype=self.config.dtype)
            base = str(run / "model")
        if self.config.lora:
            save_adapter(model, run / "adapter", base_model=base)


def build_model(config: TrainConfig, mesh: Mesh) -> QwenVL:
    """The policy as training starts: the checkpoint, and an adapter that is loaded or drawn from the seed."""
    where = partial(sharding_of, mesh)
    # Weights that will be trained must not lose what bfloat16 cannot hold.
    whole = not config.lora or config.train_vision != "none"
    model = load_model(
        config.model,
        dtype=config.dtype,
        adapter=config.adapter,
        sharding_of=where,
        param_dtype="float32" if whole else config.dtype,
    )
    if config.lora and not config.adapter:
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets, rngs=nnx.Rngs(config.seed))
        for _, linear in linears(model.language.layers):
            for factor in (linear.lora_a, linear.lora_b):
                if factor is not None:
                    factor[...] = jax.device_put(factor[...], where(("layers", *factor.axes), factor.shape))
    if config.lora:
        for name, linear in linears(model.language.layers):
            if linear.lora_a is not None and not (jnp.any(linear.lora_a[...]) or jnp.any(linear.lora_b[...])):
                raise UserError(f"adapter {config.adapter}: both factors of {name} are zero, so that it cannot learn")
    return model


def put(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch [A, B, ...] onto the devices, rows over the batch axes; each host gives the rows of its devices."""
    where = batch_sharding(mesh, leading=1)
    return {k: jax.make_array_from_callback(v.shape, where, v.__getitem__) for k, v in arrays.items()}


def _cast(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def _optimizer_shardings(optimizer: optax.GradientTransformation, trainable: nnx.State, where: Any, mesh: Mesh) -> Any:
    """Moments lie where their parameter lies; counters everywhere."""
    everywhere: NamedSharding = replicated(mesh)
    state = jax.eval_shape(optimizer.init, trainable)
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, state, where, transform_non_params=lambda _: everywhere
    )


class SkippedRows:
    """Lists rows that were cut or left out in a file, each once, and counts them."""

    def __init__(self, path: Path, metrics: MetricsWriter):
        self.path, self.metrics = path, metrics
        self.known: dict[str, str] = {}
        if path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.known = {line["id"]: line["what"] for line in lines}

    def note(self, batch: Batch) -> None:
        """Adds the rows of a batch that are not known yet."""
        found = [(i, "left_out", why) for i, why in batch.dropped.items()]
        found += [(i, "cut", why) for i, why in batch.truncated.items()]
        new = [(i, what, why) for i, what, why in found if i not in self.known]
        if new and self.metrics.active:
            with self.path.open("a", encoding="utf-8") as file:
                for i, what, why in new:
                    file.write(json.dumps({"id": i, "what": what, "reason": why}, ensure_ascii=False) + "\n")
        self.known |= {i: what for i, what, _ in new}

    def summary(self) -> None:
        """Says how many there were."""
        if self.known:
            out = sum(what == "left_out" for what in self.known.values())
            self.metrics.say(
                f"max_length: {len(self.known) - out} rows were cut and {out} left out; {self.path.name} lists them"
            )


class Rates:
    """Tokens and pairs a second since the last report; the first report after a start includes compiling."""

    def __init__(self) -> None:
        self.began, self.tokens, self.pairs = time.monotonic(), 0, 0

    def count(self, batch: Batch) -> None:
        self.tokens += int((batch.arrays["branches"] >= 0).sum())
        self.pairs += int(batch.arrays["pair_mask"].sum())

    def take(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rates = {"tokens_per_second": self.tokens / seconds, "pairs_per_second": self.pairs / seconds}
        self.__init__()  # type: ignore[misc]
        return rates


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a stop after the step under way, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])  # a second Ctrl-C stops at once


def print_start(config: TrainConfig, trainer: Trainer, data: Data, mesh: Mesh, done: int) -> None:
    """One paragraph on what is about to run."""
    count = sum(x.size for x in jax.tree.leaves(trainer.trainable))
    held = len(data.evaluation.indices) if data.evaluation else 0
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines: Iterable[str] = (
        f"{len(data.train.indices)} instructions to train on, {held} held out, {data.unusable} without a pair",
        f"{count:,} trained parameters, mesh {shape}, {config.batch_rows} x {config.accumulate} rows an update",
        f"continuing after step {done} of {trainer.steps}" if done else f"{trainer.steps} steps",
    )
    print("\n".join(lines))
