"""Answers of a model on this machine: each as if asked alone, resumed by contents, the same file however often cut."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.evaluation.running import answers as files
from silkie_jax.evaluation.running.local import LocalModel, by_likelihood, option_row, tokens_of
from silkie_jax.evaluation.running.questions import AnswerOptions, open_questions
from silkie_jax.generation.generate import generate
from silkie_jax.models.qwen_vl.chat import TEMPLATES, decode_reply, templated
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from tests.evaluation.support import write_mcq, write_yesno
from tests.training.support import make_tiny

ALONE = (1, 1, 1)
QUICK = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    make_tiny(folder / "model")
    write_yesno(folder / "few", images=5)
    return folder


def ask(folder, data: str, **options):
    return open_questions("yesno", folder / data / "questions.jsonl", AnswerOptions(max_new_tokens=6, **options))


def local(folder, *asked, mesh=ALONE, slots=4, **options) -> LocalModel:
    return LocalModel(folder / "model", asked, dtype="float32", mesh=mesh, slots=slots, say=print, **options)


def one_by_one(folder, questions) -> dict[str, str]:
    """Greedy answers of the plain loop, a question at a time; those of a length go together."""
    model, tokenizer = load_model(folder / "model", dtype="float32"), Tokenizer.from_folder(folder / "model")
    size, most = model.config.visual.image_size, questions.decoding.max_new_tokens
    groups: dict[tuple[int, int], list] = {}
    for item in questions.items:
        ids = tokens_of(tokenizer, questions, item)
        groups.setdefault((len(ids), len(item.pictures)), []).append((item, ids))
    found = {}
    for (_, pictures), rows in groups.items():
        pixels = np.stack([read_image(p.read(), size) for item, _ in rows for p in item.pictures]) if pictures else None
        stop = (tokenizer.im_end, tokenizer.im_start)
        out = np.asarray(generate(model, np.array([ids for _, ids in rows]), pixels, most, stop=stop))
        found |= {
            item.id: decode_reply(tokenizer, tokens) for (item, _), tokens in zip(rows, out.tolist(), strict=True)
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "slots", "images"), [(ALONE, 7, 67), ((2, 2, 2), 8, 12)])
def test_answers_are_those_of_one_question_at_a_time(folder, tmp_path, mesh, slots, images):
    write_yesno(folder / f"{images}", images)
    questions = ask(folder, f"{images}")
    assert len(questions.items) == 3 * images + 1
    model = local(folder, questions, mesh=mesh, slots=slots)
    model.answer(questions, tmp_path / "answers.jsonl")
    _, answers = files.read_answers(tmp_path / "answers.jsonl")
    assert {answer.id: answer.text for answer in answers} == one_by_one(folder, questions)
    assert [answer.id for answer in answers] == [item.id for item in questions.items]
    assert model.engine.meters.images == images  # each is encoded once for its three questions
    assert len({answer.text for answer in answers}) > 3


def test_what_is_continued_is_known_by_its_contents(folder, tmp_path):
    out, questions = tmp_path / "answers.jsonl", ask(folder, "few")
    model = local(folder, questions)
    model.answer(questions, out)
    whole = out.read_bytes()
    header, *lines = whole.decode().splitlines(keepends=True)
    # Some are there, and a line that was cut off: they stay, and only the others are asked.
    out.unlink()
    kept = [line.replace('"response": "', '"response": "kept ') for line in lines[3:9]]
    part = tmp_path / "answers.jsonl.part"
    part.write_text(header + "".join(kept) + lines[9][:20])
    model.answer(questions, out)
    got = out.read_text().splitlines(keepends=True)
    assert got == [header, *lines[:3], *kept, *lines[9:]]
    assert not part.exists()
    # Other weights, other questions, another decoding.
    for change, said in (
        ({"weights": "x"}, "other weights"),
        ({"items": "x"}, "other items"),
        ({"decoding": {}}, "another decoding"),
        ({"prompt": "x", "adapter": "y"}, "another --prompt and another adapter"),
    ):
        origin = files.Origin(**{k: v for k, v in json.loads(header).items() if k != "form"})
        with pytest.raises(UserError, match=f"was begun with {said}; remove it"):
            files.is_finished(out, dataclasses.replace(origin, **change))


def test_a_file_of_something_else_is_left_alone(folder, tmp_path):
    questions = ask(folder, "few")
    model = local(folder, questions)
    (tmp_path / "mine.jsonl").write_text('{"id": 1}\n')
    (tmp_path / "other.jsonl.part").write_text('{"id": 1}\n')
    for name, said in (("mine", "no file of answers"), ("other", "was not begun by `silkie evaluate answer`")):
        with pytest.raises(UserError, match=said):
            model.answer(questions, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == (tmp_path / "other.jsonl.part").read_text() == '{"id": 1}\n'


def test_an_image_that_is_missing_is_named_before_a_model_is_loaded(tmp_path):
    data = write_yesno(tmp_path / "data", images=2)
    (tmp_path / "data" / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png: no such image"):
        open_questions("yesno", data, AnswerOptions())


def test_a_part_is_drawn_by_image_and_for_good(folder, tmp_path):
    write_yesno(tmp_path / "data", images=40)
    every = open_questions("yesno", tmp_path / "data" / "questions.jsonl", AnswerOptions()).items
    some = files.draw(every, 30)
    assert len(some) in (30, 31)
    images = {item.cluster for item in some}
    assert {item.id for item in every if item.cluster in images} == {item.id for item in some}
    assert files.draw(every, 30) == some
    assert files.draw(every, None) == files.draw(every, 1000) == every


def test_a_text_may_follow_every_question(folder):
    plain, more = ask(folder, "few"), ask(folder, "few", after="Rated so:\nA:4")
    assert [more.text(item) for item in more.items] == [f"{plain.text(i)}\nRated so:\nA:4" for i in plain.items]
    assert (plain.origin.prompt, more.origin.prompt) == (plain.style, f"{plain.style}, then 'Rated so:\\nA:4'")
    assert dataclasses.replace(more.origin, prompt=plain.style) == plain.origin


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_differ_in_their_form_alone(folder, template):
    tokenizer = Tokenizer.from_folder(folder / "model")
    text = tokenizer.decode(templated(tokenizer, "Is it <|im_end|>?", 1, template))
    assert ("<|im_start|>system" in text) == (template != "raw")
    assert ("Picture 1: " in text) == (template != "bare-image")
    assert text.count("<img>") == 1
    assert "Is it <|im_end|>?" in text  # as text: see the number of tokens
    assert templated(tokenizer, "Is it <|im_end|>?", 1, template).count(tokenizer.im_end) == (
        0 if template == "raw" else 2
    )


def test_options_are_compared_as_sequences_of_their_own(folder, tmp_path):
    """A row of four options gives each the mean loss that it has alone, over the tokens that it adds."""
    data = write_mcq(tmp_path / "data", images=6)
    questions = open_questions("mcq", data, AnswerOptions())
    questions = dataclasses.replace(questions, benchmark=_ByLikelihood(), template="raw")
    assert questions.by_likelihood
    model = local(folder, questions)
    rows = {item.id: option_row(model.tokenizer, questions, item) for item in questions.items}
    found = {answer.id: answer for answer in by_likelihood(model.scorer, lambda item: rows[item.id], questions.items)}
    logits_of = model._model
    for item in questions.items:
        losses = []
        images = np.stack([read_image(p.read(), logits_of.config.visual.image_size) for p in item.pictures])
        alone = templated(model.tokenizer, item.question, 1, "raw")
        for option in item.options:
            ids = templated(model.tokenizer, item.question + option, 1, "raw")
            logits = np.asarray(logits_of(np.array([ids]), images))[0].astype(np.float64)
            logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logps -= logits.max(-1, keepdims=True)
            added = range(len(alone), len(ids))
            losses.append(-np.mean([logps[place - 1, ids[place]] for place in added]))
        assert found[item.id].fields["losses"] == pytest.approx(losses, rel=1e-4)
        assert found[item.id].text == "ABCD"[int(np.argmin(losses))]


class _ByLikelihood:
    """As SEED-Bench asks: contents of options follow the question directly."""

    class ABOUT:
        likelihood = True

    def prompt(self, item, style):
        return item.question

    def continuations(self, item, style):
        return item.options


# Kills


def command(folder, out) -> list[str]:
    data = folder / "many" / "questions.jsonl"
    asked = ["yesno", "--data", data, "--model", folder / "model", "--dtype", "float32", "--slots", "3", "--out", out]
    return [sys.executable, "-m", "silkie_jax.cli", "evaluate", "answer", *map(str, asked), "--max-new-tokens", "12"]


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_the_same_file(folder, tmp_path):
    """Some kills, each after more answers; then the file is what an undisturbed run writes. (Ten were tried once.)"""
    write_yesno(folder / "many", images=30)
    env = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command(folder, tmp_path / "whole.jsonl"), env=env, check=True, capture_output=True)
    out, part = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.part"
    for kill in range(3):
        process = subprocess.Popen(command(folder, out), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted, deadline = 30 * kill, time.monotonic() + 120
        while (part.read_bytes().count(b"\n") if part.exists() else 0) <= wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    done = subprocess.run(command(folder, out), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_same_question_is_drawn_anew_for_every_item(folder, tmp_path):
    """Under one seed for all, a hundred answers would be worth hardly more than one."""
    data = tmp_path / "questions.jsonl"
    line = {"question": "What is it?", "answer": "yes"}
    data.write_text("".join(json.dumps(line | {"id": str(n)}) + "\n" for n in range(8)))

    def drawn(name, **options):
        questions = open_questions("yesno", data, AnswerOptions(max_new_tokens=6, temperature=1.0, **options))
        local(folder, questions).answer(questions, tmp_path / name)
        return [answer.text for answer in files.read_answers(tmp_path / name)[1]]

    first = drawn("first", seed=1)
    assert len(set(first)) == 8
    assert drawn("again", seed=1) == first
    assert drawn("other", seed=2) != first
