"""The policy of a run, split into what is trained and what is only read, and its compiled step on a mesh.

`Program` needs no arrays, only shapes: the same one runs a training and is compiled ahead of time for a pod.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from silkie_jax.checkpoints.peft import open_adapter
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.hardware.distributed import together
from silkie_jax.hardware.kernel import attention_kernel
from silkie_jax.hardware.mesh import batch_sharding, put, replicated, sharding_of
from silkie_jax.hardware.products import check_compute
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.models.qwen_vl.model import PARTS, QwenVL
from silkie_jax.models.qwen_vl.names import leaves
from silkie_jax.models.qwen_vl.null_image import keep_null
from silkie_jax.nn.lora import add_lora, linears
from silkie_jax.nn.quantize import is_code
from silkie_jax.preference.batches import Batch
from silkie_jax.preference.grid import Shape
from silkie_jax.preference.passes import STORED
from silkie_jax.training.config import LoraConfig, TrainConfig
from silkie_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, trainable_filter
from silkie_jax.training.step import Memory, Objective, Step


@dataclasses.dataclass(frozen=True)
class State:
    """What a step reads and changes: arrays, or their shapes and shardings."""

    trainable: nnx.State
    optimizer: optax.OptState
    frozen: nnx.State
    reference: nnx.State | None  # the starting values of `trainable`, where the reference is a copy
    memory: Memory  # of the losses that remember something from step to step


class Program:
    """The compiled side of a run. Shapes are enough: without a `policy` the one that `config` describes is meant."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: QwenVLConfig,
        mesh: Mesh,
        steps: int,
        policy: QwenVL | None = None,
    ):
        check_compute(config.compute, mesh)
        self.config, self.model_config, self.mesh, self.steps = config, model_config, mesh, steps
        o = config.optimizer
        self.schedule = make_schedule(o.schedule, o.learning_rate, steps, o.warmup_ratio or 0.0)
        self.optimizer = make_optimizer(
            self.schedule,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
            decayed=decay_mask,
            ratios={part: rate / o.learning_rate for part, rate in self.own_rates().items()},
        )
        blank = blank_policy(config, model_config) if policy is None else policy
        self.graph, trainable, frozen = split_policy(blank, config)
        trainable, frozen = self._placed(trainable, jnp.float32), self._placed(frozen, jnp.dtype(config.dtype))
        where = jax.tree.map(lambda x: x.sharding, trainable)
        shapes = jax.eval_shape(self.optimizer.init, trainable)
        self._optimizer_where = optax.tree_utils.tree_map_params(
            self.optimizer, lambda _, s: s, shapes, where, transform_non_params=lambda _: replicated(mesh)
        )
        one_body = config.compute is not None and config.reference in ("adapter_off", "copy")
        objective = Objective(config.loss, config.loss_options, config.reference, config.remat, steps, one_body)
        self._memory_where = jax.tree.map(lambda _: replicated(mesh), jax.eval_shape(objective.start_memory))
        self.shapes = State(
            trainable,
            jax.tree.map(_with_sharding, shapes, self._optimizer_where),
            frozen,
            trainable if config.reference == "copy" else None,
            jax.tree.map(_with_sharding, jax.eval_shape(objective.start_memory), self._memory_where),
        )
        self.step = Step(
            self.graph,
            objective,
            self.optimizer,
            mesh=mesh,
            kernel=attention_kernel(config.attention, config.dtype, mesh),
            vision_trained=config.train_vision != "none",
            head_trained=config.lora is None,
            shardings=(where, self._optimizer_where, self._memory_where),
        )

    @property
    def numbers_pairs(self) -> bool:
        """Whether batches must say in which order their pairs come (batches.Batch: pair_order)."""
        return any(term.needs.memory for term in self.step.objective.terms)

    def own_rates(self) -> dict[str, float]:
        """Peak learning rates of parts that have one beside the common one (optimizer.part_of)."""
        o = self.config.optimizer
        rates = {"vision": o.vision_learning_rate, "resampler": o.resampler_learning_rate}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def start(self, policy: QwenVL) -> State:
        """The state that training starts from. What is trained is kept in float32, whatever it is computed in."""
        _, trainable, frozen = split_policy(policy, self.config)
        trainable = jax.tree.map(_cast_and_place, trainable, self.shapes.trainable)
        frozen = jax.tree.map(_cast_and_place, frozen, self.shapes.frozen)
        reference = jax.tree.map(jnp.copy, trainable) if self.config.reference == "copy" else None
        optimizer = jax.jit(self.optimizer.init, out_shardings=self._optimizer_where)(trainable)
        memory = jax.device_put(self.step.objective.start_memory(), self._memory_where)
        return State(trainable, optimizer, frozen, reference, memory)

    def batch_shapes(self, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of this shape as the step takes it."""
        side = self.model_config.visual.image_size
        sizes: dict[str, tuple[tuple[int, ...], Any]] = {
            **dict.fromkeys(("tokens", "positions", "branches"), ((shape.tokens,), jnp.int32)),
            **dict.fromkeys(("predecessors", "labels", "label_branches"), ((shape.labels,), jnp.int32)),
            "pairs": ((shape.pairs, 2), jnp.int32),
            "pair_mask": ((shape.pairs,), jnp.bool_),
        }
        if shape.images and self.config.features == "precomputed":
            width = self.model_config.visual.output_dim
            sizes["features"] = ((shape.images, IMAGE_TOKENS, width), jnp.dtype(self.config.dtype))
        elif shape.images:
            sizes["images"] = ((shape.images, side, side, 3), jnp.uint8)
        if shape.spans:
            sizes["spans"] = ((shape.spans,), jnp.int32)
        if self.config.reference == "precomputed":
            stored = (False, True) if self.config.stored_null_image else (False,)
            sizes |= {STORED[null]: ((shape.branches,), jnp.float32) for null in stored}
        if self.numbers_pairs:
            sizes["pair_order"] = ((shape.pairs,), jnp.int32)
        where = batch_sharding(self.mesh, leading=1)
        return {
            k: jax.ShapeDtypeStruct((shape.batches, shape.sequences, *s), t, sharding=where)
            for k, (s, t) in sizes.items()
        }

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """The training step for batches of this shape, ready to be compiled."""
        s = self.shapes
        batch = self.batch_shapes(shape)
        state = (s.trainable, s.optimizer, s.memory, s.frozen, s.reference)
        return self.step.train.lower(*state, batch, branches=shape.branches)

    def lower_evaluation(self, shape: Shape) -> jax.stages.Lowered:
        """The same of an evaluation."""
        s = self.shapes
        batch = self.batch_shapes(shape)
        state = (s.trainable, s.memory, s.frozen, s.reference)
        return self.step.evaluate.lower(*state, batch, branches=shape.branches)

    def _placed(self, state: nnx.State, dtype: jnp.dtype) -> nnx.State:
        """Shapes with the types and shardings that the arrays will have."""
        flat = []
        for path, variable in nnx.to_flat_state(state):
            shape, axes = variable.shape, variable.get_metadata("axes")
            if len(axes) < len(shape):
                axes = ("layers", *axes)
            struct = jax.ShapeDtypeStruct(
                shape, _kept_as(variable, dtype), sharding=sharding_of(self.mesh, axes, shape)
            )
            flat.append((path, variable.replace(struct)))
        return nnx.from_flat_state(flat)


class Trainer:
    """A running program: its state, changed step by step."""

    def __init__(self, program: Program, state: State):
        self.program, self.state = program, state
        self._steps: dict[Shape, jax.stages.Compiled] = {}
        self._evaluations: dict[Shape, jax.stages.Compiled] = {}

    def compile(self, steps: Iterable[Shape], evaluations: Iterable[Shape], say: Callable[[str], None]) -> None:
        """Compiles for all shapes of a run before it starts, so that nothing waits for a compiler later."""
        program = self.program
        todo = [("step", shape, self._steps, program.lower) for shape in sorted(set(steps) - set(self._steps))]
        todo += [
            ("evaluation", shape, self._evaluations, program.lower_evaluation)
            for shape in sorted(set(evaluations) - set(self._evaluations))
        ]
        for number, (what, shape, compiled, lower) in enumerate(todo, start=1):
            began = time.monotonic()
            compiled[shape] = lower(shape).compile()
            say(f"compiled {number} of {len(todo)}: {what} of {shape}, {time.monotonic() - began:.1f} s")

    def update(self, batch: Batch) -> dict[str, jax.Array]:
        """One update; returns the step's metrics, still on the devices."""
        s = self.state
        arrays = put(batch.arrays, self.program.mesh)
        if batch.shape not in self._steps:
            self.compile([batch.shape], (), lambda line: None)
        step = self._steps[batch.shape]
        trainable, optimizer, memory, metrics = step(s.trainable, s.optimizer, s.memory, s.frozen, s.reference, arrays)
        self.state = dataclasses.replace(s, trainable=trainable, optimizer=optimizer, memory=memory)
        return metrics

    def evaluate(self, batch: Batch) -> tuple[dict[str, float], float]:
        """Sums of the metrics over a batch, and their weight (pairs; tokens for sft)."""
        s = self.state
        arrays = put(batch.arrays, self.program.mesh)
        if batch.shape not in self._evaluations:
            self.compile((), [batch.shape], lambda line: None)
        evaluation = self._evaluations[batch.shape]
        values, weight = jax.device_get(evaluation(s.trainable, s.memory, s.frozen, s.reference, arrays))
        return {name: float(value) for name, value in values.items()}, float(weight)

    def learning_rates(self, skipped: bool) -> dict[str, float]:
        """The rates of the last update, as metrics; updates that were skipped do not count."""
        done = int(optax.tree_utils.tree_get_all_with_path(self.state.optimizer, "count")[0][1])
        rate, peak = float(self.program.schedule(done if skipped else done - 1)), self.program.config.optimizer
        own = {f"{part}_learning_rate": rate * p / peak.learning_rate for part, p in self.program.own_rates().items()}
        return {"learning_rate": rate, **own}

    def resume(self, trainable: nnx.State, optimizer: optax.OptState, memory: Memory) -> None:
        """Continues from a checkpoint's values."""
        self.state = dataclasses.replace(self.state, trainable=trainable, optimizer=optimizer, memory=memory)

    def model(self) -> QwenVL:
        """The policy as it is now."""
        return nnx.merge(self.program.graph, self.state.trainable, self.state.frozen)


def with_adapter_form(config: TrainConfig) -> TrainConfig:
    """The configuration with `lora` as the adapter that training starts from has it."""
    if not config.adapter:
        return config
    adapter = open_adapter(config.adapter, leaves(QwenVLConfig.from_folder(config.model)))
    return dataclasses.replace(config, lora=LoraConfig(adapter.rank, float(adapter.alpha), list(adapter.targets)))


def load_policy(config: TrainConfig, mesh: Mesh) -> QwenVL:
    """The policy as training starts: the checkpoint, and an adapter that is loaded or drawn from the seed.

    Raises:
      UserError: the folders are not sound, or the adapter cannot learn.
    """
    with together():
        model = load_model(
            config.model,
            dtype=config.dtype,
            adapter=config.adapter,
            sharding_of=partial(sharding_of, mesh),
            param_dtype=kept_dtype(config),
            parts=parts_of(config),
            quantize=config.codes,
        )
    if config.lora and not config.adapter:
        _draw_lora(model, config)
    for name, linear in linears(model.language.layers):
        if linear.lora_a is not None and not (jnp.any(linear.lora_a[...]) or jnp.any(linear.lora_b[...])):
            raise UserError(f"adapter {config.adapter}: both factors of {name} are zero, so that it cannot learn")
    return model


def kept_dtype(config: TrainConfig) -> str:
    """The type that weights are loaded in: those that will be trained must not lose what bfloat16 cannot hold."""
    return "float32" if config.lora is None or config.train_vision != "none" else config.dtype


def parts_of(config: TrainConfig) -> Sequence[str]:
    """The parts of the model that a run needs: no vision tower where features are stored."""
    return PARTS if config.features == "live" else ("language",)


def blank_policy(config: TrainConfig, model_config: QwenVLConfig) -> QwenVL:
    """The policy without its arrays: shapes in their place."""

    def make() -> QwenVL:
        dtype = jnp.dtype(config.dtype)
        model = QwenVL(model_config, dtype=dtype, parts=parts_of(config), rngs=nnx.Rngs(0))
        if config.codes:
            model.quantize(config.codes)
        if config.features == "precomputed":
            for null in config.encoded_null_images:
                keep_null(model, null, jnp.zeros((null.draws, IMAGE_TOKENS, model_config.visual.output_dim), dtype))
        _draw_lora(model, config)
        return model

    return nnx.eval_shape(make)


def split_policy(model: QwenVL, config: TrainConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, trained, frozen) of a policy."""
    chosen = trainable_filter(lora=config.lora is not None, train_vision=config.train_vision)
    return nnx.split(model, chosen, ...)


def _draw_lora(model: QwenVL, config: TrainConfig) -> None:
    if config.lora:
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets, rngs=nnx.Rngs(config.seed))


def _cast_and_place(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(array.astype(like.dtype), like.sharding)


def _kept_as(x: Any, dtype: jnp.dtype) -> jnp.dtype:
    """Codes stay codes."""
    return x.dtype if is_code(x.dtype) else dtype


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
