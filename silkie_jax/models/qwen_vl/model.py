"""Qwen-VL: tokens and images -> hidden states -> logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.models.qwen_vl.language import Decoder, frequencies, ntk_alpha, rotation
from silkie_jax.models.qwen_vl.vision import VisionTower
from silkie_jax.nn.attention import PADDING, PLAIN, PROMPT, Kernel
from silkie_jax.nn.stack import unstack

PARTS: tuple[str, ...] = (
    "visual",
    "language",
)  # a model may lack one: who has an image's features needs no tower, and the reverse


class QwenVL(nnx.Module):
    """Qwen-VL with the vision tower, its resampler and the Qwen-7B decoder.

    Computes in `dtype`; parameters are kept in `param_dtype` (default: the same) and cast where they are used. Only
    `parts` of it are there, by default both. Build it from a checkpoint with `silkie_jax.load`.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype | None = None,
        parts: Sequence[str] = PARTS,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        kind = jnp.dtype(param_dtype or dtype)
        tower: Any = VisionTower(config.visual, dtype=kind, rngs=rngs) if "visual" in parts else None
        decoder: Any = Decoder(config, dtype=kind, rngs=rngs) if "language" in parts else None
        self.visual: VisionTower = nnx.data(tower)
        self.language: Decoder = nnx.data(decoder)
        self.nulls = nnx.Dict({})  # stored features of images that show nothing, without a tower (null_image.py)

    def quantize(self, method: str = "int8") -> None:
        """Keeps the large weights of decoder and tower in 8 bits, in place; adapters are trained as before.

        `method` is one of nn/quantize.py: METHODS. With fp8 the products with these weights are in 8 bits, too.
        """
        for part in (self.visual, self.language):
            if part is not None:
                part.quantize(method)

    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        images: UInt8[ArrayLike, "N S S 3"] | None = None,
        mask: Bool[ArrayLike, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of every position, in float32.

        `tokens` hold 256 ids (<imgpad>, or the bytes of a path) between each <img> and </img>; what they are does not
        matter, the rows are replaced by the images, taken in order of appearance over the batch. `mask` is True (or 1)
        at tokens (None: everywhere); padding may stand on either side and hold any ids. `train` switches dynamic NTK
        and log-n attention off, as the official code does in training mode.

        Raises:
          UserError: an argument of the wrong form, an id beyond the vocabulary, or images that do not fit the tokens.
        """
        tokens, images, mask = check_inputs(self.config, tokens, images, mask)
        graph, state = nnx.split(self)
        return _logits(graph, state, tokens, images, mask, bool(train))

    def apart(self, *, free: bool = False) -> "QwenVL":
        """The same model, its decoder's layers modules of their own, as generation wants them (nn.stack.unstack).

        It shares all other arrays. `free` takes the layers' memory from this model, which is of no use afterwards.
        """
        model = nnx.merge(*nnx.split(self))
        model.language.layers = nnx.List(unstack(self.language.layers, free=free))
        return model

    def encode_images(
        self,
        images: UInt8[Array, "... S S 3"] | Float[Array, "... S S 3"],
        wrap: Callable | None = None,
        kernel: Kernel = PLAIN,
    ) -> Float[Array, "... 256 W"]:
        """The rows that stand for each image; floats are normalised already (vision.patches)."""
        *lead, h, w, c = images.shape
        rows = self.visual(images.reshape(-1, h, w, c), self.dtype, wrap, kernel.everywhere)
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
        x = self.language.embed(tokens, self.dtype)
        if features is None:
            return x
        starts = tokens == self.config.image_start
        if features.ndim == 3:
            counts = starts.sum(1)
            first = jnp.cumsum(counts) - counts
            return jax.vmap(place_images, (0, 0, None, 0))(x, starts, features, first)
        return jax.vmap(place_images, (0, 0, 0, None))(x, starts, features, jnp.int32(0))

    def embed_placed(
        self, tokens: Int[Array, "B T"], pool: Float[Array, "F W"], places: Int[Array, "B T"]
    ) -> Float[Array, "B T W"]:
        """Token embeddings, but row `places` of a pool of features where that is not negative (`feature_places`)."""
        x = self.language.embed(tokens, self.dtype)
        return jnp.where((places >= 0)[..., None], pool[jnp.maximum(places, 0)].astype(x.dtype), x)

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
        kernel: Kernel = PLAIN,
    ) -> Float[Array, "B T W"]:
        """Normalised hidden states of rows with branches (attention.branch_mask); `adapter=False` is the base model."""
        alpha = 1.0 if train else ntk_alpha(self.config, tokens.shape[1])
        r = rotation(self.config, positions, frequencies(self.config, alpha), train)
        x = self.embed(tokens, features)
        return self.language(x, r, kernel.among(branches), adapter=adapter, wrap=wrap)


@partial(jax.jit, static_argnames=("graph", "train"))
def _logits(graph, state, tokens, images, mask, train):
    model: QwenVL = nnx.merge(graph, state)
    features = None if images is None else model.encode_images(images)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    branches = jnp.zeros_like(tokens) if mask is None else jnp.where(mask == 1, PROMPT, PADDING)
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


def feature_places(config: QwenVLConfig, tokens: Int[np.ndarray, "T"], images: Sequence[int]) -> Int[np.ndarray, "T"]:
    """Which row of a pool of features stands at each token of one sequence; -1: its own embedding.

    `images` are the numbers in the pool of the sequence's images, in order; each has as many rows as a span has tokens.
    """
    places = np.full(len(tokens), -1, np.int32)
    for start, image in zip(np.flatnonzero(tokens == config.image_start), images, strict=True):
        places[start + 1 : start + 1 + IMAGE_TOKENS] = image * IMAGE_TOKENS + np.arange(IMAGE_TOKENS)
    return places


def check_inputs(
    config: QwenVLConfig, tokens: ArrayLike, images: ArrayLike | None, mask: ArrayLike | None
) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray | None, jax.Array | np.ndarray | None]:
    """Brings what a caller gave to one form, or says in one line what is wrong with it.

    Padding becomes end-of-text, so that it cannot look like an image. Shapes and types are always checked, values where
    they are known (not while tracing).
    """
    tokens = _array("tokens", tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f"tokens must be integers [B, T] with at least one token, not {tokens.dtype} {list(tokens.shape)}"
        )
    if mask is not None:
        mask = _array("mask", mask)
        if mask.shape != tokens.shape:
            raise UserError(f"mask must have the shape of tokens, {list(tokens.shape)}, not {list(mask.shape)}")
        mask = mask == 1  # as officially: whatever is not 1 is padding
    if images is not None:
        images = _array("images", images)
        side = config.visual.image_size
        if images.shape[:1] == (0,):
            images = None
        elif images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != jnp.uint8:
            raise UserError(
                f"images must be uint8 [N, {side}, {side}, 3], not {images.dtype} {list(images.shape)}; use read_image"
            )
    if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        tokens = tokens if mask is None else jnp.where(mask, tokens, config.end_of_text)
        return tokens.astype(jnp.int32), images, mask

    mask = None if mask is None else np.asarray(mask)
    ids = np.asarray(tokens) if mask is None else np.where(mask, tokens, config.end_of_text)
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
    check_spans(config, ids, 0 if images is None else len(images))
    return ids.astype(np.int32), images, mask


def check_spans(config: QwenVLConfig, ids: np.ndarray, images: int) -> None:
    """Refuses ids [B, T] whose image spans are not whole, or not as many as `images`."""
    rows, starts = np.nonzero(ids == config.image_start)
    if len(starts) != images:
        raise UserError(f"the tokens hold {len(starts)} <img> spans but {images} images were given")
    ends = starts + IMAGE_TOKENS + 1
    if (ends >= ids.shape[1]).any() or (ids[rows, ends] != config.image_end).any():
        raise UserError(f"an <img> is not followed by {IMAGE_TOKENS} ids and </img>: the image span is cut")


def _array(name: str, x: ArrayLike) -> jax.Array | np.ndarray:
    """Lists become arrays; arrays, on a device or being traced, stay what they are."""
    try:
        return x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    except ValueError:
        raise UserError(f"{name} must be an array: the parts of this list differ in shape") from None
