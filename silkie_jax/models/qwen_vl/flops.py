"""Floating-point operations of a step, by formula: 2 for a multiply-add, matmuls only.

Model FLOPs are what the mathematics needs: a forward pass, and a backward pass through whatever lies between the loss
and a trained parameter. Rematerialisation is extra work of the implementation and is kept apart, so that utilisation
(MFU = model FLOPs / time / peak, PaLM, arXiv 2204.02311, appendix B) does not reward it. XLA's own cost analysis counts
the body of a scan once and cannot be used.
"""

import dataclasses
from typing import TYPE_CHECKING

from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.nn.lora import matches

if TYPE_CHECKING:
    from silkie_jax.preference.counts import Work


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one step over all devices."""

    model: float
    remat: float

    @property
    def hardware(self) -> float:
        return self.model + self.remat


@dataclasses.dataclass(frozen=True)
class Training:
    """What of the model is trained, as far as it decides what the backward pass computes."""

    lora_rank: int | None  # None: the decoder's weights themselves
    lora_targets: tuple[str, ...] = ()
    train_vision: str = "none"
    stored_features: bool = False  # of the images, so that no step encodes them
    live_reference: bool = False
    null_passes: int = 0  # of the decoder over the rows with the null image, without a backward pass
    null_images: int = 0  # that are encoded for them, once a step
    mixed_gradient: bool = False  # also of extrapolated scores
    remat: str = "full"
    attention_again: bool = False  # `dots` keeps the outcome of the one-pass kernel only


def step_flops(config: QwenVLConfig, work: "Work", training: Training) -> StepFlops:
    """Operations of one update on `work`."""
    decoder = decoder_forward(config, work)
    adapter = lora_forward(config, work.tokens, training.lora_rank, training.lora_targets)
    logits = 2.0 * work.labels * config.hidden_size * config.vocab_size
    images = 0 if training.stored_features else work.images
    vision, resampler = vision_forward(config, images), resampler_forward(config, images)
    forward = decoder + adapter + logits + vision + resampler
    full = training.lora_rank is None
    # Gradients of activations cost as much as the forward pass, gradients of weights as much again.
    backward = decoder + logits + 2 * adapter
    if full:
        backward += decoder_weights(config, work.tokens) + logits
    backward += {"none": 0.0, "resampler": 2 * resampler, "all": 2 * (vision + resampler)}[training.train_vision]
    reference = decoder + logits if training.live_reference else 0.0
    reference += training.null_passes * (decoder + adapter + logits)
    reference += vision_forward(config, training.null_images) + resampler_forward(config, training.null_images)
    if training.live_reference and training.train_vision != "none":
        reference += vision + resampler
    # The head is computed again by a trained head only; a frozen one keeps its input's gradient instead (logprobs.py).
    remat = {
        "full": decoder + adapter + (vision if training.train_vision == "all" else 0.0),
        "dots": attention_forward(config, work.visible) if training.attention_again else 0.0,
        "none": 0.0,
    }[training.remat] + (logits if full else 0.0)
    if training.mixed_gradient and not full:  # a second gradient of a label's hidden state, kept beside the first
        remat += logits
    return StepFlops(forward + backward + reference, remat)


def decoder_forward(config: QwenVLConfig, work: "Work") -> float:
    return decoder_weights(config, work.tokens) + attention_forward(config, work.visible)


def decoder_weights(config: QwenVLConfig, tokens: int) -> float:
    """The matmuls with weights: c_attn, c_proj, w1, w2 and the mlp's c_proj."""
    d, a, f = config.hidden_size, config.attention_width, config.mlp_width
    return 2.0 * tokens * config.num_hidden_layers * (4 * d * a + 3 * d * f)


def attention_forward(config: QwenVLConfig, visible: int) -> float:
    """Scores and the sum of values, for pairs that see each other only."""
    return 4.0 * visible * config.num_hidden_layers * config.attention_width


def lora_forward(config: QwenVLConfig, tokens: int, rank: int | None, targets: tuple[str, ...]) -> float:
    d, a, f = config.hidden_size, config.attention_width, config.mlp_width
    widths = {"attn.c_attn": d + 3 * a, "attn.c_proj": a + d, "mlp.w1": d + f, "mlp.w2": d + f, "mlp.c_proj": f + d}
    adapted = sum(width for name, width in widths.items() if matches(name, targets))
    return 2.0 * tokens * config.num_hidden_layers * adapted * (rank or 0)


def vision_forward(config: QwenVLConfig, images: int) -> float:
    """Patches and transformer of the tower."""
    v = config.visual
    patches = v.grid**2
    layer = patches * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * patches**2 * v.width
    return 2.0 * images * (patches * 3 * v.patch_size**2 * v.width + v.layers * layer)


def resampler_forward(config: QwenVLConfig, images: int) -> float:
    """kv_proj, the cross-attention's projections and attention, and the last projection."""
    v = config.visual
    patches, d, q = v.grid**2, v.output_dim, IMAGE_TOKENS
    return 2.0 * images * (patches * d * (v.width + 2 * d) + q * d * d * 3 + 2 * q * patches * d)
