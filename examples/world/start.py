"""The weights that the base's training starts from: a Qwen-VL of 1.8 million parameters in the official form.

Nothing in it is learned, but it is not arbitrary either, since little can be learned in an hour on two cores:

- The vocabulary has a token for every word of the world.
- The patch embedding is a bank of cosines (the discrete cosine transform of JPEG) in brightness and two colour
  differences, so that the colours and edges of a patch lie in it linearly. Slow waves are the stronger ones: colours,
  which three filters hold, would else drown in edges.
- The resampler's queries look at the patch that lies where they do, and hand on what they see.
- The rest is random at the usual scale, outputs into a residual stream divided by the square root of their number.
"""

import base64
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from examples.tiny_qwen_vl import GRID, learn_bpe, make_config, sine_table, write_weights
from examples.world import curriculum, habits, questions
from examples.world.drawing import draw
from examples.world.scenes import scenes

SIZES: dict[str, Any] = {
    "hidden": 128,
    "layers": 3,
    "heads": 2,
    "ff": 320,
    "seq_length": 2048,
    "vision_width": 128,
    "vision_layers": 2,
    "vision_heads": 2,
    "image_size": 112,
}
PATCH = 28
PLACES = 12
"""Channels of the tower that say where a patch lies."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_OPPONENTS = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
"""Rows: brightness, red against green, yellow against blue."""
_SAMPLE = 256  # pictures that the bank is scaled by


def words(seed: int = 0, count: int = 400) -> str:
    """Text in which every word of the world occurs, and those of the prompt's form around it."""
    rng = random.Random(seed)
    said = ["system\nYou are a helpful assistant.\nuser\nassistant\nPicture 1: ", *questions.DESCRIBE]
    said += [curriculum.CHECK, curriculum.ASK_AND_ANSWER]
    for scene in itertools.islice(scenes(seed, "train"), count):
        said.append(questions.describe(scene))
        for task in questions.tasks_of(scene):
            for wanted in (True, False):
                question = questions.yes_no(scene, rng, task, wanted)
                said += [question.text + questions.YES_NO, question.answer, question.agreement, question.short]
        said += [claim for claims in curriculum.claims(scene, rng).values() for claim, _ in claims]
        said += [habit(scene, questions.description(scene, rng), rng) for habit in habits.HABITS.values()]
        said += [one for q in [questions.open_question(scene, rng)] for one in (q.text, q.answer)]
    return "\n".join(said)


