"""The training step: a pure function of state and batch, the same for one CPU and a pod."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.preference.forward import block_wrapper, image_features
from silkie_jax.preference.logprobs import branch_sums
from silkie_jax.preference.losses import POLICY, REFERENCE, LossOptions, Term, make_pairs, read_loss
from silkie_jax.preference.passes import STORED, Models, encode_null_images, make_passes

Arrays = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Memory = dict[str, Any]
"""What losses remember from step to step, by name (losses/memory.py), and `updates`; empty where none does."""
MARGINS = ("margins/square", "margins/labels")
"""Of each pair, the mean: the squared margin and the labels of both responses, for the check of a start (start.py)."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised. `reference` is adapter_off, copy, precomputed, or None for supervised fine-tuning.

    `loss` is what a configuration says (losses/table.py); `steps` are the run's, of which some losses take a share.
    With `one_body` the pass of adapter_off or copy is the policy's own program (`Step._twice`): where products round so
    coarsely that a last bit becomes a step, two programs of the same weights would give two answers.
    """

    loss: Any = "sigmoid"
    options: LossOptions = dataclasses.field(default_factory=LossOptions)
    reference: str | None = "adapter_off"
    remat: str = "full"
    steps: int = 1
    one_body: bool = False

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """The losses that are added up."""
        return read_loss(self.loss, self.options) if self.reference else ()

    def start_memory(self) -> Memory:
        """The memory of a run that has done nothing."""
        out: Memory = {term.name: term.needs.memory.start() for term in self.terms if term.needs.memory}
        return out | ({"updates": jnp.int32(0)} if any(term.needs.progress for term in self.terms) else {})


class Fixed(NamedTuple):
    """What is the same for all rows of a step: features of null images, what memories say, the share that is done."""

    nulls: dict[str, Array]
    thresholds: Metrics
    progress: Float[Array, ""] | None


class Told(NamedTuple):
    """What a batch says: sums over its pairs, what memories take up of each, the policy's log-probabilities."""

    sums: Metrics
    records: dict[str, Float[Array, "P"]]
    logps: Float[Array, "B K"]


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
        shardings: tuple[Any, Any, Any] | None = None,
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
        memory: Memory,
        frozen: nnx.State,
        reference: nnx.State | None,
        batch: Arrays,
        branches: int,
    ) -> tuple[nnx.State, optax.OptState, Memory, Metrics]:
        """One update from [A, B, ...] arrays: the mean over all pairs (sft: tokens) of all A x B rows."""
        total = self._weight(batch)
        fixed = self._fixed(trainable, memory, frozen, reference)

        def accumulate(carry: tuple[nnx.State, Metrics], rows: Arrays):
            grads, sums = carry
            g, told = self._gradient(trainable, frozen, reference, fixed, rows, total, branches)
            return (jax.tree.map(jnp.add, grads, g), jax.tree.map(jnp.add, sums, told.sums)), told.records

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        none = self._no_sums(trainable, frozen, reference, fixed, batch, branches)
        (grads, sums), records = jax.lax.scan(accumulate, (zeros, none), batch)
        norm = optax.tree.norm(grads)
        updates, changed = self.optimizer.update(grads, optimizer, trainable)
        # A step that is not finite changes nothing: whoever reads the flag may stop late, or go on.
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        new = (optax.apply_updates(trainable, updates), changed, self._remember(memory, records, batch))
        old = (trainable, optimizer, memory)
        trainable, optimizer, memory = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = self._metrics(sums, total) | fixed.thresholds
        metrics |= {"grad_norm": norm, "skipped": (~finite).astype(jnp.float32)}
        return trainable, optimizer, memory, metrics

    def _evaluate(
        self,
        trainable: nnx.State,
        memory: Memory,
        frozen: nnx.State,
        reference: nnx.State | None,
        batch: Arrays,
        branches: int,
    ) -> tuple[Metrics, Float[Array, ""]]:
        """Sums of the metrics over [A, B, ...] arrays, and their weight (pairs, or tokens for sft)."""
        fixed = self._fixed(trainable, memory, frozen, reference)

        def add(sums: Metrics, rows: Arrays):
            told = self._values(trainable, frozen, reference, fixed, rows, jnp.float32(1), branches)
            return jax.tree.map(jnp.add, sums, told.sums), None

        none = self._no_sums(trainable, frozen, reference, fixed, batch, branches)
        sums, _ = jax.lax.scan(add, none, batch)
        return {name: value for name, value in sums.items() if name not in MARGINS}, self._weight(batch)

    def _no_sums(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        fixed: Fixed,
        batch: Arrays,
        branches: int,
    ) -> Metrics:
        """What sums over batches begin with: zero for each metric."""
        first = jax.tree.map(lambda x: x[0], batch)

        def sums(first: Arrays, fixed: Fixed) -> Metrics:
            return self._values(trainable, frozen, reference, fixed, first, jnp.float32(1), branches).sums

        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, first, fixed))

    def _weight(self, batch: Arrays) -> Float[Array, ""]:
        counted = batch["pair_mask"] if self.objective.reference else batch["label_branches"] > 0
        return jnp.maximum(counted.sum(), 1).astype(jnp.float32)

    def _metrics(self, sums: Metrics, total: Float[Array, ""]) -> Metrics:
        return {k: v if k == "loss" else v / total for k, v in sums.items()}

    def _models(self, trainable: nnx.State, frozen: nnx.State, reference: nnx.State | None) -> Models:
        """The policy, the same without gradients, and the reference where it is computed."""
        policy: QwenVL = nnx.merge(self.graph, trainable, frozen)
        still: QwenVL = nnx.merge(self.graph, jax.tree.map(jax.lax.stop_gradient, trainable), frozen)
        match None if self.objective.one_body else self.objective.reference:
            case "adapter_off":
                return Models(policy, still, still, adapter=False, own_tower=False)
            case "copy":
                base: QwenVL = nnx.merge(self.graph, reference, frozen)
                return Models(policy, still, base, adapter=True, own_tower=self.vision_trained)
        return Models(policy, still, None, adapter=False, own_tower=False)

    def _fixed(self, trainable: nnx.State, memory: Memory, frozen: nnx.State, reference: nnx.State | None) -> Fixed:
        """What all rows of a step share."""
        terms = self.objective.terms
        nulls = encode_null_images(terms, self._models(trainable, frozen, reference)) if terms else {}
        progress = memory["updates"] / self.objective.steps if "updates" in memory else None
        kept = {term.name: term.needs.memory for term in terms if term.needs.memory}
        return Fixed(nulls, {f"{k}/threshold": one.read(memory[k]) for k, one in kept.items()}, progress)

    def _remember(self, memory: Memory, records: dict[str, Float[Array, "A P"]], batch: Arrays) -> Memory:
        """The memory after a step: its pairs are taken up in the order that they have in the plan."""
        if not memory:
            return memory
        valid = batch["pair_mask"].reshape(-1)
        # A batch that does not number its pairs has them in the order of its rows.
        order = batch["pair_order"].reshape(-1) if "pair_order" in batch else jnp.cumsum(valid) - 1
        out = dict(memory)
        for term in self.objective.terms:
            if term.needs.memory:
                out[term.name] = term.needs.memory.take(memory[term.name], records[term.name].reshape(-1), order, valid)
        return out | ({"updates": memory["updates"] + 1} if "updates" in memory else {})

    def _gradient(self, trainable: nnx.State, *rest: Any) -> tuple[nnx.State, Told]:
        """The gradient of `_loss`, and what else the batch says."""
        if self.objective.one_body:
            return self._twice(trainable, *rest, differentiate=True)
        return jax.grad(self._loss, has_aux=True)(trainable, *rest)

    def _values(self, trainable: nnx.State, *rest: Any) -> Told:
        """What a batch says, without a gradient."""
        if self.objective.one_body:
            return self._twice(trainable, *rest, differentiate=False)[1]
        return self._loss(trainable, *rest)[1]

    def _twice(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        fixed: Fixed,
        rows: Arrays,
        total: Float[Array, ""],
        branches: int,
        *,
        differentiate: bool,
    ) -> tuple[Any, Told]:
        """`_gradient` and `_values` where the reference's pass is the policy's own program.

        A loop of two turns over one body: the first has the reference's factors, which without an adapter are zeros,
        and its log-probabilities are what the second one, the policy's, finds stored. Policy and reference of the same
        factors then agree to the last bit, however the compiler fuses and however coarse a product is. Only the second
        turn goes backwards.
        """
        others = jax.tree.map(jnp.zeros_like, trainable) if reference is None else reference
        policy: QwenVL = nnx.merge(self.graph, trainable, frozen)
        wrap = block_wrapper(self.objective.remat, self.mesh)
        features = image_features(policy, rows, wrap, self.kernel)  # of a frozen tower, the same in both turns
        seen = rows if features is None else rows | {"features": features}

        def turn(stored: Float[Array, "B K"], own: Bool[Array, ""]) -> tuple[Any, Told]:
            factors = jax.tree.map(lambda a, b: jnp.where(own, a, b), trainable, others)

            def loss(factors: nnx.State) -> tuple[Float[Array, ""], Told]:
                return self._loss(factors, frozen, None, fixed, seen | {STORED[False]: stored}, total, branches)

            if not differentiate:
                return None, loss(factors)[1]
            value, back, told = jax.vjp(loss, factors, has_aux=True)
            zeros = jax.tree.map(jnp.zeros_like, factors)
            return jax.lax.cond(own, lambda: back(jnp.ones_like(value))[0], lambda: zeros), told

        nothing = jnp.zeros((rows["tokens"].shape[0], branches), jnp.float32)
        shapes = jax.eval_shape(turn, nothing, jnp.bool_(False))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        turns = jnp.array([False, True])
        return jax.lax.scan(lambda done, own: (turn(done[1].logps, own), None), start, turns)[0]

    def _loss(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        reference: nnx.State | None,
        fixed: Fixed,
        rows: Arrays,
        total: Float[Array, ""],
        branches: int,
    ) -> tuple[Float[Array, ""], Told]:
        """This batch's share of the step's loss, and what else it says.

        The images are encoded once; the reference sees the same features unless the tower itself is trained.
        """
        terms = self.objective.terms
        found = make_passes(
            terms,
            self._models(trainable, frozen, reference),
            rows,
            fixed.nulls,
            branches=branches,
            wrap=block_wrapper(self.objective.remat, self.mesh),
            kernel=self.kernel,
            frozen_head=not self.head_trained,
        )
        own = jax.lax.stop_gradient(found.logps[POLICY])
        if self.objective.reference is None:
            loss = -found.logps[POLICY].sum() / total  # cross-entropy, the mean over labelled tokens
            return loss, Told({"loss": loss, "mean_token_accuracy": found.greedy.sum()}, {}, own)

        tokens = branch_sums(jnp.ones(rows["labels"].shape), rows["label_branches"], branches)
        pairs = make_pairs(found.logps[POLICY], found.logps[REFERENCE], tokens, rows["pairs"])
        valid = rows["pair_mask"].reshape(-1)

        def add(values: Float[Array, "P"]) -> Float[Array, ""]:
            return jnp.where(valid, values, 0).sum()

        loss = jnp.float32(0)
        reported: Metrics = {}
        records: dict[str, Array] = {}
        for term in terms:
            seen = make_pairs(
                found.logps[POLICY],
                found.logps[REFERENCE],
                tokens,
                rows["pairs"],
                null=found.logps[term.needs.null] if term.needs.null else None,
                mixed=found.mixed[term.needs.mixed] if term.needs.mixed else None,
                threshold=fixed.thresholds.get(f"{term.name}/threshold"),
                progress=fixed.progress,
            )
            loss += term.weight * add(term(seen)) / total
            reported |= {name: add(values) for name, values in term.loss.report(seen, **term.options).items()}
            if term.needs.memory and term.loss.records:
                records[term.name] = jax.lax.stop_gradient(term.loss.records(seen, **term.options))
        beta = self.objective.options.beta
        chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
        sums = {
            "loss": loss,
            **dict(zip(MARGINS, (add(jnp.square(pairs.margin)), add(pairs.labels)), strict=True)),
            "rewards/chosen": add(chosen),
            "rewards/rejected": add(rejected),
            "rewards/accuracies": add((chosen > rejected).astype(jnp.float32)),
            "rewards/margins": add(chosen - rejected),
            "logps/chosen": add(pairs.policy_chosen),
            "logps/rejected": add(pairs.policy_rejected),
            **reported,
        }
        return loss, Told(sums, records, own)
