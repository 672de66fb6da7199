"""Qwen-VL in plain NumPy float64: the oracle that the JAX model is compared with.

Slow on purpose: no cache, no fused step, one line per formula, official tensor names, so that it can be checked by
eye against the papers. Sources: Qwen-VL arXiv 2308.12966, OpenCLIP ViT 2212.07143, rotary embedding 2104.09864,
RMSNorm 1910.07467, SwiGLU 2002.05202, LoRA 2106.09685, dynamic NTK and log-n scaling as Qwen 2309.16609, section 2.4.

    from tests.reference.qwen_vl import QwenVL, load_adapter, load_checkpoint, merge

    model = QwenVL(*load_checkpoint(folder))              # official tensor names -> arrays, the config.json dict
    tuned = QwenVL(tensors, config, adapter=load_adapter(peft_folder))     # LoRA on
    merged = QwenVL(merge(tensors, load_adapter(peft_folder)), config)     # the same in one matrix

    model(tokens, images, mask=None, train=False)         # [B, T] ids, [N, S, S, 3] uint8, [B, T] -> logits [B, T, V]
    model.vision(images)                                  # every stage: conv1, plus_pos, ln_pre, block{k}_attn, ... out
    model.image_features(images)                          # [N, 256, D], to be passed on as features=
    model.hidden_states(tokens, images, ...)              # [after embedding, after block 0, ..., after ln_f]
    model(tokens, images, positions=p, branches=b, train=True)             # a row of several branches
    model.greedy(tokens, images, max_new_tokens, mask, stop)               # ids [B, n], logits [B, steps, V]

Losses, log-probabilities, rows of branches and AdamW are in `tests.reference.objective`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16, and so does safetensors
import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf

IMAGE_TOKENS = 256
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_EPSILON = 1e-6
RESAMPLER_HEAD = 128
PADDING, PROMPT = -1, 0  # branches of a row; responses are 1..K

Tensors = Mapping[str, np.ndarray]
Adapter = tuple[Tensors, dict]


def load_checkpoint(folder) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a folder of safetensors in float64, and its config.json."""
    folder = Path(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: array.astype(np.float64) for name, array in load_file(file).items()}
    return tensors, json.loads((folder / "config.json").read_text())


def load_adapter(folder) -> Adapter:
    """A PEFT adapter folder: its tensors in float64, and adapter_config.json."""
    folder = Path(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: array.astype(np.float64) for name, array in tensors.items()}, config


def merge(tensors: Tensors, adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors with W + alpha/r B A in place of every adapted W."""
    merged = dict(tensors)
    low_rank, config = adapter
    for name, a in low_rank.items():
        if name.endswith(".lora_A.weight"):
            b = low_rank[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            merged[target] = tensors[target] + config["lora_alpha"] / config["r"] * (b @ a)
    return merged


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v for q [B, T, H, d], k and v [B, S, H, d]; `visible` is bool [B, T, S].

    Returns [B, T, H * d]. A query that sees nothing gets the mean of v: finite, and of no use.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, d]
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible[:, None], scores, np.finfo(scores.dtype).min)
    mixed = softmax(scores) @ v
    return mixed.swapaxes(1, 2).reshape(*mixed.shape[:1], mixed.shape[2], -1)


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact one, not the tanh approximation."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def interpolate(table: np.ndarray, side: int) -> np.ndarray:
    """Bring a table of positions [g*g, D] to a grid [side*side, D], as torch's bicubic without antialiasing."""
    grid = math.isqrt(len(table))
    m = bicubic_matrix(grid, side)
    image = table.reshape(grid, grid, -1)
    image = np.tensordot(m, image, axes=(1, 0))  # rows
    image = np.tensordot(m, image, axes=(1, 1)).swapaxes(0, 1)  # columns
    return image.reshape(side * side, -1)


def bicubic_matrix(source: int, target: int, a: float = -0.75) -> np.ndarray:
    """[target, source]: each row holds the four weights of cubic convolution (Keys 1981) with parameter `a`.

    The centre of output i lies at (i + 1/2) source/target - 1/2 (align_corners false); beyond the border the border's
    own value is repeated.
    """
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), source - 1)] += near if x <= 1 else far
    return matrix


