"""A PyTorch DPO step of the same architecture and recipe, as trl does it, plain and with every trick that trl offers.

    python -m benchmarks.peer_torch [--size scaled] [--variants trl tricks tricks-compiled] [--pairs 4] [--out results]

Hugging Face modules: Qwen2's decoder in Qwen-7B's shape (bias on query, key and value only), CLIP's vision transformer
in ViT-bigG's, and a cross-attention resampler to 256 tokens; PEFT LoRA on attention and mlp; SDPA attention; gradient
checkpointing; bfloat16 base weights under autocast with float32 adapters on CUDA, float32 on a CPU. A pair is two
sequences, chosen ones before rejected ones in one batch, each with its own copy of the image.

trl: reference by a second forward pass with the adapter off, logits of all positions, AdamW.
tricks: DPOConfig's precompute_ref_log_probs, use_logits_to_keep and padding_free (with flash-attn, which trl demands
for it; without, the batch is padded, but these sequences are all of one length, so that there is no padding),
TrainingArguments' adamw_torch_fused, and Liger's kernels where liger-kernel is installed.
tricks-compiled: the same with torch.compile on each layer.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import turns
from benchmarks.common import keep
from benchmarks.workload import (
    BETA,
    LABELLED,
    LORA_ALPHA,
    MODELS,
    RESPONSE,
    Instruction,
    lora_rank,
    make_instructions,
    work_of,
)
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.models.qwen_vl.flops import Training, resampler_forward, step_flops, vision_forward

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a peer does beyond the plain step."""

    precomputed: bool = False
    logits_to_keep: bool = False
    fused_adamw: bool = False
    liger: bool = False
    packed: bool | None = False  # sequences one after the other, without padding; None: where flash-attn is installed
    compiled: bool = False


TRICKS = Recipe(precomputed=True, logits_to_keep=True, fused_adamw=True, liger=True, packed=None)
VARIANTS = {"trl": Recipe(), "tricks": TRICKS, "tricks-compiled": dataclasses.replace(TRICKS, compiled=True)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # c_attn, attn.c_proj, w2, w1
OUR_TARGETS = ("c_attn", "attn.c_proj", "w1", "w2")
NEEDED = ("torch", "transformers", "peft")


def check_installed() -> None:
    """Refuses in one line where PyTorch's side is not there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the peer needs {', '.join(missing)}: pip install 'silkie-jax[dev-torch]'")


def make_variants(names: list[str], size: str, pairs: int, args: argparse.Namespace) -> list[turns.Variant]:
    """The peers of these names."""
    options = {"size": size, "pairs": pairs, "steps": args.steps, "warmup": args.warmup}
    return [turns.Variant(name, "benchmarks.peer_torch", options | {"variant": name}) for name in names]


def against(found: dict[str, turns.Measured | str], ours: list[str]) -> list[str]:
    """`ours : peer` in pairs/s: the best of ours against each peer."""

    done = {name: one for name, one in found.items() if isinstance(one, turns.Measured)}

    def rate(name: str) -> float:
        return done[name].pairs / done[name].median

    peers = [name for name in done if name not in ours]
    best = max((name for name in ours if name in done), key=rate, default=None)
    if best is None or not peers:
        return []
    shown, a = [], done[best]
    for name in peers:
        b = done[name]
        busy = statistics.median(b.busy) / b.pairs / (statistics.median(a.busy) / a.pairs)
        shown.append(
            f"- {best} : {name} = {rate(best):.2f} : {rate(name):.2f} = {rate(best) / rate(name):.2f}; "
            f"in processor seconds {busy:.2f}; a matrix product alone {a.matmul / b.matmul:.2f}"
        )
    return ["", "ours : peer, pairs/s", "", *shown]


def make_model(config: QwenVLConfig, recipe: Recipe, device: str, dtype: "torch.dtype | None" = None) -> Any:
    """The peer with random weights, made on the device, and a fresh adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    if recipe.liger:
        use_liger(device)
    attention = "flash_attention_2" if device == "cuda" and packs(recipe) else "sdpa"
    v, width = config.visual, config.hidden_size

    class Resampler(nn.Module):
        """256 learned queries attend to the patches, then a norm and a projection (Qwen-VL's, in its shape)."""

        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(0.02 * torch.randn(256, width))
            self.query_positions = nn.Parameter(0.02 * torch.randn(256, width))
            self.key_positions = nn.Parameter(0.02 * torch.randn(v.grid**2, width))
            self.kv_proj = nn.Linear(v.width, width, bias=False)
            self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
            self.attn = nn.MultiheadAttention(width, v.pool_heads, batch_first=True)
            self.proj = nn.Linear(width, width, bias=False)

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            values = self.ln_kv(self.kv_proj(patches))
            query = (self.ln_q(self.query) + self.query_positions).expand(len(patches), -1, -1)
            out, _ = self.attn(query, values + self.key_positions, values, need_weights=False)
            return self.proj(self.ln_post(out))

    class Peer(nn.Module):
        """Tokens and images to logits."""

        def __init__(self) -> None:
            super().__init__()
            vision = CLIPVisionConfig(
                hidden_size=v.width,
                intermediate_size=v.mlp_width,
                num_hidden_layers=v.layers,
                num_attention_heads=v.heads,
                image_size=v.image_size,
                patch_size=v.patch_size,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            )
            decoder = Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                max_position_embeddings=config.seq_length,
                rms_norm_eps=config.layer_norm_epsilon,
                use_cache=False,
                attn_implementation=attention,  # type: ignore[call-arg]
            )
            self.vision, self.resampler = CLIPVisionModel(vision), Resampler()
            base = Qwen2ForCausalLM(decoder)
            base.requires_grad_(False)
            rank = lora_rank(config)
            lora = LoraConfig(r=rank, lora_alpha=LORA_ALPHA * rank, target_modules=TARGETS)  # type: ignore[arg-type]
            self.decoder: Any = get_peft_model(base, lora)  # adapters in float32, no dropout
            self.vision.requires_grad_(False)
            self.resampler.requires_grad_(False)

        def forward(self, tokens: torch.Tensor, images: torch.Tensor, **options: Any) -> torch.Tensor:
            patches = self.vision(images).last_hidden_state[:, 1:]  # without the class token
            features = self.resampler(patches)
            x = self.decoder.get_input_embeddings()(tokens)
            places = (tokens == config.image_start + 2)[..., None].expand_as(x)
            x = x.masked_scatter(places, features.to(x.dtype))
            return self.decoder(inputs_embeds=x, **options).logits

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device(device):
            model: Any = Peer()
    finally:
        torch.set_default_dtype(before)
    model.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if recipe.compiled:
        for layer in [*model.decoder.base_model.model.model.layers, *model.vision.encoder.layers]:
            layer.compile()
    return model


