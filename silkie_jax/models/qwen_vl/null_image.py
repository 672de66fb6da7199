"""An image that shows nothing, in the place of each image: what a model says of a picture when it cannot see it.

It enters behind the normalisation of pixels: the mean colour is zero there, and no uint8 pixel is.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PLAIN, Kernel

Kind = Literal["mean", "tokens", "noise"]


@dataclasses.dataclass(frozen=True)
class NullImage:
    """How nothing looks.

    Attributes:
      kind: `mean`, the mean colour (V-DPO's release); `tokens`, zeros in the place of the image's features (its
        paper); `noise`, pixels from the normal distribution that normalisation assumes.
      draws: of `noise`, over which log-probabilities are averaged. They are the same in every run.
    """

    kind: Kind = "mean"
    draws: int = 1

    def __str__(self) -> str:
        return f"null {self.kind}" + (f" {self.draws}" if self.kind == "noise" else "")


def keep_null(model: QwenVL, null: NullImage, features: Float[Array, "N 256 W"]) -> None:
    """Lets a model without its tower keep what that makes of a null image: a constant, which nobody trains."""
    model.nulls[str(null)] = nnx.Variable(features, axes=(None, None, None))


def null_features(
    model: QwenVL, null: NullImage, wrap: Callable | None = None, kernel: Kernel = PLAIN
) -> Float[Array, "N 256 W"]:
    """The rows that stand for the null image, of each draw; of a model without its tower those that it keeps."""
    if null.kind == "tokens":
        return jnp.zeros((1, IMAGE_TOKENS, model.config.hidden_size), model.dtype)
    if model.visual is None:
        return model.nulls[str(null)][...]
    side = model.config.visual.image_size
    shape = (null.draws, side, side, 3)
    pixels = jax.random.normal(jax.random.key(0), shape) if null.kind == "noise" else jnp.zeros(shape)
    return model.encode_images(pixels, wrap, kernel)
