"""The compiled programs of the engine: few, and none that depends on what a request asks for.

    encode   images -> their rows in the pool of features
    prefill  a prompt but its last token -> its keys and values in a slot; one program a padded length
    fork     one slot's keys and values -> other slots
    decode   up to `steps` more tokens of every slot

A prompt's last token is what the first step of `decode` begins with, so that prompts never meet the vocabulary in
`prefill`, and every sample of a prompt begins alike.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from silkie_jax.generation.sampling import choose
from silkie_jax.hardware.mesh import batch_sharding, batch_shards, replicated
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS
from silkie_jax.models.qwen_vl.language import rotation
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PADDING, PROMPT, Kernel
from silkie_jax.nn.kept import Keeper, Kept

Layers = tuple[Kept, ...]

STOPS = 8  # single ids that may end a slot's completion without asking the host


class Lanes(NamedTuple):
    """What the host says of every slot before `decode`; one entry a slot.

    token: the last id, which is not in the cache yet. length: places that are filled, which is that id's position.
    left: the most ids that may follow; 0 where nothing runs. turns: rotary frequencies (of the prompt's NTK factor).
    drawn: how many ids this sample has drawn. stops: ids that end it; -1 fills up.
    """

    token: Int[np.ndarray, "B"]
    length: Int[np.ndarray, "B"]
    left: Int[np.ndarray, "B"]
    turns: Float[np.ndarray, "B 1 D"]
    temperature: Float[np.ndarray, "B"]
    top_p: Float[np.ndarray, "B"]
    seed: UInt32[np.ndarray, "B"]
    drawn: Int[np.ndarray, "B"]
    stops: Int[np.ndarray, "B M"]


class Decoded(NamedTuple):
    """What `decode` found: -1 where a slot got no further id."""

    tokens: Int[Array, "B K"]
    logprobs: Float[Array, "B K"]
    top_ids: Int[Array, "B K N"]
    top_logprobs: Float[Array, "B K N"]


class Programs:
    """All programs of one model, and the arrays that they share.

    Args:
      slots: sequences that are decoded together; a multiple of the mesh's batch shards.
      context: the most tokens of a prompt and its completion.
      images: how many images' features are kept.
      steps: the most tokens of a slot in one call of `decode`.
      top_logprobs: how many of the most probable ids are reported at each place.
      kernel, keeper: how prompts and images attend, and how a token does to what is kept of its slot.
      own: the model's memory may be taken; the model is of no use afterwards.
    """

    def __init__(
        self,
        model: QwenVL,
        *,
        slots: int,
        context: int,
        images: int,
        steps: int,
        top_logprobs: int,
        mesh: Mesh | None,
        kernel: Kernel,
        keeper: Keeper,
        own: bool,
    ):
        self.config, self.dtype = model.config, model.dtype
        self.count, self.context, self.images, self.steps, self.top = slots, context, images, steps, top_logprobs
        self.mesh, self.kernel, self.keeper = mesh, kernel, keeper
        self.rows = 1 if mesh is None else batch_shards(mesh)  # prompts and images of one call
        self._graph, self._state = nnx.split(model.apart(free=own))
        c = self.config
        heads = c.num_attention_heads
        # Placed by name: an array that JAX placed by default would be another argument, and compile everything twice.
        where = (keeper.shardings(heads),) * c.num_hidden_layers
        everywhere = SingleDeviceSharding(jax.devices()[0]) if mesh is None else replicated(mesh)
        empty = jax.jit(
            partial(keeper.empty, slots, context, heads, c.head_dim, self.dtype), out_shardings=keeper.shardings(heads)
        )
        self._kept = tuple(empty() for _ in range(c.num_hidden_layers))
        pool = (max(images, 1) * IMAGE_TOKENS, c.hidden_size)
        self._pool = jax.jit(partial(jnp.zeros, pool, self.dtype), out_shardings=everywhere)()
        self._encode = jax.jit(self._encode_images, donate_argnums=1, out_shardings=everywhere)
        self._prefill = jax.jit(self._prefill_prompts, donate_argnums=1, out_shardings=where)
        self._fork = jax.jit(self._fork_slot, donate_argnums=0, out_shardings=where)
        self._decode = jax.jit(
            self._decode_slots,
            donate_argnums=1,
            out_shardings=(where, everywhere),
        )

    @property
    def model(self) -> QwenVL:
        return nnx.merge(self._graph, self._state)

    @property
    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        jitted: Any = (self._encode, self._prefill, self._fork, self._decode)
        return sum(f._cache_size() for f in jitted)

    # What the engine calls

    def encode(self, images: UInt8[np.ndarray, "R S S 3"], numbers: Int[np.ndarray, "R"]) -> None:
        """Puts the features of images at their numbers in the pool; a number beyond the pool is dropped."""
        self._pool = self._encode(self._state, self._pool, images, numbers)

    def prefill(
        self,
        tokens: Int[np.ndarray, "R T"],
        places: Int[np.ndarray, "R T"],
        lengths: Int[np.ndarray, "R"],
        turns: Float[np.ndarray, "R 1 D"],
        slots: Int[np.ndarray, "R"],
    ) -> None:
        """Fills the slots of some prompts; a slot beyond the last one is dropped."""
        self._kept = self._prefill(self._state, self._kept, self._pool, tokens, places, lengths, turns, slots)

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Copies what a slot holds to other ones."""
        numbers = np.zeros(self.count, np.int32)
        numbers[: len(targets)] = targets
        self._kept = self._fork(self._kept, np.int32(source), numbers, np.int32(len(targets)))

    def decode(self, lanes: Lanes, eager: bool) -> Decoded:
        """Up to `steps` more ids of each slot, fewer as soon as one ends if `eager`; waits for them."""
        self._kept, found = self._decode(self._state, self._kept, lanes, np.bool_(eager))
        return jax.device_get(found)

    # What is compiled

    def _encode_images(self, state: nnx.State, pool: Array, images: Array, numbers: Array) -> Float[Array, "F W"]:
        model: QwenVL = nnx.merge(self._graph, state)
        features = model.encode_images(self._spread(images), kernel=self.kernel)
        rows = numbers[:, None] * IMAGE_TOKENS + jnp.arange(IMAGE_TOKENS)
        return pool.at[rows].set(features.astype(pool.dtype), mode="drop")

    def _prefill_prompts(
        self,
        state: nnx.State,
        slots: Layers,
        pool: Array,
        tokens: Array,
        places: Array,
        lengths: Array,
        turns: Array,
        numbers: Array,
    ) -> Layers:
        model: QwenVL = nnx.merge(self._graph, state)
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        branches = jnp.where(positions < lengths[:, None], PROMPT, PADDING)
        x = self._spread(model.embed_placed(tokens, pool, places))
        r = rotation(self.config, positions, turns, train=False)
        new = model.language.prefill(x, r, self.kernel.among(branches))
        return tuple(self.keeper.keep_prompts(kept, *layer, numbers) for kept, layer in zip(slots, new, strict=True))

    def _fork_slot(self, slots: Layers, source: Array, targets: Array, count: Array) -> Layers:
        def copy(i: Array, slots: Layers) -> Layers:
            return jax.tree.map(lambda x: x.at[targets[i]].set(x[source]), slots)

        return jax.lax.fori_loop(0, count, copy, slots)

    def _decode_slots(
        self, state: nnx.State, slots: Layers, lanes: Any, eager: Bool[Array, ""]
    ) -> tuple[Layers, Decoded]:
        """`lanes`: a `Lanes` of arrays on the device."""
        model: QwenVL = nnx.merge(self._graph, state)
        count, steps = self.count, self.steps
        idle = lanes.left <= 0
        found = Decoded(
            jnp.full((count, steps), -1, jnp.int32),
            jnp.zeros((count, steps), jnp.float32),
            jnp.zeros((count, steps, self.top), jnp.int32),
            jnp.zeros((count, steps, self.top), jnp.float32),
        )

        def more(carry: Any) -> jax.Array:
            _, _, _, done, step, _ = carry
            ended = (done & ~idle).any()
            return (step < steps) & ~done.all() & ~(eager & ended)

        def body(carry: Any) -> Any:
            slots, token, length, done, step, found = carry
            x = self._spread(model.embed(token[:, None], None))
            r = rotation(self.config, length[:, None], lanes.turns, train=False)
            hidden, slots = model.language.step(x, r, jnp.where(done, self.context, length), slots, self.keeper)
            logits = model.language.logits(hidden[:, 0])
            drawn = lanes.drawn + step
            keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(lanes.seed, drawn)
            new = choose(logits, lanes.temperature, lanes.top_p, keys).astype(jnp.int32)
            logprobs = jax.nn.log_softmax(logits)
            top, ids = jax.lax.top_k(logprobs, self.top)
            values = (jnp.where(done, -1, new), jnp.take_along_axis(logprobs, new[:, None], 1)[:, 0], ids, top)
            found = Decoded(*(x.at[:, step].set(value) for x, value in zip(found, values, strict=True)))
            ends = (new == self.config.end_of_text) | (lanes.stops == new[:, None]).any(1)
            ends |= step + 1 >= lanes.left
            length = jnp.where(done, length, length + 1)
            return slots, jnp.where(done, token, new), length, done | ends, step + 1, found

        start = (slots, lanes.token, lanes.length, idle, jnp.int32(0), found)
        slots, _, _, _, _, found = jax.lax.while_loop(more, body, start)
        return slots, found

    def _spread(self, rows: Array) -> Array:
        """Rows over the batch axes of the mesh."""
        return rows if self.mesh is None else jax.lax.with_sharding_constraint(rows, batch_sharding(self.mesh))
