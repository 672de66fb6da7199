"""The vision tower: OpenCLIP ViT-bigG over 14x14 patches, then a cross-attention resampler to 256 tokens.

Follows the official visual.py; every LayerNorm has epsilon 1e-6, the GELU is exact, the convolution has no bias.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, VisionConfig
from silkie_jax.nn.attention import Attend, attention
from silkie_jax.nn.lora import Linear, linears
from silkie_jax.nn.precision import precision
from silkie_jax.nn.stack import scan, stack

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class LayerNorm(nnx.Module):
    """Layer normalisation, computed in float32."""

    def __init__(self, width: int, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((width,), dtype), axes=("embed",))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + 1e-6)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention. `in_proj` is laid out [head][q, k, v][head_dim], which a free view turns into its shape."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads, dim, width = config.heads, config.head_dim, config.width
        axes = ("heads", None, None, "embed")
        self.in_proj = Linear(width, (heads, 3, dim), axes, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(width, (width,), ("embed", "heads"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "N P W"], attend: Attend = attention) -> Float[Array, "N P W"]:
        qkv = self.in_proj(x)  # [N, P, H, 3, D]
        y = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        return self.out_proj(y.reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, config: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = config.width, config.mlp_width
        self.c_fc = Linear(width, (hidden,), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.c_proj = Linear(hidden, (width,), ("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, config: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.width, dtype)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = LayerNorm(config.width, dtype)
        self.mlp = Mlp(config, dtype, rngs)

    def __call__(self, x: Float[Array, "N P W"], attend: Attend = attention) -> Float[Array, "N P W"]:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class PoolAttention(nnx.Module):
    """torch.nn.MultiheadAttention: [q; k; v] blocks in one projection."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim = config.output_dim
        self.heads = config.pool_heads
        self.in_proj = Linear(dim, (3, dim), (None, "heads", "embed"), dtype=dtype, rngs=rngs)
        self.out_proj = Linear(dim, (dim,), ("embed", "heads"), dtype=dtype, rngs=rngs)

    def __call__(
        self,
        query: Float[Array, "N Q D"],
        key: Float[Array, "N P D"],
        value: Float[Array, "N P D"],
        attend: Attend = attention,
    ) -> Float[Array, "N Q D"]:
        weight, bias = self.in_proj.weight[...], self.in_proj.bias[...]

        def project(x: jax.Array, block: int) -> jax.Array:  # [N, T, D] -> [N, T, H, D / H]
            w, b = weight[block].astype(x.dtype), bias[block].astype(x.dtype)
            y = jnp.einsum("ntd,ed->nte", x, w, precision=precision(x.dtype)) + b
            return y.reshape(*y.shape[:2], self.heads, -1)

        y = attend(project(query, 0), project(key, 1), project(value, 2))
        return self.out_proj(y.reshape(query.shape))


