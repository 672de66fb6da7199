"""A row of K branches against separate sequences through the public call: the same log-probabilities and gradients.

The separate side is written out plainly here: it knows nothing of rows, branches, predecessors or fused scores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.losses import LossOptions
from silkie_jax.preference.rows import encode_prompt, encode_response
from silkie_jax.training.step import Objective
from tests.training.support import (
    SIDE,
    Steps,
    all_pairs,
    assert_same_arrays,
    by_path,
    make_tiny,
    record,
    record_row,
    rows_arrays,
)

RELATIVE = 1e-5
BETA = 0.02
PAIRS, SEQUENCES, LENGTH = 6, 4, 384


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def policy(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def reference(policy, tmp_path_factory):
    model = load_model(make_tiny(tmp_path_factory.mktemp("other"), seed=1))
    # A table of sines, which is never trained: a copy of the policy has the policy's.
    model.visual.attn_pool.pos_embed[...] = policy.visual.attn_pool.pos_embed[...]
    return model


@pytest.fixture(scope="module")
def dpo(policy, reference):
    return Steps(policy, Objective("sigmoid", LossOptions(BETA), "copy"), reference=reference)


@pytest.fixture(scope="module")
def sft(policy):
    return Steps(policy, Objective(reference=None, remat="none"))


@pytest.fixture(scope="module")
def separate(policy, reference, tokenizer):
    return Separate(policy, reference, tokenizer)


class Separate:
    """Prompt and response, one after another, a sequence a response; plain softmax over the whole vocabulary."""

    def __init__(self, policy, reference, tokenizer):
        self.graph, self.policy = nnx.split(policy)
        self.reference = nnx.state(reference)
        self.tokenizer = tokenizer
        self.dpo = jax.jit(jax.value_and_grad(self._dpo, has_aux=True))
        self.sft = jax.jit(jax.value_and_grad(self._sft, has_aux=True))

    def arrays(self, made):
        """Tokens, labels (-1: none) and mask [S, T] of a record's responses, and the pixels of each sequence."""
        prompt = encode_prompt(self.tokenizer, made)
        shape = (SEQUENCES, LENGTH)
        tokens, labels, mask = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
        for i in range(SEQUENCES):
            # Sequences beyond the last response are its copies, and count nowhere.
            response = made.responses[min(i, len(made.responses) - 1)]
            ids, labelled = encode_response(self.tokenizer, response.text)
            length = len(prompt) + len(ids)
            tokens[i, :length] = [*prompt, *ids]
            mask[i, :length] = True
            if i < len(made.responses):
                labels[i, len(prompt) : length] = np.where(labelled, ids, -1)
        pixels = [read_image(data, SIDE) for data in made.images] * SEQUENCES
        return {"tokens": tokens, "labels": labels, "mask": mask} | ({"images": np.stack(pixels)} if pixels else {})

    def __call__(self, objective, made):
        """Loss, log-probabilities of the responses, and gradients by path."""
        pairs, counted = np.zeros((PAIRS, 2), np.int32), np.zeros(PAIRS, bool)
        found = all_pairs(len(made.responses))
        pairs[: len(found)], counted[: len(found)] = np.reshape(found, (-1, 2)), True
        (loss, logps), gradients = getattr(self, objective)(self.policy, self.arrays(made), pairs, counted)
        gradients = by_path(gradients)
        del gradients["visual.attn_pool.pos_embed"]
        return float(loss), np.asarray(logps)[: len(made.responses)], gradients

    def logps(self, state, arrays):
        model = nnx.merge(self.graph, state)
        logits = model(arrays["tokens"], arrays.get("images"), arrays["mask"], train=True)
        targets = arrays["labels"][:, 1:]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(targets, 0)[..., None], -1)
        return jnp.where(targets >= 0, picked[..., 0], 0).sum(axis=1)

    def _dpo(self, state, arrays, pairs, counted):
        logps = self.logps(state, arrays)
        ratio = logps - jax.lax.stop_gradient(self.logps(self.reference, arrays))
        losses = -jax.nn.log_sigmoid(BETA * (ratio[pairs[:, 0]] - ratio[pairs[:, 1]]))
        return jnp.where(counted, losses, 0).sum() / counted.sum(), logps

    def _sft(self, state, arrays, pairs, counted):
        logps = self.logps(state, arrays)
        return -logps.sum() / (arrays["labels"] >= 0).sum(), logps


def make(branches, images):
    """Responses of very different lengths."""
    return record(branches, ratings=range(branches), images=images)


def arrays(tokenizer, *rows):
    """All batches padded alike, so that few programs are compiled."""
    return rows_arrays(tokenizer, rows, length=640, labels=256)


def check(ours, expected):
    (metrics, gradients), (loss, _, expected_gradients) = ours, expected
    assert metrics["loss"] == pytest.approx(loss, rel=RELATIVE)
    assert_same_arrays(gradients, expected_gradients, RELATIVE)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_likelihood(tokenizer, sft, separate, branches, images):
    made = make(branches, images)
    expected = separate("sft", made)
    check(sft(arrays(tokenizer, record_row(tokenizer, made, responses=range(branches)))), expected)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("branches", [2, 3, 4])
def test_preference(tokenizer, dpo, separate, branches, images):
    made = make(branches, images)
    ours, expected = dpo(arrays(tokenizer, record_row(tokenizer, made))), separate("dpo", made)
    check(ours, expected)
    # The log-probability of each response, through the means over the pairs that it is chosen and rejected in.
    _, logps, _ = expected
    for side, name in enumerate(("logps/chosen", "logps/rejected")):
        mean = np.mean([logps[pair[side]] for pair in all_pairs(branches)])
        assert ours[0][name] == pytest.approx(mean, rel=RELATIVE)


def test_rows_of_one_batch_do_not_meet(tokenizer, dpo):
    """A ragged batch of rows with and without pictures is the mean over the pairs of each row by itself."""
    rows = [record_row(tokenizer, make(branches, images)) for branches, images in ((4, 1), (2, 0), (3, 1))]
    metrics, gradients = dpo(arrays(tokenizer, *rows, None))
    weights = np.array([6, 1, 3]) / 10
    alone = [dpo(arrays(tokenizer, row)) for row in rows]
    assert metrics["loss"] == pytest.approx(sum(w * m["loss"] for w, (m, _) in zip(weights, alone, strict=True)))
    mixed = {k: sum(w * g[k] for w, (_, g) in zip(weights, alone, strict=True)) for k in gradients}
    assert_same_arrays(gradients, mixed, RELATIVE)
