"""The shared workload: its lengths and pairs, and that the small models keep the full one's shares of work."""

import numpy as np
import pytest

from benchmarks.workload import MODELS, PAIRS_EACH, SCALED, TINY, lora_rank, make_instructions, work_of
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.flops import decoder_forward, resampler_forward, vision_forward
from silkie_jax.models.qwen_vl.model import check_spans
from silkie_jax.preference.batches import collate
from silkie_jax.preference.grid import make_shape
from silkie_jax.preference.layout import row_sizes


def test_the_papers_lengths():
    rows = [one.row([0, 1, 2, 3]) for one in make_instructions(TINY, 4)]
    work = work_of(rows)
    assert (work.rows, work.tokens, work.images, work.pairs) == (4, 4 * 930, 4, 4 * PAIRS_EACH)
    assert work.labels == 4 * 4 * 148


def test_a_row_is_one_of_the_library():
    """Positions restart in each branch, and the first token of each is predicted by the last of the prompt."""
    one = make_instructions(TINY, 1)[0]
    row = one.row([1, 3])
    assert row.positions[330:].reshape(2, 150).tolist() == [list(range(330, 480))] * 2
    assert row.branches.tolist() == [0] * 330 + [1] * 150 + [2] * 150
    firsts = row.predecessors.reshape(2, 148)[:, :3].tolist()
    assert firsts == [[329, 332, 333], [329, 482, 483]]
    np.testing.assert_array_equal(row.labels[1:], np.delete(row.tokens[330:], [1, 2, 151, 152])[1:])
    assert row.pairs.tolist() == [[0, 1]] or (1, 3) not in one.pairs
    shape = make_shape(1, 1, [np.array(row_sizes(row))])
    check_spans(TINY, collate([[row]], shape, TINY.end_of_text)["tokens"], images=1)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_sound(name):
    config = MODELS[name]
    assert QwenVLConfig.from_dict(config.to_dict()).hidden_size == config.hidden_size
    assert lora_rank(QWEN_VL_CHAT) == 64


@pytest.mark.parametrize("name", ["scaled", "wide"])
def test_small_models_have_the_full_ones_shares_of_work(name):
    def shares(config):
        work = work_of([make_instructions(SCALED, 1)[0].row([0, 1, 2, 3])])
        parts = np.array(
            [
                decoder_forward(config, work),
                vision_forward(config, work.images) + resampler_forward(config, work.images),
                2.0 * work.labels * config.hidden_size * config.vocab_size,
            ]
        )
        return parts / parts.sum()

    np.testing.assert_allclose(shares(MODELS[name]), shares(QWEN_VL_CHAT), atol=0.03)
