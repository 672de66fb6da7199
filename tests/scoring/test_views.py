"""Stored and served log-probabilities of responses with images of their own."""

import dataclasses

import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import Record, Response
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.rows import Row
from silkie_jax.scoring.scorer import Scored, Scorer
from silkie_jax.serving.logprobs_request import logprobs_reply
from tests.training.support import image_bytes, make_tiny


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), layers=1, vision_layers=1)
    model, tokenizer = load_model(folder), Tokenizer.from_folder(folder)
    return Scorer(model, tokenizer, make_mesh(data=1), batch_rows=1, max_length=900)


def test_each_response_has_the_log_probability_that_it_has_alone(scorer):
    """Order of responses and of images, a picture in two segments, and a text in no sight of any."""
    views = ((1,), (0,), (0, 1), (), (1,))
    texts = ("A red circle.", "A red circle.", "Two pictures.", "Nothing.", "Yes.")
    responses = tuple(Response(text, images=view) for text, view in zip(texts, views, strict=True))
    record = Record("r", (image_bytes(1), image_bytes(2)), "What is it?", responses)
    ((row, found),) = scorer([record])
    assert row.segments == 4
    assert found[0] != found[1]  # the same words about other pictures
    for index, view in enumerate(views):
        pictures = tuple(record.images[n] for n in view)
        single = dataclasses.replace(responses[index], images=None)
        ((_, expected),) = scorer([Record("s", pictures, record.prompt, (single,))])
        assert found[index] == pytest.approx(expected[0], rel=1e-5)

    class Served:
        name = "tiny"

    reply = logprobs_reply(Served, Scored(row, found))
    assert [entry["logprob"] for entry in reply["data"]] == [float(x) for x in found]
    assert reply["usage"]["prompt_tokens"] == sum(row.views.prompts)
    assert isinstance(row, Row)
    assert np.isfinite(found).all()
