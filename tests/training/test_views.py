"""Responses with images of their own: one row of two segments is two rows, on any grid and mesh.

The expected side is the NumPy oracle, and rows of one response each, which know nothing of segments.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import Record, Response
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.batches import collate, decode_images
from silkie_jax.preference.grid import make_shape
from silkie_jax.preference.layout import row_sizes
from silkie_jax.preference.losses import LossOptions
from silkie_jax.preference.rows import encode_prompt, encode_response, make_row
from silkie_jax.training.config_file import make_config
from silkie_jax.training.loop import train
from silkie_jax.training.step import Objective
from tests.reference.objective import log_softmax
from tests.reference.qwen_vl import QwenVL, load_checkpoint
from tests.training.support import (
    ASPECTS,
    SIDE,
    Steps,
    assert_same_arrays,
    image_bytes,
    make_tiny,
    read_lines,
    record,
    write_corpus,
)

BETA = 0.02
RELATIVE = 1e-5
REFERENCE = np.array([-31.0, -40.5, 0, 0], np.float32)  # stored log-probabilities: any numbers will do
TEXTS = ("Three boxes, all of them red.", "Yes.")


def image_pair(*views, number=0, texts=TEXTS):
    """Two pictures, and two responses that show some of them."""
    pictures = (image_bytes(7 + number), image_bytes(99 + number))
    responses = tuple(Response(text, images=view) for text, view in zip(texts, views, strict=True))
    return Record(f"pair-{number}", pictures, f"What is in picture {number}?", responses, pairs=((0, 1),))


def alone(made, index):
    """The record of one response with the pictures that it shows."""
    response = dataclasses.replace(made.responses[index], images=None)
    return dataclasses.replace(
        made, images=tuple(made.images[n] for n in made.view(index)), responses=(response,), pairs=()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def sft(model):
    return Steps(model, Objective(reference=None, remat="none"))


@pytest.fixture(scope="module")
def dpo(model):
    return Steps(model, Objective("sigmoid", LossOptions(BETA), "precomputed", remat="none"))


def arrays(tokenizer, groups, accumulate=1, length=1024):
    """A batch [A, B, ...] of sequences of rows, all padded alike; the reference's are `REFERENCE` for each row."""
    sizes = [np.sum([row_sizes(row) for row in group], 0) for group in groups if group]
    shape = make_shape(1, len(groups), sizes)
    shape = shape._replace(tokens=length, labels=max(shape.labels, 128), images=max(shape.images, 2))
    flat = collate(groups, shape, tokenizer.end_of_text) | decode_images(groups, shape.images, SIDE)
    flat["reference_logps"] = np.zeros((len(groups), shape.branches), np.float32)
    for values, group in zip(flat["reference_logps"], groups, strict=True):
        known = np.concatenate([*(REFERENCE[: len(row.responses)] for row in group), []])
        values[: len(known)] = known
    return {k: v.reshape(accumulate, len(groups) // accumulate, *v.shape[1:]) for k, v in flat.items()}


def oracle_logp(folder, tokenizer, made):
    """Of the only response of a record, in float64."""
    net = QwenVL(*load_checkpoint(folder))
    images = np.stack([read_image(data, SIDE) for data in made.images]) if made.images else None
    prompt, (ids, labelled) = encode_prompt(tokenizer, made), encode_response(tokenizer, made.responses[0].text)
    logps = log_softmax(net(np.array([prompt + ids]), images, train=True))[0]
    at = np.flatnonzero(labelled)
    return logps[len(prompt) + at - 1, np.array(ids)[at]].sum()


@pytest.mark.slow
@pytest.mark.parametrize("views", [((0,), (1,)), ((1, 0), (1,)), ((), None)], ids=["pair", "shared", "blind"])
def test_two_views_in_one_row_are_two_rows(folder, tokenizer, sft, dpo, views):
    """Values and gradients, of the vision tower, too: a picture that both show has the sum of its two gradients."""
    made = image_pair(*views)
    row = make_row(tokenizer, made, [(0, 1)])
    assert row.segments == 2
    singles = [alone(made, index) for index in range(2)]
    rows = [make_row(tokenizer, single, responses=[0]) for single in singles]
    expected = [oracle_logp(folder, tokenizer, single) for single in singles]
    found, gradients = zip(*(sft(arrays(tokenizer, [[one]])) for one in rows), strict=True)
    counts = [len(one.labels) for one in rows]
    logps = [-count * metrics["loss"] for count, metrics in zip(counts, found, strict=True)]
    assert logps == pytest.approx(expected, rel=RELATIVE)

    metrics, ours = sft(arrays(tokenizer, [[row]]))
    assert metrics["loss"] == pytest.approx(-sum(expected) / sum(counts), rel=RELATIVE)
    mean = {k: sum(n * g[k] for n, g in zip(counts, gradients, strict=True)) / sum(counts) for k in ours}
    assert_same_arrays(ours, mean, RELATIVE)

    metrics, ours = dpo(arrays(tokenizer, [[row]]))
    assert metrics["logps/chosen"] == pytest.approx(expected[0], rel=RELATIVE)
    assert metrics["logps/rejected"] == pytest.approx(expected[1], rel=RELATIVE)
    margin = BETA * ((expected[0] - REFERENCE[0]) - (expected[1] - REFERENCE[1]))
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-margin)), rel=RELATIVE)
    slope = -BETA / (1 + np.exp(margin))  # of the loss by the chosen log-probability
    by_hand = {k: -slope * (counts[0] * gradients[0][k] - counts[1] * gradients[1][k]) for k in ours}
    assert_same_arrays(ours, by_hand, 2 * RELATIVE)


