"""The workload that the benchmarks share: models, lengths, pairs. Needs neither JAX nor PyTorch.

Lengths are the paper's: a prompt of 330 tokens of which 258 are an image, four responses of 150 tokens, and 4.75 untied
pairs an instruction (five for three of four, four for the fourth). All but two tokens of a response are labelled.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Int, UInt8

from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QWEN_VL_CHAT, QwenVLConfig, VisionConfig
from silkie_jax.preference.counts import Work, row_work
from silkie_jax.preference.rows import Row

PROMPT, RESPONSE, RESPONSES = 330, 150, 4
PAIRS_EACH = 4.75
BETA = 0.1
LABELLED = np.array([offset not in (1, 2) for offset in range(RESPONSE)])  # `assistant\n` is not (rows.py)

# Three sixteenths of the full width, and as many layers, patches and words as leave the shares of vision tower, decoder
# and vocabulary in the work of a row what they are at full size. Heads are as wide as there. Attention, whose share
# falls with the width, has five times its share.
SCALED = QwenVLConfig(
    vocab_size=1792,
    hidden_size=768,
    num_hidden_layers=2,
    num_attention_heads=6,
    kv_channels=128,
    intermediate_size=4128,
    seq_length=2048,
    layer_norm_epsilon=1e-6,
    rotary_emb_base=10000,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    visual=VisionConfig(
        image_size=224,
        patch_size=14,
        width=416,
        layers=5,
        heads=4,
        mlp_ratio=4.9231,
        output_dim=768,
        image_start_id=1700,
    ),
)
# The same with a fourth of the full width, where attention has less of the work: it takes twice as long.
WIDE = dataclasses.replace(
    SCALED,
    vocab_size=2432,
    hidden_size=1024,
    num_attention_heads=8,
    intermediate_size=5504,
    visual=dataclasses.replace(SCALED.visual, width=520, layers=6, heads=5, output_dim=1024, image_start_id=2300),
)
TINY = dataclasses.replace(
    SCALED,
    vocab_size=512,
    hidden_size=128,
    num_attention_heads=1,
    intermediate_size=352,
    visual=dataclasses.replace(
        SCALED.visual, image_size=28, width=32, layers=1, heads=2, output_dim=128, image_start_id=400
    ),
)
MODELS = {"full": QWEN_VL_CHAT, "wide": WIDE, "scaled": SCALED, "tiny": TINY}


def lora_rank(config: QwenVLConfig) -> int:
    """The recipe's 64 at full size, and in proportion to the width below it."""
    return max(2, 64 * config.hidden_size // QWEN_VL_CHAT.hidden_size)


LORA_ALPHA = 1 / 4  # of the rank: 16 to 64


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A prompt with its image, its responses, and the pairs (chosen, rejected) of them."""

    prompt: Int[np.ndarray, "T"]
    responses: Int[np.ndarray, "K R"]
    image: UInt8[np.ndarray, "S S 3"]
    pairs: list[tuple[int, int]]

    def row(self, branches: list[int]) -> Row:
        """The prompt and some of the responses as one row; pairs are of those that are all in it."""
        responses = self.responses[branches]
        start = len(self.prompt) + RESPONSE * np.arange(len(branches))  # of each branch
        before = np.arange(RESPONSE) - 1
        predecessors = np.where(before < 0, len(self.prompt) - 1, start[:, None] + before)
        number = {branch: k for k, branch in enumerate(branches)}
        pairs = [(number[a], number[b]) for a, b in self.pairs if a in number and b in number]
        parts = {
            "tokens": [*self.prompt, *responses.ravel()],
            "positions": [*range(len(self.prompt)), *np.tile(len(self.prompt) + before + 1, len(branches))],
            "branches": [0] * len(self.prompt) + np.repeat(range(1, len(branches) + 1), RESPONSE).tolist(),
            "predecessors": predecessors[:, LABELLED].ravel(),
            "labels": responses[:, LABELLED].ravel(),
            "label_branches": np.repeat(range(1, len(branches) + 1), LABELLED.sum()),
        }
        arrays = {name: np.asarray(values, np.int32) for name, values in parts.items()}
        return Row(
            id="",
            **arrays,
            pairs=np.array(pairs, np.int32).reshape(-1, 2),
            responses=tuple(branches),
            images=(b"",),
            dropped_prompt=0,
            dropped_responses=(0,) * len(branches),
            views=None,
        )


def make_instructions(config: QwenVLConfig, count: int, seed: int = 0) -> list[Instruction]:
    """Random ones; any four in a row have 19 pairs."""
    random = np.random.default_rng(seed)
    span = [config.image_start, *[config.image_start + 2] * IMAGE_TOKENS, config.image_end]
    words = config.end_of_text  # the ids below it are ordinary
    possible = list(itertools.combinations(range(RESPONSES), 2))
    made = []
    for n in range(count):
        text = random.integers(0, words, PROMPT - len(span))
        made.append(
            Instruction(
                np.concatenate([text[:8], span, text[8:]]),
                random.integers(0, words, (RESPONSES, RESPONSE)),
                random.integers(0, 256, (config.visual.image_size, config.visual.image_size, 3), np.uint8),
                possible[: 4 if n % 4 == 3 else 5],
            )
        )
    return made


def work_of(rows: list[Row]) -> Work:
    """What these rows hold."""
    each = [row_work(PROMPT, [RESPONSE] * len(row.responses), len(row.labels), pairs=len(row.pairs)) for row in rows]
    return sum(each, Work())
