"""Tiny random models beside their NumPy oracle (the fixtures `pair` and `short_pair`)."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.models.qwen_vl.model import QwenVL
from tests.reference import qwen_vl as reference


class Pair(NamedTuple):
    """A model and the same in NumPy float64."""

    folder: Path
    model: QwenVL
    oracle: reference.QwenVL

    def text(self, *shape: int, seed: int = 0) -> np.ndarray:
        """Random ids of ordinary tokens."""
        return np.random.default_rng(seed).integers(0, self.model.config.end_of_text, shape)

    def image_span(self) -> list[int]:
        start = self.model.config.image_start
        return [start, *[start + 2] * 256, start + 1]

    def pixels(self, count: int, seed: int = 0) -> np.ndarray:
        side = self.model.config.visual.image_size
        return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def make_pair(folder, seq_length: int) -> Pair:
    sizes = {"hidden": 128, "layers": 2, "heads": 4, "ff": 96, "vision_width": 32, "vision_layers": 2}
    make_checkpoint(folder, **sizes, vision_heads=2, image_size=56, seq_length=seq_length)
    return Pair(folder, load_model(folder), reference.QwenVL(*reference.load_checkpoint(folder)))


def layer(stack, index: int):
    """One layer of a stack of layers, as a module."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda x: x[index], state))
