"""Reading the reference data of ../shared/golden. Its README says how the arrays were made.

data = Golden(folder)                    # folder: the `golden` fixture
data["one_image/eval_logits"]            # an array of inputs_outputs.npz; data.dpo and data.lora are the others
data.images(tokens)                      # the images that token ids name, uint8 [N, 280, 280, 3] in their order
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

IMAGE_START = 1070
LANGUAGE_CASES = (
    "text_short",
    "one_image",
    "two_images",
    "batch_right_pad",
    "long_alpha3_image",
    "long_alpha7_text",
    "exact_seq_length",
    "seq_length_plus_1",
    "batch_pad_beyond_seq_length",
)


class Golden:
    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = folder / "tiny-qwen-vl"
        self.adapter = folder / "lora_adapter"
        self.arrays = np.load(folder / "inputs_outputs.npz")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays.files

    @cached_property
    def dpo(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "dpo.npz"))

    @cached_property
    def lora(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "lora.npz"))

    @cached_property
    def policy_overrides(self) -> dict[str, np.ndarray]:
        """The tensors in which the policy of the DPO batches differs from tiny-qwen-vl."""
        return load_file(self.folder / "policy_overrides.safetensors")

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    @cached_property
    def resized(self) -> np.ndarray:
        return self["vision/resized_uint8"]

    @cached_property
    def names(self) -> list[str]:
        """The images' paths in the order of `resized`."""
        return sorted(name.removeprefix("image_rgb/") for name in self.arrays.files if name.startswith("image_rgb/"))

    def image_indices(self, tokens: np.ndarray) -> list[int]:
        """Which image each <img> of the token ids [B, T] names: the span holds its path as bytes."""
        indices = []
        for row, start in np.argwhere(np.asarray(tokens) == IMAGE_START):
            span = np.asarray(tokens)[row, start + 1 : start + 257]
            indices.append(self.names.index(bytes(span[span < 256].tolist()).decode()))
        return indices

    def images(self, tokens: np.ndarray) -> np.ndarray | None:
        indices = self.image_indices(tokens)
        return self.resized[indices] if indices else None

    def pairs(self, batch: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, labels and mask of a DPO batch: the chosen rows, then the rejected ones."""
        return tuple(self.dpo[f"{batch}/concat/concatenated_{k}"] for k in ("input_ids", "labels", "attention_mask"))
