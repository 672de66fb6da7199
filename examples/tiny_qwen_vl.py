"""Write a small random Qwen-VL checkpoint in the official Hugging Face form.

    python examples/tiny_qwen_vl.py DST [--dtype bfloat16] [--shards 3]

The folder has what Qwen-VL-Chat's has: sharded weights with an index under the official tensor names,
config.json, generation_config.json, tokenizer_config.json and qwen.tiktoken. Only the sizes differ, so
whatever works on the checkpoint of 9.66 billion parameters can be tried on this one within seconds. Needs
NumPy and safetensors.

The weights are random but not arbitrary: they are scaled so that a wrong epsilon, a swapped axis, a missing
position or an unread tensor visibly changes the logits.
"""

import argparse
import base64
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Fixed by the format: an image is always 256 tokens, and both position tables are 16 x 16.
IMAGE_TOKENS = 256
GRID = 16
# The resampler's heads are 128 wide whatever the model's size.
RESAMPLER_HEAD = 128
# <|endoftext|>, <|im_start|>, <|im_end|>, 205 extras, then these nine.
IMAGE_SPECIALS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
SPECIALS = 3 + 205 + len(IMAGE_SPECIALS)
IMAGE_START = 3 + 205 + IMAGE_SPECIALS.index("<img>")

TEXT = """
You are a helpful assistant. Picture 1: Describe the image in detail. What is shown in the picture? How many
people are standing near the red car, and what are they doing? Is there a clock on the wall of the building?
Please answer the question using a single word or phrase. The image shows a street with several people, a
few cars and a traffic light. In the foreground, a woman in a blue coat is holding an umbrella; behind her,
two men are talking to each other. The picture does not show what is written on the sign, so the answer
cannot be given with certainty. Based on the image, the weather seems to be rainy. There are three boxes on
the table: one is red, one is green and one is blue. The chart compares the number of patients in each
group. The response should be helpful, faithful to the image and harmless. This photograph was taken in the
morning, because the shadows of the trees are long. A small dog is sitting on the grass next to the bench.
First, look at the colour of the object. Second, look at its shape and its position. Finally, explain the
reason for your choice. I am sorry, but there is no such object in this picture. Yes, there is. No, there is
not. The title of the poster is printed in large white letters above the face of the actress.
请描述这张图片。这张图片里有什么？图片中有一个红色的方框和一个蓝色的圆。这张图片显示了一条街道。请用中文回答。
"""


