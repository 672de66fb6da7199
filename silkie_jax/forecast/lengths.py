"""The steps that a forecast is for: of the corpus's own rows, or of rows as the paper publishes them."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from silkie_jax.corpus.imitation import Imitate
from silkie_jax.errors import UserError
from silkie_jax.preference.counts import Work, row_work
from silkie_jax.preference.grid import Grid, bucket
from silkie_jax.preference.plan import Plan

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from silkie_jax.training.config import TrainConfig

INSTRUCTIONS = 80_258  # of VLFeedback
_SPAN = 258  # tokens of an image with its tags
_PROMPT, _RESPONSE, _RESPONSES = 330, 150, 4  # means of the paper's data
# Only the means are published. Of a log-normal with this spread half of the responses are below 109 tokens, one of a
# hundred is beyond 700.
_SPREAD, _MOST = 0.8, 1024
PUBLISHED = (
    f"rows as published: prompts of {_PROMPT} tokens with an image, {_RESPONSES} responses of {_RESPONSE}, both means; "
    f"their spread is an assumption, log-normal with sigma {_SPREAD} up to {_MOST}"
)


class Steps(NamedTuple):
    """The steps of a run, and in words whose rows they have."""

    grid: Grid
    what: str


def find_steps(config: "TrainConfig", mesh: "Mesh", tokens: int | None = None) -> Steps:
    """Steps of the corpus's own layout where corpus and tokenizer are there, else of published lengths.

    Args:
      tokens: rows that are all padded to so many tokens are meant instead.

    Raises:
      UserError: the corpus is not sound, or rows are longer than `batch_tokens` allows.
    """
    from silkie_jax.hardware.mesh import platform_of
    from silkie_jax.training.data import make_grid, open_data

    if tokens is None and Path(config.corpus).exists() and Path(config.model).exists():
        from silkie_jax.corpus import CorpusReader
        from silkie_jax.models.qwen_vl.tokenizer import Tokenizer

        data = open_data(config, mesh, CorpusReader(config.corpus), Tokenizer.from_folder(config.model))
        return Steps(data.train.grid, f"rows of {config.corpus}")
    if tokens is None:
        sizes, what = published_sizes(config.max_length, config.objective, config.imitate), PUBLISHED
        if Path(config.corpus).exists():
            what += f" ({config.model} is not there, without whose tokenizer {config.corpus} cannot be laid out)"
    else:
        sizes = equal_sizes(tokens, config.objective, config.imitate, fine=platform_of(mesh) == "gpu")
        what = f"rows that are padded to {tokens} tokens"
    plan = Plan(sizes, config.batch_rows * config.accumulate, config.batch_pairs, config.seed)
    return Steps(make_grid(config, mesh, plan, config.accumulate), what)


def published_sizes(max_length: int, objective: str, imitate: Imitate | None = None) -> Int[np.ndarray, "I 6"]:
    """SIZES (layout.py) of as many rows as VLFeedback has, drawn around the published means."""
    random = np.random.default_rng(0)

    def draw(mean: float, shape: tuple[int, ...]) -> np.ndarray:
        return random.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, shape)

    prompts = _SPAN + draw(_PROMPT - _SPAN, (INSTRUCTIONS,)).astype(int)
    prompts = np.minimum(prompts, max(max_length // 2, _SPAN + 1))
    responses = draw(_RESPONSE, (INSTRUCTIONS, _RESPONSES)).astype(int)
    most = np.clip(max_length - prompts, 8, _MOST)[:, None]
    return _sizes(prompts, np.clip(responses, 8, most), objective, imitate)


def equal_sizes(
    tokens: int, objective: str, imitate: Imitate | None = None, *, fine: bool = False
) -> Int[np.ndarray, "I 6"]:
    """SIZES of rows with the published prompt, and responses so long that all are padded to `tokens` (grid.bucket)."""
    unused = 30 if fine else 94  # of the published means, 930 tokens, in 960 or 1,024
    each = (tokens - unused - _PROMPT) // _RESPONSES
    if each < 8 or bucket(tokens, fine) != tokens:
        multiples = "32 (beyond 1,024: 64, beyond 2,048: 128)" if fine else "128"
        raise UserError(f"--tokens {tokens}: rows are padded to multiples of {multiples}; give 512 or more")
    return _sizes(np.full(INSTRUCTIONS, _PROMPT), np.full((INSTRUCTIONS, _RESPONSES), each), objective, imitate)


def _sizes(
    prompts: Int[np.ndarray, " I"], responses: Int[np.ndarray, "I K"], objective: str, imitate: Imitate | None
) -> Int[np.ndarray, "I 6"]:
    """SIZES of rows; of four responses, five pairs of three instructions and four of the fourth are no ties."""
    count = len(prompts)
    pairs = np.where(np.arange(count) % 4 == 3, 4, 5)
    if objective == "sft":
        pairs = np.zeros(count, int)
        if imitate != "all":  # the best one, if there is no tie
            responses = responses[:, :1]
    branches = responses.shape[1]
    labels = responses.sum(1) - 2 * branches  # all of a response but the two tokens of its role
    columns = (prompts + responses.sum(1), labels, pairs, np.ones(count, int), np.full(count, branches))
    return np.stack([*columns, np.zeros(count, int)], axis=1)


def work_of(sizes: Int[np.ndarray, "I 6"]) -> Work:
    """What rows of these sizes hold, if the responses of each are equally long."""
    distinct, counts = np.unique(sizes[:, :5], axis=0, return_counts=True)
    total = Work()
    for (tokens, labels, pairs, images, branches), count in zip(distinct.tolist(), counts.tolist(), strict=True):
        response = (labels + 2 * branches) // branches
        row = row_work(tokens - branches * response, [response] * branches, labels, images, pairs)
        total += row * count
    return total
