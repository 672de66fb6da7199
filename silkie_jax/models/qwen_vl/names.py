"""The one table of Hugging Face names and our parameter tree. Nothing else in the project knows a Hugging Face name.

Every array keeps PyTorch's orientation and order of elements, so a stacked leaf of ours is its layers' official
tensors one after another: conversion reshapes and never permutes.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
from flax import nnx

from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.models.qwen_vl.model import PARTS, QwenVL

# Ours, theirs ({} is the layer's number), their shape in the letters of `_sizes`; in the official order.
TABLE = [
    ("language.wte", "transformer.wte.weight", "V D"),
    ("language.layers.ln_1.weight", "transformer.h.{}.ln_1.weight", "D"),
    ("language.layers.attn.c_attn.weight", "transformer.h.{}.attn.c_attn.weight", "3A D"),  # [q | k | v]
    ("language.layers.attn.c_attn.bias", "transformer.h.{}.attn.c_attn.bias", "3A"),
    ("language.layers.attn.c_proj.weight", "transformer.h.{}.attn.c_proj.weight", "D A"),
    ("language.layers.ln_2.weight", "transformer.h.{}.ln_2.weight", "D"),
    ("language.layers.mlp.w1.weight", "transformer.h.{}.mlp.w1.weight", "F D"),
    ("language.layers.mlp.w2.weight", "transformer.h.{}.mlp.w2.weight", "F D"),
    ("language.layers.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight", "D F"),
    ("language.ln_f.weight", "transformer.ln_f.weight", "D"),
    ("visual.positional_embedding", "transformer.visual.positional_embedding", "Q W"),
    ("visual.proj", "transformer.visual.proj", "D D"),
    ("visual.conv1.weight", "transformer.visual.conv1.weight", "W 3 P P"),
    ("visual.ln_pre.weight", "transformer.visual.ln_pre.weight", "W"),
    ("visual.ln_pre.bias", "transformer.visual.ln_pre.bias", "W"),
    ("visual.layers.ln_1.weight", "transformer.visual.transformer.resblocks.{}.ln_1.weight", "W"),
    ("visual.layers.ln_1.bias", "transformer.visual.transformer.resblocks.{}.ln_1.bias", "W"),
    ("visual.layers.ln_2.weight", "transformer.visual.transformer.resblocks.{}.ln_2.weight", "W"),
    ("visual.layers.ln_2.bias", "transformer.visual.transformer.resblocks.{}.ln_2.bias", "W"),
    # [head][q, k, v][head_dim]
    ("visual.layers.attn.in_proj.weight", "transformer.visual.transformer.resblocks.{}.attn.in_proj.weight", "3W W"),
    ("visual.layers.attn.in_proj.bias", "transformer.visual.transformer.resblocks.{}.attn.in_proj.bias", "3W"),
    ("visual.layers.attn.out_proj.weight", "transformer.visual.transformer.resblocks.{}.attn.out_proj.weight", "W W"),
    ("visual.layers.attn.out_proj.bias", "transformer.visual.transformer.resblocks.{}.attn.out_proj.bias", "W"),
    ("visual.layers.mlp.c_fc.weight", "transformer.visual.transformer.resblocks.{}.mlp.c_fc.weight", "M W"),
    ("visual.layers.mlp.c_fc.bias", "transformer.visual.transformer.resblocks.{}.mlp.c_fc.bias", "M"),
    ("visual.layers.mlp.c_proj.weight", "transformer.visual.transformer.resblocks.{}.mlp.c_proj.weight", "W M"),
    ("visual.layers.mlp.c_proj.bias", "transformer.visual.transformer.resblocks.{}.mlp.c_proj.bias", "W"),
    ("visual.attn_pool.pos_embed", "transformer.visual.attn_pool.pos_embed", "Q D"),
    ("visual.attn_pool.query", "transformer.visual.attn_pool.query", "Q D"),
    ("visual.attn_pool.kv_proj.weight", "transformer.visual.attn_pool.kv_proj.weight", "D W"),
    ("visual.attn_pool.attn.in_proj.weight", "transformer.visual.attn_pool.attn.in_proj_weight", "3D D"),  # [q; k; v]
    ("visual.attn_pool.attn.in_proj.bias", "transformer.visual.attn_pool.attn.in_proj_bias", "3D"),
    ("visual.attn_pool.attn.out_proj.weight", "transformer.visual.attn_pool.attn.out_proj.weight", "D D"),
    ("visual.attn_pool.attn.out_proj.bias", "transformer.visual.attn_pool.attn.out_proj.bias", "D"),
    ("visual.attn_pool.ln_q.weight", "transformer.visual.attn_pool.ln_q.weight", "D"),
    ("visual.attn_pool.ln_q.bias", "transformer.visual.attn_pool.ln_q.bias", "D"),
    ("visual.attn_pool.ln_kv.weight", "transformer.visual.attn_pool.ln_kv.weight", "D"),
    ("visual.attn_pool.ln_kv.bias", "transformer.visual.attn_pool.ln_kv.bias", "D"),
    ("visual.ln_post.weight", "transformer.visual.ln_post.weight", "D"),
    ("visual.ln_post.bias", "transformer.visual.ln_post.bias", "D"),
    ("language.lm_head.weight", "lm_head.weight", "V D"),
]

# Buffers that some tools save although the model computes them anew (official _keys_to_ignore_on_load_*).
_COMPUTED = re.compile(r"transformer\.(h\.\d+\.attn\.)?(rotary_emb\.inv_freq|masked_bias)")

_ADAPTER_PREFIX = "base_model.model."
_DECODER = "language.layers."


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of our tree and the official tensors it is made of: one a layer, or just one."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes of one layer
    names: tuple[str, ...]
    official: tuple[int, ...]  # shape of each official tensor

    @property
    def stacked(self) -> bool:
        return len(self.shape) > len(self.axes)

    @property
    def layers(self) -> int:
        return len(self.names)

    @property
    def own(self) -> tuple[int, ...]:
        """Our shape of one layer: a view of `official`."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def module(self) -> str:
        """The official module that has this tensor as its weight, with {} for the layer's number."""
        return next(theirs for ours, theirs, _ in TABLE if ours == self.path).removesuffix(".weight")

    @property
    def adaptable(self) -> bool:
        """Whether this is the weight of a linear layer that can carry an adapter (the decoder's)."""
        return self.path.startswith(_DECODER) and len(self.official) > 1

    @property
    def target(self) -> str:
        """The module's name within a decoder layer, such as attn.c_attn: the same in our tree and officially."""
        return self.path.removeprefix(_DECODER).removesuffix(".weight")