def make_start(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Write the checkpoint to `folder` and return it; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learn_bpe(words(), merges=10_000)
    patch = sizes.pop("patch", PATCH)
    config = make_config(len(ranks), **(SIZES | sizes))
    config["visual"]["patch_size"] = patch
    write_weights(folder, start_tensors(config, seed), "float32", shards=1, safetensors=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    generation = {
        "chat_format": "chatml",
        "eos_token_id": len(ranks),
        "pad_token_id": len(ranks),
        "max_window_size": 6144,
        "max_new_tokens": 256,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.5,
    }
    tokenizer = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    for name, value in (("generation_config", generation), ("tokenizer_config", tokenizer), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    return folder


def start_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its official name, float32."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    width, ff, depth = config["hidden_size"], config["intermediate_size"] // 2, config["num_hidden_layers"]

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        tensors[name] = (gain / np.sqrt(columns) * rng.standard_normal((rows, columns))).astype(np.float32)

    def norm(name: str, size: int, weight: float = 1.0, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = np.full(size, weight, np.float32)
        if bias:
            tensors[f"{name}.bias"] = np.zeros(size, np.float32)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        matrix(f"{name}.weight", rows, columns, gain)
        tensors[f"{name}.bias"] = np.zeros(rows, np.float32)

    matrix("transformer.wte.weight", config["vocab_size"], width, gain=0.2 * np.sqrt(width))
    out = 1 / np.sqrt(2 * depth)
    for i in range(depth):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1", width, bias=False)
        linear(f"{block}.attn.c_attn", 3 * width, width)
        matrix(f"{block}.attn.c_proj.weight", width, width, gain=out)
        norm(f"{block}.ln_2", width, bias=False)
        matrix(f"{block}.mlp.w1.weight", ff, width)
        matrix(f"{block}.mlp.w2.weight", ff, width)
        matrix(f"{block}.mlp.c_proj.weight", width, ff, gain=out)
    norm("transformer.ln_f", width, bias=False)

    visual, tower = config["visual"], "transformer.visual"
    eye = np.eye(width, dtype=np.float32)
    bank, mean = filter_bank(visual["width"] - PLACES, visual["patch_size"], visual["image_size"])
    bank = np.concatenate([bank, np.zeros((PLACES, *bank.shape[1:]), np.float32)])
    tensors[f"{tower}.positional_embedding"] = np.concatenate(
        [np.tile(-mean, (GRID * GRID, 1)), place_codes()], axis=1, dtype=np.float32
    )
    tensors[f"{tower}.proj"] = 0.2 * eye
    tensors[f"{tower}.conv1.weight"] = bank
    norm(f"{tower}.ln_pre", visual["width"])
    out, inner = 0.5 / np.sqrt(2 * visual["layers"]), int(visual["width"] * visual["mlp_ratio"])
    for i in range(visual["layers"]):
        block = f"{tower}.transformer.resblocks.{i}"
        norm(f"{block}.ln_1", visual["width"])
        norm(f"{block}.ln_2", visual["width"])
        linear(f"{block}.attn.in_proj", 3 * visual["width"], visual["width"])
        linear(f"{block}.attn.out_proj", visual["width"], visual["width"], gain=out)
        linear(f"{block}.mlp.c_fc", inner, visual["width"])
        linear(f"{block}.mlp.c_proj", visual["width"], inner, gain=out)
    pool = f"{tower}.attn_pool"
    tensors[f"{pool}.pos_embed"] = sine_table(width).astype(np.float32)
    tensors[f"{pool}.query"] = (0.02 * rng.standard_normal((256, width))).astype(np.float32)
    if visual["width"] == width:
        tensors[f"{pool}.kv_proj.weight"] = eye
    else:
        matrix(f"{pool}.kv_proj.weight", width, visual["width"])
    tensors[f"{pool}.attn.in_proj_weight"] = np.concatenate([4 * eye, 4 * eye, eye])
    tensors[f"{pool}.attn.in_proj_bias"] = np.zeros(3 * width, np.float32)
    tensors[f"{pool}.attn.out_proj.weight"] = eye
    tensors[f"{pool}.attn.out_proj.bias"] = np.zeros(width, np.float32)
    norm(f"{pool}.ln_q", width, weight=0.1)
    norm(f"{pool}.ln_kv", width, weight=0.1)
    norm(f"{tower}.ln_post", width)

    matrix("lm_head.weight", config["vocab_size"], width, gain=0.5)
    return tensors


def grow(before: Path, after: Path, more: int, seed: int = 0) -> Path:
    """Write the checkpoint of `before` to `after` with `more` layers in its decoder; what it computes stays the same.

    A new layer stands behind each of the last layers. Its outputs are 0 to begin with, as in Net2Net (Chen et al. 2016,
    arXiv 1511.05641): what was learned is kept, and there is room for answers that take more than one look.
    """
    after.mkdir(parents=True, exist_ok=True)
    config = json.loads((before / "config.json").read_text())
    (weights,) = before.glob("*.safetensors")
    found, depth = load_file(weights), config["num_hidden_layers"]
    rng = np.random.default_rng(seed)
    places = [old for k in range(depth) for old in ((k,) if k < depth - more else (k, None))]
    tensors = {name: array for name, array in found.items() if ".h." not in name}
    for place, old in enumerate(places):
        for name, array in found.items():
            if not name.startswith(f"transformer.h.{old or 0}."):
                continue
            if old is None:
                array = _new(name, array, rng)
            tensors[f"transformer.h.{place}.{name.split('.', 3)[3]}"] = array
    for file in ("generation_config.json", "tokenizer_config.json", "qwen.tiktoken"):
        shutil.copy(before / file, after / file)
    write_weights(after, tensors, "float32", shards=1, safetensors=True)
    config["num_hidden_layers"] = len(places)
    (after / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return after


def _new(name: str, like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tensor of a layer that does nothing yet."""
    if like.ndim == 1:
        return np.full_like(like, not name.endswith(".bias"))
    gain = 0.0 if "c_proj" in name else 1 / np.sqrt(like.shape[1])
    return (gain * rng.standard_normal(like.shape)).astype(np.float32)


def place_codes() -> np.ndarray:
    """Where a patch lies, [256, PLACES]: which of four rows, of four columns and of four quarters, one of each.

    Left and right are told by nothing else: the decoder's own positions run through the rows, so that above and below
    are near to it and far from it, but left and right are not. Quarters, which descriptions name, are told loudest.
    """
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    quarter = row * 2 // GRID * 2 + column * 2 // GRID
    lines = [3.0 * np.eye(4)[4 * line // GRID] for line in (row, column)]
    return np.concatenate([*lines, 6.0 * np.eye(4)[quarter]], axis=1)


def filter_bank(width: int, patch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch embedding [width, 3, patch, patch] and the mean of its outputs over pictures [width].

    The deviation of an output over pictures is 4 / (1 + the number of half waves over the patch, both ways).
    """
    cosines = np.cos(np.pi * np.outer(np.arange(patch), np.arange(patch) + 0.5) / patch)  # [frequency, pixel]
    order = sorted(itertools.product(range(patch), repeat=2), key=lambda uv: (uv[0] + uv[1], abs(uv[0] - uv[1]), uv))
    shares = (width - 2 * (width // 4), width // 4, width // 4)
    bank = np.stack(
        [
            channel[:, None, None] * np.outer(cosines[u], cosines[v])
            for channel, share in zip(_OPPONENTS, shares, strict=True)
            for u, v in order[:share]
        ]
    )  # [width, 3, patch, patch]
    seen = itertools.islice(scenes("filter bank", "train"), _SAMPLE)
    pixels = np.stack([np.asarray(draw(scene).resize((side, side), 3)) for scene in seen])
    pixels = (pixels / 255 - _CLIP_MEAN) / _CLIP_STD
    rows = side // patch
    cut = pixels.reshape(_SAMPLE, rows, patch, rows, patch, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch**2)
    found = cut @ bank.reshape(width, -1).T
    waves = [u + v for share in shares for u, v in order[:share]]
    scale = 4 / (1 + np.array(waves)) / found.std(0)
    return (bank * scale[:, None, None, None]).astype(np.float32), (found * scale).mean(0)
