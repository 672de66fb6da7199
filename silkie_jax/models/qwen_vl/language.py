"""The Qwen-7B decoder: RMSNorm, rotary embedding, dynamic NTK, log-n attention, SwiGLU (official modeling_qwen.py)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.nn.attention import Attend, attention
from silkie_jax.nn.kept import Keeper, Kept
from silkie_jax.nn.lora import Linear, linears
from silkie_jax.nn.precision import precision
from silkie_jax.nn.quantize import decode, encode_array
from silkie_jax.nn.stack import scan, stack


class RMSNorm(nnx.Module):
    """Normalised in float32, scaled in the type of the input, as the official code does."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype), axes=("embed",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Rotation(NamedTuple):
    """What positions do to queries and keys; the same for all layers, in float32."""

    cos: Float[Array, "B T D"]
    sin: Float[Array, "B T D"]
    logn: Float[Array, "B T"] | None  # scale of the query, evaluation mode beyond seq_length only


def ntk_alpha(config: QwenVLConfig, length: int) -> float:
    """Dynamic NTK factor for a padded length: 1 up to seq_length, then 3, 7, ... (official get_ntk_alpha)."""
    if not config.use_dynamic_ntk or length <= config.seq_length:
        return 1.0
    return float(max(2 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1, 1))


def frequencies(config: QwenVLConfig, alpha: float) -> Float[np.ndarray, "D"]:
    """Radians by which one position turns each of a head's numbers, under an NTK factor; in float32."""
    d = config.head_dim
    base = np.float32(config.rotary_emb_base * alpha ** (d / (d - 2)))
    half = 1 / base ** (np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    return np.concatenate([half, half])


def rotation(
    config: QwenVLConfig,
    positions: Int[Array, "B T"],
    turns: Float[np.ndarray, "D"] | Float[Array, "B 1 D"],
    train: bool,
) -> Rotation:
    """Angles of half-split rotary embedding at `positions`, under the `frequencies` of all rows or of each.

    `train` switches log-n scaling off, as officially.
    """
    angles = positions[..., None].astype(jnp.float32) * turns
    logn = None
    if config.use_logn_attn and not train:
        scale = jnp.log(positions + 1.0) / math.log(config.seq_length)
        logn = jnp.where(positions + 1 > config.seq_length, scale, 1.0)
    return Rotation(jnp.cos(angles), jnp.sin(angles), logn)


def rotate(x: Float[Array, "B T H D"], r: Rotation) -> Float[Array, "B T H D"]:
    """Applies the rotary embedding in float32."""
    x32 = x.astype(jnp.float32)
    left, right = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x32 * r.cos[:, :, None] + turned * r.sin[:, :, None]).astype(x.dtype)