def test_an_image_pair_turned_round_has_the_margin_with_the_other_sign(tokenizer, dpo):
    made = image_pair((0,), (1,), texts=TEXTS[:1] * 2)
    margins = [
        dpo(arrays(tokenizer, [[make_row(tokenizer, made, [pair])]]))[0]["rewards/margins"] for pair in ((0, 1), (1, 0))
    ]
    assert margins[0] == -margins[1] != 0


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Image pairs, a row without views, and one that shows a picture in two segments."""
    views = (((0,), (1,)), (None, None), ((1,), (0, 1)), ((1,), (0,)))
    return [make_row(tokenizer, image_pair(*own, number=n), [(0, 1)]) for n, own in enumerate(views)]


@pytest.fixture(scope="module")
def one_device(tokenizer, dpo, rows):
    return dpo(arrays(tokenizer, [[row] for row in rows]))


def check(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert_same_arrays(found[1], expected[1], 1e-5)


@pytest.mark.slow
def test_packed_and_accumulated_rows_with_views_are_one_batch(tokenizer, dpo, rows, one_device):
    packed = arrays(tokenizer, [rows[:2], [], rows[2:], []], accumulate=2, length=2048)
    assert packed["branches"].max() >= 3 * 64
    check(dpo(packed), one_device)


@pytest.mark.slow
def test_a_mesh_gives_the_loss_and_the_gradients_of_one_device(folder, tokenizer, rows, one_device):
    mesh = make_mesh(2, 2, 2)
    objective = Objective("sigmoid", LossOptions(BETA), "precomputed", remat="none")
    steps = Steps(load_model(folder, sharding_of=partial(sharding_of, mesh)), objective, mesh=mesh)
    check(steps(arrays(tokenizer, [[row] for row in rows])), one_device)


# A whole run


def run_of(folder, tmp_path, records, **values):
    """What one step of training on these records logged, and the run's folder."""
    corpus = write_corpus(tmp_path / "corpus", records)
    given = {"model": str(folder), "corpus": str(corpus), "run_dir": str(tmp_path / "run"), "lora": {"rank": 2}}
    given |= {"steps": 1, "batch_rows": 2, "evaluation_fraction": 0, "dtype": "float32", "mesh": {"data": 1}}
    run = train(make_config(given | {"log_every": 1, "remat": "none"} | values))
    (line,) = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    return line, run


def test_a_run_on_image_pairs_begins_at_log_2(folder, tmp_path):
    made = [image_pair((0,), (1,), number=n, texts=TEXTS[:1] * 2) for n in range(2)]
    line, _ = run_of(folder, tmp_path, made)
    assert line["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert line["logps/chosen"] != line["logps/rejected"]  # of the same words


def test_a_run_with_a_condition_says_what_to_ask(folder, tmp_path):
    condition = {"name": "attributes", "best": 5, "aspects": list(ASPECTS[:2])}
    line, run = run_of(folder, tmp_path, [record(0, (5, 1), images=0)], objective="sft", condition=condition)
    assert line["loss"] > 0
    words = (run / "condition.txt").read_text().splitlines()
    assert words[1:] == [f"{ASPECTS[0]}:5,{ASPECTS[1]}:5"]
