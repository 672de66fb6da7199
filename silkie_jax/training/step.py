"""The training step: a pure function of state and batch, the same for one CPU and a pod."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.preference.forward import block_wrapper, image_features, response_scores
from silkie_jax.preference.logprobs import branch_sums
from silkie_jax.preference.losses import LOSSES, LossOptions, chosen_nll, make_pairs

Arrays = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
MARGINS = ("margins/square", "margins/labels")
"""Of each pair, the mean: the squared margin and the labels of both responses, for the check of a start (start.py)."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised. `reference` is adapter_off, copy, precomputed, or None for supervised fine-tuning."""

    loss: str = "sigmoid"
    options: LossOptions = dataclasses.field(default_factory=LossOptions)
    reference: str | None = "adapter_off"
    remat: str = "full"


class Step:
    """Compiled training and evaluation of one model under one objective on one mesh."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        kernel: Kernel = PLAIN,
        vision_trained: bool = False,
        head_trained: bool = False,
        shardings: tuple[Any, Any] | None = None,
    ):
        self.graph, self.objective, self.optimizer, self.mesh = graph, objective, optimizer, mesh
        self.kernel, self.vision_trained, self.head_trained = kernel, vision_trained, head_trained
        # The new state lies where the old one lay: its memory is reused and the next step compiles to the same program.
        out = None if shardings is None else (*shardings, None)
        self.train = jax.jit(self._train, static_argnames="branches", donate_argnums=(0, 1), out_shardings=out)
        self.evaluate = jax.jit(self._evaluate, static_argnames="branches")

    def _train(
        self,
        trainable: nnx.State,
        optimizer: optax.OptState,
        frozen: nnx.State,
        reference: nnx.State | None,
        batch: Arrays,
        branches: int,
    ) -> tuple[nnx.State, optax.OptState, Metrics]:
        """One update from [A, B, ...] arrays: the mean over all pairs (sft: tokens) of all A x B rows."""
        total = self._weight(batch)

        def accumulate(carry: tuple[nnx.State, Metrics], rows: Arrays):
            grads, sums = carry
            (_, more), g = jax.value_and_grad(self._loss, has_aux=True)(
                trainable, frozen, reference, rows, total, branches
            )
            return (jax.tree.map(jnp.add, grads, g), jax.tree.map(jnp.add, sums, more)), None

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        none = self._no_sums(trainable, frozen, reference, batch, branches)
        (grads, sums), _ = jax.lax.scan(accumulate, (zeros, none), batch)
        norm = optax.tree.norm(grads)
        updates, changed = self.optimizer.update(grads, optimizer, trainable)
        # A step that is not finite changes nothing: whoever reads the flag may stop late, or go on.
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        new = (optax.apply_updates(trainable, updates), changed)
        trainable, optimizer = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (trainable, optimizer))
        metrics = self._metrics(sums, total) | {"grad_norm": norm, "skipped": (~finite).astype(jnp.float32)}
        return trainable, optimizer, metrics

    def _evaluate(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        batch: Arrays,
        branches: int,
    ) -> tuple[Metrics, Float[Array, ""]]:
        """Sums of the metrics over [A, B, ...] arrays, and their weight (pairs, or tokens for sft)."""

        def add(sums: Metrics, rows: Arrays):
            _, more = self._loss(trainable, frozen, reference, rows, jnp.float32(1), branches)
            return jax.tree.map(jnp.add, sums, more), None

        sums, _ = jax.lax.scan(add, self._no_sums(trainable, frozen, reference, batch, branches), batch)
        return {name: value for name, value in sums.items() if name not in MARGINS}, self._weight(batch)

    def _no_sums(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        batch: Arrays,
        branches: int,
    ) -> Metrics:
        """What sums over batches begin with: zero for each metric."""
        first = jax.tree.map(lambda x: x[0], batch)
        loss = partial(self._loss, branches=branches)
        shapes = jax.eval_shape(loss, trainable, frozen, reference, first, jnp.float32(1))[1]
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def _weight(self, batch: Arrays) -> Float[Array, ""]:
        counted = batch["pair_mask"] if self.objective.reference else batch["label_branches"] > 0
        return jnp.maximum(counted.sum(), 1).astype(jnp.float32)

    def _metrics(self, sums: Metrics, total: Float[Array, ""]) -> Metrics:
        return {k: v if k == "loss" else v / total for k, v in sums.items()}

    def _loss(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        rows: Arrays,
        total: Float[Array, ""],
        branches: int,
    ) -> tuple[Float[Array, ""], Metrics]:
        """This batch's share of the step's loss, and sums over its pairs of what is reported.

        The images are encoded once; the reference sees the same features unless the tower itself is trained.
        """
        wrap = block_wrapper(self.objective.remat, self.mesh)
        scores_of = partial(
            response_scores, branches=branches, wrap=wrap, kernel=self.kernel, frozen_head=not self.head_trained
        )
        policy: QwenVL = nnx.merge(self.graph, trainable, frozen)
        features = image_features(policy, rows, wrap, self.kernel)
        scores = scores_of(policy, rows, features, adapter=True)
        logps = scores.logps
        if self.objective.reference is None:
            loss = -logps.sum() / total  # cross-entropy, the mean over labelled tokens
            return loss, {"loss": loss, "mean_token_accuracy": scores.greedy.sum()}

        match self.objective.reference:
            case "precomputed":
                base_logps = rows["reference_logps"]
            case "adapter_off":
                base_logps = scores_of(policy, rows, features, adapter=False).logps
            case _:
                base = nnx.merge(self.graph, reference, frozen)
                if self.vision_trained:
                    features = image_features(base, rows, wrap, self.kernel)
                base_logps = scores_of(base, rows, features, adapter=True).logps
        base_logps = jax.lax.stop_gradient(base_logps)
        tokens = branch_sums(jnp.ones(rows["labels"].shape), rows["label_branches"], branches)
        pairs, valid = make_pairs(logps, base_logps, tokens, rows["pairs"]), rows["pair_mask"].reshape(-1)

        def add(values: Float[Array, "P"]) -> Float[Array, ""]:
            return jnp.where(valid, values, 0).sum()

        options = self.objective.options
        losses, imitation = LOSSES[self.objective.loss](pairs, options), {}
        if options.sft_weight:
            nll = chosen_nll(pairs)
            losses, imitation = losses + options.sft_weight * nll, {"sft_loss": add(nll)}
        loss = add(losses) / total
        chosen, rejected = options.beta * pairs.chosen_log_ratio, options.beta * pairs.rejected_log_ratio
        return loss, {
            "loss": loss,
            **dict(zip(MARGINS, (add(jnp.square(pairs.margin)), add(pairs.labels)), strict=True)),
            "rewards/chosen": add(chosen),
            "rewards/rejected": add(rejected),
            "rewards/accuracies": add((chosen > rejected).astype(jnp.float32)),
            "rewards/margins": add(chosen - rejected),
            "logps/chosen": add(pairs.policy_chosen),
            "logps/rejected": add(pairs.policy_rejected),
            **imitation,
        }
