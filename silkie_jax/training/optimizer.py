"""Which parameters training changes, at which rates, and the optimiser that does it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx

_RESAMPLER = ("attn_pool", "ln_post", "proj")
_FIXED = ("visual", "attn_pool", "pos_embed")  # a table of sines: the official code never trains it


def part_of(path: tuple) -> str:
    """The part of the model that a parameter belongs to: decoder (adapters, too), resampler, or vision."""
    if path[0] != "visual":
        return "decoder"
    return "resampler" if path[1] in _RESAMPLER else "vision"


def trainable_filter(*, lora: bool, train_vision: str) -> Callable[[tuple, Any], bool]:
    """Which parameters training changes: adapters or the whole decoder, and as much of the vision tower as asked."""

    def chosen(path: tuple, value: Any) -> bool:
        if not isinstance(value, nnx.Param) or path == _FIXED:
            return False
        match part_of(path):
            case "vision":
                return train_vision == "all"
            case "resampler":
                return train_vision in ("resampler", "all")
            case _:
                return isinstance(value, nnx.LoRAParam) or not lora

    return chosen


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    decayed: Any = None,
    ratios: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm.

    Args:
      learning_rate: of an update's number.
      decayed: masks what weight decay touches.
      ratios: of parts (`part_of`) that have another learning rate, theirs over the common one. AdamW's update is
        -rate x (moments' ratio + decay x weight), so that scaling all of it is exactly AdamW at that rate. Moments and
        clipping stay those of all parameters together, and the optimiser's state the same whatever the rates are.
    """
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts.append(optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decayed))
    if ratios:
        parts.append(_scaled(ratios))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _scaled(ratios: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of parts by factors."""

    def scale(path: tuple, update: nnx.Variable) -> nnx.Variable:
        part = part_of(path)
        return update.replace(update[...] * ratios[part]) if part in ratios else update

    return optax.stateless(lambda updates, _: nnx.map_state(scale, updates))


def make_schedule(name: str, peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warm-up from 0 over ceil(steps x ratio), then cosine or linear to 0 at `steps`, or constant.

    The rate of an update is that of the updates before it, as in the original: the first one of a warm-up has rate 0.
    """
    warmup = math.ceil(steps * warmup_ratio)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[name]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def decay_mask(trainable: nnx.State) -> nnx.State:
    """True where weight decay applies: everywhere but on biases and norms, as the original's optimiser groups do."""
    return nnx.map_state(
        lambda path, _: path[-1] != "bias" and not any(str(p).startswith("ln_") for p in path), trainable
    )