def _sizes(config: QwenVLConfig) -> dict[str, int]:
    v = config.visual
    return {
        **{"V": config.vocab_size, "D": config.hidden_size, "F": config.mlp_width, "3": 3},
        **{"A": config.attention_width, "3A": 3 * config.attention_width, "3D": 3 * config.hidden_size},
        **{"W": v.width, "3W": 3 * v.width, "M": v.mlp_width, "P": v.patch_size, "Q": IMAGE_TOKENS},
    }


def abstract_model(
    config: QwenVLConfig, parts: Sequence[str] = PARTS, quantize: str | None = None, **types: jnp.dtype
) -> QwenVL:
    """The model, or some of its parts, with shapes in place of arrays; `quantize` as in nn/quantize.py."""

    def make() -> QwenVL:
        model = QwenVL(config, rngs=nnx.Rngs(0), parts=parts, **types)
        if quantize:
            model.quantize(quantize)
        return model

    return nnx.eval_shape(make)


def scale_path(path: str) -> str:
    """Where the scales of a leaf lie in a model that keeps its codes."""
    return f"{path}_scale" if path == "language.wte" else path.removesuffix("weight") + "scale"


def leaves(config: QwenVLConfig) -> dict[str, Leaf]:
    """Every array of the model by its dotted path, in the table's order."""
    variables = dict(nnx.to_flat_state(nnx.state(abstract_model(config))))
    sizes = _sizes(config)
    tree = {}
    for ours, theirs, letters in TABLE:
        variable = variables.pop(tuple(ours.split(".")))
        shape, axes = tuple(variable.shape), variable.axes
        names = tuple(theirs.format(i) for i in range(shape[0])) if len(shape) > len(axes) else (theirs,)
        tree[ours] = Leaf(ours, shape, axes, names, tuple(sizes[s] for s in letters.split()))
    assert not variables, f"not in the table: {list(variables)}"
    return tree


def official_tensors(tree: Mapping[str, Leaf]) -> Iterator[tuple[str, Leaf, int]]:
    """Every official tensor as (name, leaf, layer), in the official order: layer by layer."""
    waiting: list[Leaf] = []

    def flush() -> Iterator[tuple[str, Leaf, int]]:
        for layer in range(waiting[0].layers if waiting else 0):
            yield from ((leaf.names[layer], leaf, layer) for leaf in waiting)
        waiting.clear()

    for leaf in tree.values():
        if waiting and leaf.layers != waiting[0].layers:
            yield from flush()
        waiting.append(leaf)
    yield from flush()


def misfits(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], lost: Iterable[str] = ()
) -> list[str]:
    """What keeps `found` from being `expected`, in words. `lost` tensors are reported elsewhere."""
    lost = set(lost)
    missing = [name for name in expected if name not in found and name not in lost]
    unknown = [name for name in found if name not in expected and not _COMPUTED.fullmatch(name)]
    wrong = [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("not part of this model", unknown), ("wrong shape", wrong))
    return [f"{kind}: {shorten(names)}" for kind, names in kinds if names]


def shorten(items: list[str], limit: int = 50) -> str:
    """`a, b, c`, or the first ones and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def adapter_names(leaf: Leaf, layer: int) -> tuple[str, str]:
    """PEFT's names of the two factors of one layer's adapter."""
    module = _ADAPTER_PREFIX + leaf.module.format(layer)
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def plain_adapter_name(name: str) -> str:
    """PEFT's name without the adapter's own name, which some versions keep: lora_A.default.weight."""
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)


def foreign_linears(tree: Mapping[str, Leaf]) -> list[str]:
    """Official modules that PEFT could adapt and we cannot, one a kind: those outside the decoder's layers."""
    weights = (leaf for leaf in tree.values() if len(leaf.official) > 1 and not leaf.adaptable)
    return [leaf.module.format(0) for leaf in weights if leaf.names[0].endswith(".weight")]


def decoder_pattern(targets: Iterable[str]) -> str:
    """A regular expression for PEFT's `target_modules` that names modules of the decoder's layers only."""
    return r"transformer\.h\.\d+\.(" + "|".join(map(re.escape, targets)) + ")"