def packs(recipe: Recipe) -> bool:
    return importlib.util.find_spec("flash_attn") is not None if recipe.packed is None else recipe.packed


def use_liger(device: str) -> None:
    """Liger's rotary embedding, RMSNorm and SwiGLU in Qwen2, where they can run."""
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """P pairs as 2P sequences, the chosen ones first: tokens, which of them are labels, normalised pixels."""

    tokens: "torch.Tensor"
    labelled: "torch.Tensor"
    pixels: "torch.Tensor"


def make_batch(instructions: list[Instruction], pairs: int, device: str, dtype: "torch.dtype | None" = None) -> Batch:
    """The first pairs of these instructions. All sequences are of one length, so that there is nothing to pad."""
    import torch

    every = [(instruction, pair) for instruction in instructions for pair in instruction.pairs]
    some = [every[i % len(every)] for i in range(pairs)]
    sequences = [(one, pair[side]) for side in (0, 1) for one, pair in some]
    tokens = np.stack([np.concatenate([one.prompt, one.responses[k]]) for one, k in sequences])
    labelled = np.zeros(tokens.shape, bool)
    labelled[:, -RESPONSE:] = LABELLED
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = np.stack([(one.image / 255 - mean) / std for one, _ in sequences]).transpose(0, 3, 1, 2)
    return Batch(
        torch.tensor(tokens, device=device),
        torch.tensor(labelled, device=device),
        torch.tensor(pixels, device=device, dtype=dtype or torch.float32),
    )