def rotate(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding, half-split: dimension i turns with dimension i + d/2. x [B, T, H, d], positions [B, T]."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * base ** (-np.arange(half) / half)  # [B, T, 1, d/2]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class QwenVL:
    """The whole model. `tensors` by their official names, `config` as in config.json, `adapter` as from PEFT."""

    def __init__(self, tensors: Tensors, config: dict, adapter: Adapter | None = None):
        self.tensors = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
        self.config = config
        low_rank, lora = adapter or ({}, {"lora_alpha": 0, "r": 1})
        self.low_rank = {name.removeprefix("base_model.model."): np.asarray(x) for name, x in low_rank.items()}
        self.lora_scale = lora["lora_alpha"] / lora["r"]
        self.image_start = config["visual"]["image_start_id"]
        self.end_of_text = self.image_start - 214  # <|endoftext|> comes 214 specials before <img>

    # Layers, by the name of their tensors

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.tensors[f"{name}.weight"].T
        if f"{name}.bias" in self.tensors:
            y = y + self.tensors[f"{name}.bias"]
        if f"{name}.lora_A.weight" in self.low_rank:
            a, b = self.low_rank[f"{name}.lora_A.weight"], self.low_rank[f"{name}.lora_B.weight"]
            y = y + self.lora_scale * (x @ a.T) @ b.T
        return y

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + VISION_EPSILON)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def rms_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config["layer_norm_epsilon"])
        return x * self.tensors[f"{name}.weight"]

    # Vision

    def vision(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every stage of the tower for uint8 images [N, S, S, 3]; `out` [N, 256, D] goes into the token stream."""
        config, tower = self.config["visual"], "transformer.visual"
        patch, heads = config["patch_size"], config["heads"]
        n, size = images.shape[:2]
        side = size // patch
        stages = {}

        x = (np.asarray(images, np.float64) / 255 - CLIP_MEAN) / CLIP_STD
        stages["pixel_values"] = x.transpose(0, 3, 1, 2)  # [N, 3, S, S]
        x = stages["pixel_values"].reshape(n, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.tensors[f"{tower}.conv1.weight"]
        x = x.reshape(n, side * side, -1) @ kernel.reshape(len(kernel), -1).T  # [N, patches, W]
        stages["conv1"] = x
        x = x + interpolate(self.tensors[f"{tower}.positional_embedding"], side)
        stages["plus_pos"] = x
        x = self.layer_norm(f"{tower}.ln_pre", x)
        stages["ln_pre"] = x
        for i in range(config["layers"]):
            block = f"{tower}.transformer.resblocks.{i}"
            mixed = self.linear(f"{block}.attn.in_proj", self.layer_norm(f"{block}.ln_1", x))
            # In this matrix each head's q, k and v lie together.
            q, k, v = np.split(mixed.reshape(n, side * side, heads, -1), 3, axis=-1)
            y = self.linear(f"{block}.attn.out_proj", attend(q, k, v))
            stages[f"block{i}_attn"] = y
            x = x + y
            y = gelu(self.linear(f"{block}.mlp.c_fc", self.layer_norm(f"{block}.ln_2", x)))
            x = x + self.linear(f"{block}.mlp.c_proj", y)
            stages[f"block{i}"] = x
        x = self.resample(x)
        stages["attn_pool"] = x
        x = self.layer_norm(f"{tower}.ln_post", x)
        stages["ln_post"] = x
        stages["out"] = x @ self.tensors[f"{tower}.proj"]
        return stages

    def resample(self, x: np.ndarray) -> np.ndarray:
        """One layer of cross-attention: 256 learned queries read the patches [N, patches, W] -> [N, 256, D]."""
        pool = "transformer.visual.attn_pool"
        positions = self.tensors[f"{pool}.pos_embed"]
        value = self.layer_norm(f"{pool}.ln_kv", self.linear(f"{pool}.kv_proj", x))
        key = value + interpolate(positions, math.isqrt(x.shape[1]))
        query = self.layer_norm(f"{pool}.ln_q", self.tensors[f"{pool}.query"]) + positions
        query = np.broadcast_to(query, (len(x), *query.shape))
        # Here the rows of q, of k and of v lie together.
        weights = np.split(self.tensors[f"{pool}.attn.in_proj_weight"], 3)
        biases = np.split(self.tensors[f"{pool}.attn.in_proj_bias"], 3)
        q, k, v = (
            (y @ w.T + b).reshape(len(x), y.shape[1], -1, RESAMPLER_HEAD)
            for y, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return self.linear(f"{pool}.attn.out_proj", attend(q, k, v))

    def image_features(self, images: np.ndarray) -> np.ndarray:
        return self.vision(images)["out"]

    # Language

    def embed(self, tokens: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        """Token embeddings, the 256 between every <img> and its </img> replaced by the next image's features."""
        x = self.tensors["transformer.wte.weight"][tokens]
        starts = np.argwhere(tokens == self.image_start)
        if len(starts) != (0 if features is None else len(features)):
            raise ValueError(f"{len(starts)} <img> tokens, {0 if features is None else len(features)} images")
        for image, (row, start) in enumerate(starts):
            end = start + 1 + IMAGE_TOKENS
            if end >= tokens.shape[1] or tokens[row, end] != self.image_start + 1:
                raise ValueError(f"row {row}: <img> at {start} is not closed {IMAGE_TOKENS} tokens later")
            x[row, start + 1 : end] = features[image]
        return x

    def ntk_alpha(self, length: int) -> float:
        """Dynamic NTK: the factor of the rotary base in evaluation mode, `length` being the padded one."""
        if not self.config["use_dynamic_ntk"]:
            return 1.0
        return max(2 ** math.ceil(math.log2(length / self.config["seq_length"]) + 1) - 1, 1)

    def hidden_states(
        self,
        tokens: np.ndarray,
        images: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        train: bool = False,
        *,
        features: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        branches: np.ndarray | None = None,
        alpha: float | None = None,
    ) -> list[np.ndarray]:
        """The embeddings, the output of every block, the last of them after ln_f: layers + 1 arrays [B, T, D].

        A token sees itself and the earlier tokens that are valid (`mask` is 1) and belong to the prompt (branch 0) or
        to its own branch. `features` stands for `images` already encoded. `alpha` overrides the NTK factor.
        """
        tokens = np.asarray(tokens)
        length = tokens.shape[1]
        if features is None and images is not None and len(images):
            features = self.image_features(images)
        positions = np.broadcast_to(np.arange(length) if positions is None else positions, tokens.shape)
        branches = np.zeros_like(tokens) if branches is None else np.asarray(branches)
        valid = branches != PADDING
        if mask is not None:
            valid = valid & (np.asarray(mask) == 1)  # whatever is not 1 is padding
        if alpha is None:
            alpha = 1.0 if train else self.ntk_alpha(length)
        visible = np.tri(length, dtype=bool) & valid[:, None, :]
        visible &= (branches[:, None, :] == PROMPT) | (branches[:, None, :] == branches[:, :, None])
        query_scale = np.ones(tokens.shape)
        if self.config["use_logn_attn"] and not train:
            query_scale = np.maximum(np.log(positions + 1) / math.log(self.config["seq_length"]), 1)

        states = [self.embed(tokens, features)]
        for i in range(self.config["num_hidden_layers"]):
            states.append(self.block(f"transformer.h.{i}", states[-1], positions, visible, query_scale, alpha))
        states[-1] = self.rms_norm("transformer.ln_f", states[-1])
        return states

    def block(self, name, x, positions, visible, query_scale, alpha) -> np.ndarray:
        heads = self.config["num_attention_heads"]
        mixed = self.linear(f"{name}.attn.c_attn", self.rms_norm(f"{name}.ln_1", x))
        q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in np.split(mixed, 3, axis=-1))
        width = q.shape[-1]
        base = self.config["rotary_emb_base"] * alpha ** (width / (width - 2))
        q = rotate(q, positions, base) * query_scale[:, :, None, None]
        k = rotate(k, positions, base)
        x = x + self.linear(f"{name}.attn.c_proj", attend(q, k, v, visible))
        y = self.rms_norm(f"{name}.ln_2", x)
        y = self.linear(f"{name}.mlp.w1", y) * silu(self.linear(f"{name}.mlp.w2", y))
        return x + self.linear(f"{name}.mlp.c_proj", y)

    def __call__(self, tokens, images=None, mask=None, train=False, **options) -> np.ndarray:
        """Logits [B, T, V]; the options are those of `hidden_states`."""
        return self.linear("lm_head", self.hidden_states(tokens, images, mask, train, **options)[-1])

    # Generation

    def greedy(
        self,
        tokens: np.ndarray,
        images: np.ndarray | None = None,
        max_new_tokens: int = 16,
        mask: np.ndarray | None = None,
        stop: Iterable[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedy decoding: ids [B, max_new_tokens], and the logits [B, steps, V] they were chosen from.

        Every step is a full pass with the prompt's NTK factor, which is what cached decoding amounts to. A row that has
        produced <|endoftext|> or a token of `stop` goes on with <|endoftext|>. Padding may be on either side of the
        prompts; it is brought to the left, where it can no longer separate a prompt from its continuation.
        """
        tokens = np.asarray(tokens)
        mask = np.ones(tokens.shape, int) if mask is None else (np.asarray(mask) == 1).astype(int)
        order = np.argsort(mask, axis=1, kind="stable")
        tokens, mask = np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
        features = self.image_features(images) if images is not None and len(images) else None
        alpha, prompt = self.ntk_alpha(tokens.shape[1]), tokens.shape[1]
        ended = np.zeros(len(tokens), bool)
        scores = []
        while tokens.shape[1] < prompt + max_new_tokens and not ended.all():
            last = self.hidden_states(tokens, mask=mask, features=features, alpha=alpha)[-1][:, -1]
            scores.append(self.linear("lm_head", last))
            new = np.where(ended, self.end_of_text, scores[-1].argmax(axis=-1))
            ended |= np.isin(new, [self.end_of_text, *stop])
            tokens = np.concatenate([tokens, new[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones((len(mask), 1), int)], axis=1)
        ids = np.full((len(tokens), max_new_tokens), self.end_of_text)
        ids[:, : len(scores)] = tokens[:, prompt:]
        return ids, np.stack(scores, axis=1)
