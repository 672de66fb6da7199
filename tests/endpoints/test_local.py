"""A checkpoint of one's own in the pool: served by silkie_jax from another process, asked like any other model."""

import json
import os

import jax
import numpy as np
import pytest

from data_prep.respond import respond
from data_prep.run import Run
from silkie_jax import generate, load, read_image
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.chat import chat_prompt, decode_reply
from tests.data_prep.runs import QUIET, agent, everything, make_run, picture
from tests.endpoints.server import Server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from examples.tiny_qwen_vl import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def test_local_models_answer_as_generate_does(tmp_path, checkpoint, monkeypatch, capfd):
    """Two agents of one checkpoint, of which one draws: they share a server."""
    jax.devices()  # this process keeps its own; one is enough for a server of a few requests
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    with Server() as server:
        make_run(tmp_path / "run", 3)
        local = {"local": str(checkpoint), "dtype": "float32", "max_tokens": 6, "sampling": {"temperature": 0}}
        warm = {**local, "max_tokens": 5, "sampling": {"temperature": 1.5, "seed": 4}}
        models = {"mine": local, "warm": warm, "other": agent(server.url, "other")}
        (tmp_path / "pool").write_text(json.dumps({"models": models, "models_per_instruction": 3}))
        outcome = respond(tmp_path / "run", tmp_path / "pool", QUIET)
    assert outcome.states == {"ok": 9}
    assert capfd.readouterr().err.count("engine: ") == 1
    model, tokenizer = load(checkpoint)
    for n, gathered in enumerate(everything(tmp_path / "run")):
        image = read_image(picture(n), model.config.visual.image_size)
        tokens = chat_prompt(tokenizer, f"What is in picture {n}?", 1).tokens
        stop = (tokenizer.im_end, tokenizer.im_start)
        expected = generate(model, np.asarray([tokens]), image[None], 6, stop=stop)
        (mine,) = [response for response in gathered.responses if response.agent == "mine"]
        assert mine.text == decode_reply(tokenizer, np.asarray(expected)[0].tolist())
        (other,) = [response for response in gathered.responses if response.agent == "warm"]
        assert mine.model == other.model == checkpoint.name
        assert other.text != mine.text
    with Run.open(tmp_path / "run") as run:
        assert {s.agent: s.cost > 0 for s in run.spending()} == {"mine": False, "warm": False, "other": True}


def test_what_cannot_be_loaded_is_said(tmp_path, capfd):
    make_run(tmp_path / "run", 1)
    (tmp_path / "pool").write_text(f'{{"models_per_instruction": 1, "models": {{"mine": {{"local": "{tmp_path}"}}}}}}')
    with pytest.raises(UserError, match=r"mine: the model .* could not be loaded"):
        respond(tmp_path / "run", tmp_path / "pool", QUIET)
    assert "silkie:" in capfd.readouterr().err
