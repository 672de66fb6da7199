"""Qwen-VL: tokens and images -> hidden states -> logits."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from silkie_jax.errors import UserError
from silkie_jax.qwen_vl.attention import PADDING, PROMPT, branch_mask
from silkie_jax.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.qwen_vl.language import Decoder, ntk_alpha, rotation
from silkie_jax.qwen_vl.vision import VisionTower


class QwenVL(nnx.Module):
    """Qwen-VL with the vision tower, its resampler and the Qwen-7B decoder.

    Computes in `dtype`; parameters are kept in `param_dtype` (default: the same) and cast where they are used.
    Build it from a checkpoint with `silkie_jax.load`.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        kind = jnp.dtype(param_dtype or dtype)
        self.visual = VisionTower(config.visual, dtype=kind, rngs=rngs)
        self.language = Decoder(config, dtype=kind, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: UInt8[Array, "N S S 3"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of every position, in float32.

        `tokens` hold 256 ids (<imgpad>, or the bytes of a path) between each <img> and </img>; what they are does not
        matter, the rows are replaced by the images, taken in order of appearance over the batch. `mask` is True at
        tokens (None: everywhere); padding may stand on either side. `train` switches dynamic NTK and log-n attention
        off, as the official code does in training mode.

        Raises:
          UserError: images and image spans do not agree in number, size or form.
        """
        check_images(self.config, tokens, images)
        graph, state = nnx.split(self)
        return _logits(graph, state, jnp.asarray(tokens), images, mask, train)

    def encode_images(
        self, images: UInt8[Array, "... S S 3"], wrap: Callable | None = None
    ) -> Float[Array, "... 256 W"]:
        """The rows that stand for each image."""
        *lead, h, w, c = images.shape
        rows = self.visual(images.reshape(-1, h, w, c), self.dtype, wrap)
        return rows.reshape(*lead, *rows.shape[1:])

    def embed(
        self,
        tokens: Int[Array, "B T"],
        features: Float[Array, "M 256 W"] | Float[Array, "B M 256 W"] | None,
    ) -> Float[Array, "B T W"]:
        """Token embeddings with the image spans replaced.

        `features` are either all images in order of appearance over the batch, or each row's own [B, M, ...] (rows
        with fewer than M images are padded at the end): then no row needs another's images, which is what a sharded
        batch wants.
        """
        x = self.language.wte[...].astype(self.dtype)[tokens]
        if features is None:
            return x
        starts = tokens == self.config.image_start
        if features.ndim == 3:
            counts = starts.sum(1)
            first = jnp.cumsum(counts) - counts
            return jax.vmap(place_images, (0, 0, None, 0))(x, starts, features, first)
        return jax.vmap(place_images, (0, 0, 0, None))(x, starts, features, 0)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        branches: Int[Array, "B T"],
        features: Float[Array, "..."] | None,
        *,
        train: bool,
        adapter: bool = True,
        wrap: Callable | None = None,
    ) -> Float[Array, "B T W"]:
        """Normalised hidden states of rows with branches (attention.branch_mask); `adapter=False` is the base model."""
        alpha = 1.0 if train else ntk_alpha(self.config, tokens.shape[1])
        r = rotation(self.config, positions, alpha, train)
        x = self.embed(tokens, features)
        return self.language(x, r, branch_mask(branches), adapter=adapter, wrap=wrap)


@partial(jax.jit, static_argnames=("graph", "train"))
def _logits(graph, state, tokens, images, mask, train):
    model: QwenVL = nnx.merge(graph, state)
    features = None if images is None else model.encode_images(images)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    branches = jnp.zeros_like(tokens) if mask is None else jnp.where(mask, PROMPT, PADDING)
    hidden = model.hidden(tokens, positions, branches, features, train=train)
    return model.language.logits(hidden)


def place_images(
    x: Float[Array, "T W"], starts: Bool[Array, "T"], features: Float[Array, "M 256 W"], first: Int[Array, ""]
) -> Float[Array, "T W"]:
    """Puts image number first + i in the 256 rows after the i-th `<img>` of one sequence."""
    index = jnp.arange(x.shape[0])
    last_start = jax.lax.cummax(jnp.where(starts, index, -1))
    offset = index - last_start - 1
    inside = (last_start >= 0) & (offset >= 0) & (offset < IMAGE_TOKENS)
    row = (first + jnp.cumsum(starts) - 1) * IMAGE_TOKENS + offset
    rows = features.reshape(-1, features.shape[-1])[jnp.where(inside, row, 0)]
    return jnp.where(inside[:, None], rows.astype(x.dtype), x)


def check_images(config: QwenVLConfig, tokens: Int[Array, "B T"], images: UInt8[Array, "N S S 3"] | None) -> None:
    """Refuses images that do not fit the tokens, where both are known (not while tracing)."""
    if images is not None:
        side = config.visual.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != jnp.uint8:
            raise UserError(
                f"images must be uint8 [N, {side}, {side}, 3], not {images.dtype} {list(images.shape)}; use read_image"
            )
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    rows, starts = np.nonzero(ids == config.image_start)
    count = 0 if images is None else images.shape[0]
    if len(starts) != count:
        raise UserError(f"the tokens hold {len(starts)} <img> spans but {count} images were given")
    ends = starts + IMAGE_TOKENS + 1
    if (ends >= ids.shape[1]).any() or (ids[rows, np.minimum(ends, ids.shape[1] - 1)] != config.image_end).any():
        raise UserError(f"an <img> is not followed by {IMAGE_TOKENS} ids and </img>: the image span is cut")