class Step:
    """A model, its optimizer and one step of DPO. With bfloat16 weights the step runs under autocast."""

    def __init__(
        self,
        config: QwenVLConfig,
        recipe: Recipe,
        device: str,
        dtype: "torch.dtype | None" = None,
        learning_rate: float = 1e-5,
    ):
        import torch

        torch.manual_seed(0)
        self.recipe, self.device, self.dtype = recipe, device, dtype or torch.float32
        self.model: Any = make_model(config, recipe, device, dtype)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, learning_rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05, fused=recipe.fused_adamw
        )

    def logps(self, batch: Batch) -> "torch.Tensor":
        """The summed log-probability of each sequence's labels."""
        import torch

        tokens, labelled = batch.tokens, batch.labelled
        count, length = tokens.shape
        options: dict[str, Any] = {}
        start = length - RESPONSE if self.recipe.logits_to_keep else 1  # the first token that is scored
        if packs(self.recipe):
            positions = torch.arange(length, device=self.device).repeat(count)[None]
            options["position_ids"] = positions
            if self.recipe.logits_to_keep:
                kept = torch.arange(length, device=self.device) >= start - 1
                options["logits_to_keep"] = kept.repeat(count).nonzero()[:, 0]
            tokens = tokens.reshape(1, -1)
        else:
            options["attention_mask"] = torch.ones_like(tokens)
            if self.recipe.logits_to_keep:
                options["logits_to_keep"] = RESPONSE + 1
        with self.autocast():
            logits = self.model(tokens, batch.pixels, **options)
        logits = logits.reshape(count, -1, logits.shape[-1])[:, -(length - start + 1) : -1].float()
        targets = batch.tokens[:, start:]
        picked = logits.gather(-1, targets[..., None])[..., 0]
        total = torch.stack([row.logsumexp(-1) for row in logits])  # one sequence at a time, as trl does
        return ((picked - total) * labelled[:, start:]).sum(-1)

    def reference(self, batch: Batch) -> "torch.Tensor":
        """The same with the adapter off."""
        import torch

        with torch.no_grad(), self.model.decoder.disable_adapter():
            return self.logps(batch)

    def loss(self, batch: Batch, reference: "torch.Tensor | None") -> "torch.Tensor":
        """The mean sigmoid loss over the pairs."""
        import torch

        policy = self.logps(batch)
        ratio = policy - (self.reference(batch) if reference is None else reference)
        chosen, rejected = ratio.chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    def update(self, batch: Batch, reference: "torch.Tensor | None") -> float:
        """One update; waits for it."""
        import torch

        loss = self.loss(batch, reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def autocast(self) -> contextlib.AbstractContextManager:
        import torch

        mixed = self.dtype == torch.bfloat16
        return torch.autocast(self.device, torch.bfloat16) if mixed else contextlib.nullcontext()


def matmul_speed(width: int, device: str, dtype: "torch.dtype") -> float:
    """FLOP/s of a large matrix product in PyTorch."""
    import torch

    left = torch.ones(turns.MATMUL[0], width, device=device, dtype=dtype)
    right = torch.ones(width, turns.MATMUL[1], device=device, dtype=dtype)

    def wait(_: list["torch.Tensor"]) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return turns.matmul_speed(lambda: left @ right, wait, width)


def measure(options: dict[str, Any]) -> turns.Measured:
    """One variant, in this process."""
    import torch

    from silkie_jax.hardware.chips import find_chip

    config, recipe, pairs = MODELS[options["size"]], VARIANTS[options["variant"]], options["pairs"]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    began = time.perf_counter()
    step = Step(config, recipe, device, dtype)
    instructions = make_instructions(config, -(-pairs // 4))
    batch = make_batch(instructions, pairs, device, dtype)
    reference = step.reference(batch) if recipe.precomputed else None
    losses, clock = [step.update(batch, reference)], turns.Clock()
    took = time.perf_counter() - began
    for _ in range(options["warmup"] + options["steps"]):
        with clock.step():
            losses.append(step.update(batch, reference))
    every = [(one, k) for one in instructions for pair in one.pairs for k in pair][: 2 * pairs]
    work = work_of([one.row([k]) for one, k in every])
    flops = step_flops(config, work, Training(lora_rank(config), OUR_TARGETS, live_reference=reference is None)).model
    if reference is None:  # encodes the images again
        flops += vision_forward(config, work.images) + resampler_forward(config, work.images)
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    chip = find_chip(kind)
    extras = [name for name in ("flash_attn", "liger_kernel") if importlib.util.find_spec(name) and recipe.liger]
    return turns.Measured(
        device=f"1 x {kind}",
        seconds=clock.seconds[options["warmup"] :],
        busy=clock.busy[options["warmup"] :],
        pairs=pairs,
        tokens=work.tokens,
        flops=flops,
        peak_flops=chip.bf16 if chip else None,
        peak=torch.cuda.max_memory_allocated() if device == "cuda" else turns.resident_peak(),
        loss=(losses[0], losses[-1]),
        compile_seconds=took if recipe.compiled else None,
        matmul=matmul_speed(config.hidden_size, device, dtype),
        note=", ".join(extras),
    )


def main() -> None:
    """Measures the variants in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=MODELS, help="default: full on an accelerator, scaled on a CPU")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    turns.add_options(parser)
    args = parser.parse_args()
    check_installed()
    if args.worker:
        turns.worker(measure, args.worker)
        return
    size = args.size or turns.default_size()
    variants = make_variants(args.variants, size, args.pairs, args)

    def save(found: dict[str, turns.Measured | str], finished: bool = False) -> None:
        lines = [f"{size} model on {turns.device_of(found)}", "", *turns.table(found, args.variants[0])]
        keep(f"peer_torch-{size}", "\n".join(lines), args.out, finished=finished)

    save(turns.run_in_turns(variants, args.turns or (1 if size == "full" else 3), args, save), finished=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