def make_checkpoint(
    folder,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 2,
    safetensors: bool = True,
    **sizes: int,
) -> Path:
    """Write a checkpoint to `folder` and return its path. `sizes` are those of `make_config`.

    `dtype` is float32, float16 or bfloat16; `safetensors=False` writes `pytorch_model-*.bin` instead, which
    needs torch. The same arguments give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learn_bpe(TEXT)
    config = make_config(len(ranks), dtype=dtype, **sizes)
    write_weights(folder, random_tensors(config, seed), dtype, shards, safetensors)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    end_of_text = len(ranks)
    generation = {
        "chat_format": "chatml",
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.5,
    }
    tokenizer = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / "config.json", config)
    return folder


def make_config(
    ordinary_tokens: int,
    *,
    dtype: str = "float32",
    hidden: int = 256,
    layers: int = 2,
    heads: int = 8,
    ff: int = 192,
    seq_length: int = 512,
    vision_width: int = 96,
    vision_layers: int = 2,
    vision_heads: int = 8,
    image_size: int = 56,
) -> dict:
    """The official config.json for these sizes; `ordinary_tokens` counts the vocabulary without specials.

    `hidden` must be a multiple of 128 (a head of the resampler) and of `heads`; `ff` is the inner width of
    the decoder's mlp, half of the official `intermediate_size`.
    """
    if hidden % heads or hidden % RESAMPLER_HEAD:
        raise ValueError(f"hidden={hidden} must be a multiple of heads={heads} and of {RESAMPLER_HEAD}")
    if vision_width % vision_heads or image_size % 14:
        raise ValueError("vision_width must be a multiple of vision_heads, image_size of the patch size 14")
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": dtype == "bfloat16",
        "emb_dropout_prob": 0.0,
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * ff,
        "kv_channels": hidden // heads,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": seq_length,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": dtype,
        "transformers_version": "4.32.1",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "visual": {
            "heads": vision_heads,
            "image_size": image_size,
            "image_start_id": ordinary_tokens + IMAGE_START,
            "layers": vision_layers,
            "mlp_ratio": 4.9231,
            "output_dim": hidden,
            "patch_size": 14,
            "width": vision_width,
        },
        # Padded like the real one: 151,936 rows for 151,860 tokens.
        "vocab_size": -(-(ordinary_tokens + SPECIALS) // 128) * 128,
    }


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a Qwen-VL checkpoint with this config, float32, in the official order."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    width, ff = config["hidden_size"], config["intermediate_size"] // 2

    def normal(name, *shape, std):
        tensors[name] = (std * rng.standard_normal(shape)).astype(np.float32)

    def matrix(name, *shape, gain=1.2):
        normal(name, *shape, std=gain / np.sqrt(np.prod(shape[1:])))

    def norm(name, size, bias=True):
        tensors[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)
        if bias:
            normal(f"{name}.bias", size, std=0.1)

    def linear(name, rows, columns, gain=1.2, bias_std=0.1):
        matrix(f"{name}.weight", rows, columns, gain=gain)
        normal(f"{name}.bias", rows, std=bias_std)

    # Small tables: the first norms then see small inputs, and a wrong epsilon shows.
    normal("transformer.wte.weight", config["vocab_size"], width, std=0.05)
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1", width, bias=False)
        linear(f"{block}.attn.c_attn", 3 * width, width)
        matrix(f"{block}.attn.c_proj.weight", width, width)
        norm(f"{block}.ln_2", width, bias=False)
        matrix(f"{block}.mlp.w1.weight", ff, width)
        matrix(f"{block}.mlp.w2.weight", ff, width)
        matrix(f"{block}.mlp.c_proj.weight", width, ff)
    norm("transformer.ln_f", width, bias=False)

    visual, tower = config["visual"], "transformer.visual"
    vision_width, patch, out = visual["width"], visual["patch_size"], visual["output_dim"]
    mlp_width = int(vision_width * visual["mlp_ratio"])
    normal(f"{tower}.positional_embedding", GRID * GRID, vision_width, std=0.05)
    matrix(f"{tower}.proj", out, out)
    matrix(f"{tower}.conv1.weight", vision_width, 3, patch, patch, gain=0.05)
    norm(f"{tower}.ln_pre", vision_width)
    for i in range(visual["layers"]):
        block = f"{tower}.transformer.resblocks.{i}"
        norm(f"{block}.ln_1", vision_width)
        norm(f"{block}.ln_2", vision_width)
        linear(f"{block}.attn.in_proj", 3 * vision_width, vision_width)
        linear(f"{block}.attn.out_proj", vision_width, vision_width)
        linear(f"{block}.mlp.c_fc", mlp_width, vision_width)
        linear(f"{block}.mlp.c_proj", vision_width, mlp_width)
    pool = f"{tower}.attn_pool"
    # Noise on the sine table: whoever computes it afresh instead of reading it gets other logits.
    noise = 0.05 * rng.standard_normal((IMAGE_TOKENS, out))
    tensors[f"{pool}.pos_embed"] = (sine_table(out) + noise).astype(np.float32)
    normal(f"{pool}.query", IMAGE_TOKENS, out, std=0.05)
    matrix(f"{pool}.kv_proj.weight", out, vision_width, gain=0.05)
    matrix(f"{pool}.attn.in_proj_weight", 3 * out, out)
    normal(f"{pool}.attn.in_proj_bias", 3 * out, std=0.1)
    linear(f"{pool}.attn.out_proj", out, out, gain=0.05, bias_std=0.01)
    norm(f"{pool}.ln_q", out)
    norm(f"{pool}.ln_kv", out)
    norm(f"{tower}.ln_post", out)

    matrix("lm_head.weight", config["vocab_size"], width, gain=2.5)
    # Rows beyond the last token exist only for padding: keep them from ever being the most likely.
    tokens = visual["image_start_id"] - IMAGE_START + SPECIALS
    tensors["lm_head.weight"][tokens:] *= 0.05
    return tensors


def sine_table(width: int) -> np.ndarray:
    """The resampler's initial table [256, width]: half codes the column, half the row, sines then cosines."""
    frequency = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    angle = np.arange(GRID)[:, None] * frequency
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    return np.concatenate([line[column], line[row]], axis=1)


def learn_bpe(text: str, merges: int = 256) -> dict[bytes, int]:
    """Byte-pair encoding learned from `text`: token bytes -> rank, the 256 single bytes first.

    Each merge joins the most frequent neighbours (the first seen wins a tie), so every token is reachable
    from lower ranks, as tiktoken requires. Words are split at least as finely as the official pattern does. Fewer
    merges are made where every word of the text is one token before.
    """
    # The official order of the bytes: the printable ones of Latin-1, then the rest.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    ranks = {bytes([b]): i for i, b in enumerate(printable + [b for b in range(256) if b not in printable])}
    words = [
        ([bytes([b]) for b in word.encode()], count)
        for word, count in Counter(re.findall(r" ?[^\W\d_]+|\n", text)).items()
    ]
    for _ in range(merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:  # every word is one token
            break
        left, right = max(pairs, key=lambda pair: pairs[pair])
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
    return ranks


def write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, shards: int, safetensors: bool) -> None:
    """Write the tensors in `shards` files of about equal size, cut in the order given, with an index."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} must be float32, float16 or bfloat16")
    total = sum(array.size for array in tensors.values())
    groups: list[dict[str, np.ndarray]] = [{} for _ in range(shards)]
    done = 0
    for name, array in tensors.items():
        groups[min(shards - 1, done * shards // total)][name] = array
        done += array.size
    stem, ending = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"{stem}-{i:05d}-of-{shards:05d}.{ending}"
        weight_map |= dict.fromkeys(group, file)
        if safetensors:
            save_file({name: _cast(array, dtype) for name, array in group.items()}, folder / file, {"format": "pt"})
        else:
            import torch

            cast = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in group.items()}
            torch.save(cast, folder / file)
    size = total * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.{ending}.index.json", index)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes  # NumPy has no bfloat16 of its own

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; files of the same names are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=56, help="448 in the real model; a multiple of 14")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--bin", action="store_true", help="write pytorch_model-*.bin instead (needs torch)")
    args = parser.parse_args()
    make_checkpoint(
        args.folder,
        seed=args.seed,
        dtype=args.dtype,
        layers=args.layers,
        hidden=args.hidden,
        heads=args.heads,
        image_size=args.image_size,
        shards=args.shards,
        safetensors=not args.bin,
    )
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