class Resampler(nnx.Module):
    """256 learned queries attend to the patches. The query's positions are stored as they are, never interpolated."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim = config.output_dim
        init = nnx.initializers.normal(0.02)
        self.query = nnx.Param(init(rngs.params(), (IMAGE_TOKENS, dim), dtype), axes=(None, "embed"))
        self.pos_embed = nnx.Param(init(rngs.params(), (IMAGE_TOKENS, dim), dtype), axes=(None, "embed"))
        self.kv_proj = Linear(config.width, (dim,), ("heads", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.attn = PoolAttention(config, dtype, rngs)
        self.ln_q = LayerNorm(dim, dtype)
        self.ln_kv = LayerNorm(dim, dtype)

    def __call__(self, x: Float[Array, "N P W"], attend: Attend = attention) -> Float[Array, "N Q D"]:
        n, patches, _ = x.shape
        positions = self.pos_embed[...].astype(x.dtype)
        value = self.ln_kv(self.kv_proj(x))
        key = value + interpolate_positions(self.pos_embed[...], patches).astype(x.dtype)
        query = self.ln_q(self.query[...].astype(x.dtype)) + positions
        return self.attn(jnp.broadcast_to(query, (n, *query.shape)), key, value, attend)


class VisionTower(nnx.Module):
    """Pixels to the 256 rows that take the place of an image's tokens."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        width, dim = config.width, config.output_dim
        init = nnx.initializers.normal(0.02)
        inputs = 3 * config.patch_size**2
        self.conv1 = Linear(inputs, (width,), ("embed", None), bias=False, dtype=dtype, rngs=rngs)
        table = init(rngs.params(), (IMAGE_TOKENS, width), dtype)
        self.positional_embedding = nnx.Param(table, axes=(None, "embed"))
        self.ln_pre = LayerNorm(width, dtype)
        self.layers = stack(lambda rngs: Block(config, dtype, rngs), config.layers, rngs)
        self.attn_pool = Resampler(config, dtype, rngs)
        self.ln_post = LayerNorm(dim, dtype)
        self.proj = nnx.Param(init(rngs.params(), (dim, dim), dtype), axes=("embed", "heads"))

    def quantize(self, method: str = "int8") -> None:
        """Keeps the weights of the layers as codes (nn/quantize.py); the resampler, a ninth of the tower, stays."""
        for _, linear in linears(self.layers):
            linear.quantize(method)

    def __call__(
        self,
        images: UInt8[Array, "N S S 3"] | Float[Array, "N S S 3"],
        dtype: jnp.dtype,
        wrap: Callable | None = None,
        attend: Attend = attention,
    ) -> Float[Array, "N 256 D"]:
        """Encodes images in `dtype`: pixels, or floats that are normalised already.

        `wrap` wraps each block, as `jax.checkpoint` does.
        """
        x = self.embed_patches(images, dtype)
        x = scan(self.layers, x, lambda block, x: block(x, attend), wrap)
        return self.pool(x, attend)

    def embed_patches(
        self, images: UInt8[Array, "N S S 3"] | Float[Array, "N S S 3"], dtype: jnp.dtype
    ) -> Float[Array, "N P W"]:
        """Normalises, cuts into patches, projects, adds positions, ln_pre."""
        x = self.conv1(patches(images, self.config.patch_size).astype(dtype))
        positions = interpolate_positions(self.positional_embedding[...], x.shape[1])
        return self.ln_pre(x + positions.astype(dtype))

    def pool(self, x: Float[Array, "N P W"], attend: Attend = attention) -> Float[Array, "N 256 D"]:
        """The resampler, ln_post and the last projection: what `train_vision: resampler` trains."""
        x = self.ln_post(self.attn_pool(x, attend))
        return jnp.matmul(x, self.proj[...].astype(x.dtype), precision=precision(x.dtype))


def patches(images: UInt8[Array, "N S S 3"] | Float[Array, "N S S 3"], size: int) -> Float[Array, "N P I"]:
    """Pixels scaled to CLIP's mean and deviation, one flattened [3, size, size] patch a row, in float32.

    Floats are scaled already.
    """
    mean, std = (jnp.asarray(c, jnp.float32) for c in (CLIP_MEAN, CLIP_STD))
    x = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        x = (x / 255 - mean) / std
    n, side = x.shape[0], x.shape[1] // size
    x = x.reshape(n, side, size, side, size, 3)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, side * side, -1)


def interpolate_positions(table: Float[Array, "S W"], count: int) -> Float[Array, "P W"]:
    """Brings a square table of positions to `count` patches (official get_abs_pos), in float32."""
    source, target = round(table.shape[0] ** 0.5), round(count**0.5)
    if source == target:
        return table
    weights = jnp.asarray(_bicubic(source, target), jnp.float32)  # [target, source]
    grid = table.astype(jnp.float32).reshape(source, source, -1)
    high = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("as,stw->atw", weights, grid, precision=high)
    grid = jnp.einsum("bt,atw->abw", weights, grid, precision=high)
    return grid.reshape(target * target, -1)


@functools.cache
def _bicubic(source: int, target: int) -> np.ndarray:
    """torch's bicubic as a matrix [target, source]: a = -0.75, half-pixel centres, edges repeated, no antialias.

    (jax.image.resize uses a = -0.5, which moves the model's logits by 0.5.)
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((target, source))
    for tap in range(4):
        d = np.abs(centre - (first + tap))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(matrix, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(d <= 1, near, far))
    return matrix