class Cache(NamedTuple):
    """Keys and values of all layers; `length` slots are filled."""

    k: Float[Array, "L B S H D"]
    v: Float[Array, "L B S H D"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: QwenVLConfig, batch: int, size: int, dtype: jnp.dtype) -> "Cache":
        shape = (config.num_hidden_layers, batch, size, config.num_attention_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


class Attention(nnx.Module):
    """`c_attn` is the fused projection [q | k | v], kept as [3, heads * head_dim] so that heads can be sharded."""

    def __init__(self, config: QwenVLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.attention_width
        self.heads = config.num_attention_heads
        self.c_attn = Linear(width, (3, inner), (None, "heads", "embed"), dtype=dtype, rngs=rngs)
        self.c_proj = Linear(inner, (width,), ("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)

    def qkv(self, x: Float[Array, "B T W"], r: Rotation, adapter: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values, each [B, T, H, D]."""
        qkv = self.c_attn(x, adapter)  # [B, T, 3, H * D]
        qkv = qkv.reshape(*qkv.shape[:3], self.heads, -1)
        q, k, v = rotate(qkv[:, :, 0], r), rotate(qkv[:, :, 1], r), qkv[:, :, 2]
        if r.logn is not None:
            q = q * r.logn[:, :, None, None].astype(q.dtype)
        return q, k, v

    def out(self, y: Float[Array, "B T H D"], adapter: bool) -> Float[Array, "B T W"]:
        return self.c_proj(y.reshape(*y.shape[:2], -1), adapter)


class Mlp(nnx.Module):
    """c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, config: QwenVLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.mlp_width
        self.w1 = Linear(width, (hidden,), ("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.w2 = Linear(width, (hidden,), ("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.c_proj = Linear(hidden, (width,), ("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... W"], adapter: bool = True) -> Float[Array, "... W"]:
        return self.c_proj(self.w1(x, adapter) * jax.nn.silu(self.w2(x, adapter)), adapter)


class Block(nnx.Module):
    def __init__(self, config: QwenVLConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon, dtype)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon, dtype)
        self.mlp = Mlp(config, dtype, rngs)

    def __call__(
        self, x: Float[Array, "B T W"], r: Rotation, attend: Attend, adapter: bool = True
    ) -> Float[Array, "B T W"]:
        q, k, v = self.attn.qkv(self.ln_1(x), r, adapter)
        x = x + self.attn.out(attend(q, k, v), adapter)
        return x + self.mlp(self.ln_2(x), adapter)

    def keeping(
        self, x: Float[Array, "B T W"], r: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T W"], tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]]:
        """Like `__call__`, and gives the keys and values as well."""
        q, k, v = self.attn.qkv(self.ln_1(x), r, adapter=True)
        x = x + self.attn.out(attend(q, k, v), adapter=True)
        return x + self.mlp(self.ln_2(x)), (k, v)

    def step(
        self, x: Float[Array, "B 1 W"], r: Rotation, places: Int[Array, "B"], kept: Kept, keeper: Keeper
    ) -> tuple[Float[Array, "B 1 W"], Kept]:
        """Like `__call__` for one more token of each slot, which sees what is kept up to its own place."""
        q, k, v = self.attn.qkv(self.ln_1(x), r, adapter=True)
        kept = keeper.keep_tokens(kept, k, v, places)
        x = x + self.attn.out(keeper.attend(q, kept, places), adapter=True)
        return x + self.mlp(self.ln_2(x)), kept

    def cached(
        self,
        x: Float[Array, "B T W"],
        r: Rotation,
        mask: Bool[Array, "B T S"],
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[Float[Array, "B T W"], Cache]:
        """Like `__call__`, but the T new tokens also see what the cache holds, and are added to it."""
        q, k, v = self.attn.qkv(self.ln_1(x), r, adapter=True)
        start = (layer, 0, cache.length, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.k, k[None], start)
        values = jax.lax.dynamic_update_slice(cache.v, v[None], start)
        x = x + self.attn.out(attention(q, keys[layer], values[layer], mask), adapter=True)
        return x + self.mlp(self.ln_2(x)), Cache(keys, values, cache.length)


class Decoder(nnx.Module):
    """Embeddings of tokens and images in, normalised hidden states out; `logits` meets the vocabulary."""

    def __init__(self, config: QwenVLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        init = nnx.initializers.normal(0.02)
        self.wte = nnx.Param(init(rngs.params(), (config.vocab_size, width), dtype), axes=("vocab", "embed"))
        self.wte_scale = nnx.data(None)  # [vocab], where `wte` holds codes (nn/quantize.py)
        self.layers = stack(lambda rngs: Block(config, dtype, rngs), config.num_hidden_layers, rngs)
        self.ln_f = RMSNorm(width, config.layer_norm_epsilon, dtype)
        self.lm_head = Linear(width, (config.vocab_size,), ("vocab", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def embed(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T W"]:
        """The vectors of tokens."""
        if self.wte_scale is None:
            return self.wte[...].astype(dtype)[tokens]
        return decode(self.wte[...][tokens], self.wte_scale[...][tokens], dtype)

    def quantize(self, method: str = "int8") -> None:
        """Keeps the weights of the layers as codes, with int8 the embeddings, too.

        Norms, biases and the head stay what they are: the first two are small, and the head would be decoded as a whole
        on a GPU, so that nothing were gained. Embeddings are multiplied with nothing: fp8 would save no time there.
        """
        for _, linear in linears(self.layers):
            linear.quantize(method)
        if method != "int8":
            return
        codes, scale = encode_array(self.wte[...])
        self.wte, self.wte_scale = nnx.Param(codes, axes=self.wte.axes), nnx.Param(scale, axes=self.wte.axes[:-1])

    def __call__(
        self,
        x: Float[Array, "B T W"],
        r: Rotation,
        attend: Attend,
        *,
        adapter: bool = True,
        wrap: Callable | None = None,
    ) -> Float[Array, "B T W"]:
        x = scan(self.layers, x, lambda block, x: block(x, r, attend, adapter), wrap)
        return self.ln_f(x)

    def cached(
        self, x: Float[Array, "B T W"], r: Rotation, mask: Bool[Array, "B T S"], cache: Cache
    ) -> tuple[Float[Array, "B T W"], Cache]:
        """The hidden states of T more tokens. The cache is carried, not stacked, so that it is updated in place."""
        graph, state = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, Cache, jax.Array], state: nnx.State):
            x, cache, layer = carry
            x, cache = nnx.merge(graph, state).cached(x, r, mask, cache, layer)
            return (x, cache, layer + 1), None

        (y, cache, _), _ = jax.lax.scan(body, (x, cache, jnp.int32(0)), state)
        return self.ln_f(y), cache._replace(length=cache.length + x.shape[1])

    def prefill(
        self, x: Float[Array, "B T W"], r: Rotation, attend: Attend
    ) -> list[tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]]:
        """The keys and values of whole prompts in each layer of a model that is `apart`; the rest is up to `step`."""
        kept = []
        for block in self.layers:
            x, keys_and_values = block.keeping(x, r, attend)
            kept.append(keys_and_values)
        return kept

    def step(
        self, x: Float[Array, "B 1 W"], r: Rotation, places: Int[Array, "B"], kept: tuple[Kept, ...], keeper: Keeper
    ) -> tuple[Float[Array, "B 1 W"], tuple[Kept, ...]]:
        """The hidden states of one more token of each slot of a model that is `apart`, kept at `places`.

        A place beyond the last one is dropped.
        """
        layers = []
        for block, layer in zip(self.layers, kept, strict=True):
            x, layer = block.step(x, r, places, layer, keeper)
            layers.append(layer)
        return self.ln_f(x), tuple(layers)

    def logits(self, hidden: Float[Array, "... W"]) -> Float[Array, "... V"]:
        """float32 scores of the vocabulary."""
        weight = self.lm_head.weight[...].astype(hidden.dtype)
        return jnp.einsum(
            "...w,vw->...v",
            hidden,
            weight,
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
