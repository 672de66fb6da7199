"""Log-probabilities of every response of some records, as training sees them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from silkie_jax.corpus import Record
from silkie_jax.hardware.mesh import batch_shards, local_sequences, platform_of, put, replicated
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.null_image import NullImage, null_features
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.preference.batches import Features, collate, decode_images, read_features
from silkie_jax.preference.forward import block_wrapper, hidden_states, image_features, response_scores
from silkie_jax.preference.grid import bucket, make_shape, round_up
from silkie_jax.preference.layout import row_sizes
from silkie_jax.preference.rows import Row, RowTooLong, make_row

if TYPE_CHECKING:
    import grain


class Scored(NamedTuple):
    """A record's row, or why it has none (no responses: None), and the log-probability of each response."""

    row: Row | RowTooLong | None
    logps: Float[np.ndarray, "R"]  # NaN where there is no row


class Scorer:
    """A compiled forward pass over rows that hold all responses of a record.

    `batch_rows` of them go at once; where they are so long that this would be more than `batch_tokens`, fewer, but at
    least one a device. With stored `features` of their images the model needs no vision tower. With `null` that stands
    in the place of every image, and log-probabilities are means over its draws. `few_programs` pads more, to one shape
    for each length: for rows that come one by one, where compiling takes longer than it saves.
    """

    def __init__(
        self,
        model: QwenVL,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_rows: int,
        batch_tokens: int | None = None,
        max_length: int,
        max_prompt_length: int | None = None,
        workers: int = 2,
        kernel: Kernel = PLAIN,
        features: Features | None = None,
        few_programs: bool = False,
        null: NullImage | None = None,
    ):
        self.features = features
        self.config, self.tokenizer, self.mesh, self.workers = model.config, tokenizer, mesh, workers
        self.shards, self.tokens, self.fine = batch_shards(mesh), batch_tokens, platform_of(mesh) == "gpu"
        self.few = few_programs
        self.rows = round_up(batch_rows, self.shards)
        self._make_row = partial(make_row, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        graph, self._state = nnx.split(model)

        @partial(jax.jit, static_argnames="branches", out_shardings=replicated(mesh))
        def forward(state: nnx.State, batch: dict[str, jax.Array], branches: int) -> jax.Array:
            policy = nnx.merge(graph, state)
            rows = jax.tree.map(lambda x: x[0], batch)
            wrap = block_wrapper("none", mesh)
            draws = [image_features(policy, rows, wrap, kernel)]
            if null is not None and draws[0] is not None:
                draws = [jnp.broadcast_to(x.astype(policy.dtype), draws[0].shape) for x in null_features(policy, null)]
            logps = []
            for images in draws:
                hidden = hidden_states(policy, rows, images, adapter=True, wrap=wrap, kernel=kernel)
                logps.append(response_scores(rows, hidden, branches=branches).logps)
            return sum(logps[1:], logps[0]) / len(logps)

        self._forward = forward

    def __call__(self, records: Sequence[Record]) -> list[Scored]:
        """Scores records."""
        rows = [self.row(record) for record in records]
        laid_out = {i: row for i, row in enumerate(rows) if isinstance(row, Row)}
        logps = self.score_rows(laid_out)
        missing = [np.full(len(record.responses), np.nan, np.float32) for record in records]
        return [Scored(row, logps.get(i, missing[i])) for i, row in enumerate(rows)]

    def score_rows(self, laid_out: Mapping[int, Row]) -> dict[int, Float[np.ndarray, "K"]]:
        """Log-probabilities of each row's branches, under the same numbers; rows of like length go together."""
        import grain

        order = sorted(laid_out, key=lambda i: -len(laid_out[i].tokens))
        chunks: list[list[int]] = []
        while order:
            count = self._at_once(laid_out[order[0]])
            chunks.append(order[:count])
            order = order[count:]
        prepared = grain.MapDataset.source(chunks).map(partial(self._prepare, laid_out)) if chunks else []
        logps: dict[int, np.ndarray] = {}
        for chunk, (arrays, branches) in zip(chunks, self._ahead(prepared), strict=True):
            values = np.asarray(self._forward(self._state, put(arrays, self.mesh), branches=branches))
            for i, found in zip(chunk, values, strict=False):
                logps[i] = found[: len(laid_out[i].responses)]
        return logps

    def row(self, record: Record) -> Row | RowTooLong | None:
        """The row of all responses of a record, or why there is none."""
        if not record.responses:
            return None
        try:
            return self._make_row(record, responses=range(len(record.responses)))
        except RowTooLong as e:
            return e

    def _at_once(self, longest: Row) -> int:
        """Sequences of a forward pass over rows up to this one."""
        if self.tokens is None:
            return self.rows
        a_device = max(self.tokens // (bucket(len(longest.tokens), self.fine) * self.shards), 1)
        return min(self.rows, a_device * self.shards)

    def _prepare(self, rows: Mapping[int, Row], chunk: list[int]) -> tuple[dict[str, np.ndarray], int]:
        count = self._at_once(rows[chunk[0]])
        groups = [[rows[i]] for i in chunk] + [[]] * (count - len(chunk))
        sizes = [np.array(row_sizes(row)) for group in groups for row in group]
        shape = make_shape(1, count, sizes, self.fine and not self.few)
        if self.few:
            shape = shape._replace(labels=shape.tokens)
        arrays = collate(groups, shape, self.tokenizer.end_of_text)
        local = local_sequences(self.mesh, count)
        if self.features is None:
            arrays |= decode_images(groups, shape.images, self.config.visual.image_size, local)
        else:
            arrays |= read_features(groups, shape.images, self.features, local)
        return {name: values[None] for name, values in arrays.items()}, shape.branches

    def _ahead(self, prepared: "grain.MapDataset | list") -> "grain.IterDataset | list":
        import grain

        if isinstance(prepared, list):
            return prepared
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=2 * self.workers)
        return prepared.to_iter_dataset(options)
