"""Synthesis: what a teacher's reply comes to, and the road from images to supervised samples."""

import json

import pytest

from data_prep.corpora.build import build
from data_prep.run import Instruction, Run
from data_prep.synthesize import CAPTIONS, PARTS, caption_prompt, load_teacher, parse, synthesize
from silkie_jax.corpus import CorpusReader
from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from tests.data_prep.conftest import rejections
from tests.data_prep.runs import QUIET, agent, make_run
from tests.endpoints import server
from tests.endpoints.server import Script, Server

FORMS = {"laion": "image", "vflan": "question"}


def test_golden_replies(golden):
    cases = json.loads((golden / "related" / "allava_replies.json").read_text())["cases"]
    for case in cases:
        found = parse(case["reply"], FORMS[case["form"]], finish_reason=case["finish_reason"])
        expected = case["expected"]
        said = {key: getattr(found, key) for key in expected if key != "candidates"}
        assert said == {key: value for key, value in expected.items() if key != "candidates"}, case["name"]
        assert list(found.candidates) == expected.get("candidates", []), case["name"]
        assert (found.note == "") == (found.kind == "complete")


def reply(**parts) -> str:
    parts = {name.replace("_", " "): text for name, text in parts.items()}
    return "\n".join(f"<start of {name}>\n{text}\n<end of {name}>" for name, text in parts.items())


WHOLE = {"description": "A bus.", "candidate_questions": "1. Why?\n\n2. Who?", "question": "Why?", "answer": "So."}


def test_what_is_lacking_is_said():
    assert parse(reply(**WHOLE), "image").candidates == ("1. Why?", "2. Who?")
    assert parse(reply(**WHOLE), "image", finish_reason="length").kind == "complete", "its end is there"
    assert parse(reply(**WHOLE | {"candidate_questions": ""}), "image").kind == "complete", "nothing is made of them"
    without = parse(reply(**WHOLE | {"description": " "}), "image")
    assert (without.kind, without.retry, without.note) == ("missing", True, "it lacks description")
    assert parse(reply(**WHOLE).replace("<end of description>", ""), "image").note == "it lacks description"
    assert parse(reply(**WHOLE), "question").note == "it lacks detailed answer"
    for words, kind in ((None, "unparsable"), ("A bus.", "unparsable"), ("Sorry, no.", "refusal")):
        assert parse(words, "image").kind == kind
    assert parse("<think>\n" + reply(**WHOLE) + "\n</think>", "image").kind == "unparsable"
    assert parse("< START  of\nanswer >x" + "< " * 50_000, "image").note == "it lacks description, question"
    assert parse("", "image", finish_reason="length").kind == "truncated"
    assert parse("", "image", finish_reason="content_filter").kind == "refusal"


def teach(request) -> str:
    """A complete reply of its own for every image; one in four lacks its question, one declines."""
    words, images = server.read(request)
    name = images[0][:6]
    if int(name[0], 16) < 3:
        return "I'm sorry, but I can't help with this image."
    parts = WHOLE | {"description": f"Sees {name}.", "answer": f"So {name}."}
    if "detailed answer" in words:
        return reply(description=f"Sees {name}.", detailed_answer=f"{words.split('<question>')[1].split()[0]} {name}.")
    return reply(**parts if int(name[0], 16) > 5 else parts | {"question": ""})


def write_teacher(path, url, **changes):
    path.write_text(json.dumps({"name": "teacher", "agent": agent(url, "strong", max_tokens=1000), **changes}))
    return path


def test_from_images_to_samples_killed_and_continued(tmp_path):
    run = make_run(tmp_path / "run", 24)
    with Server(Script(reply=teach)) as running:
        teacher = write_teacher(tmp_path / "teacher", running.url)
        dry = synthesize(run, teacher, Options(dry_run=True, progress=False))
        assert (dry.estimates[0].requests, len(running.log)) == (24, 0)
        with pytest.raises(UserError, match="stopped before the budget"):
            synthesize(run, teacher, Options(budget=0.05, progress=False))
        begun = len(running.log)
        assert 0 < begun < 24
        with pytest.raises(UserError, match="requests of `silkie corpus synthesize` are still open"):
            build(run, tmp_path / "early", progress=False, workers=1)
        outcome = synthesize(run, teacher, QUIET)
        asked = running.paid()
        kinds = outcome.states
        assert kinds["ok"] + kinds["failed"] == 24
        assert len(asked) == 24
        assert {1, 2} <= set(asked.values()) <= {1, 2, 3}, "what lacks a part has two tries a command, all else one"
        synthesize(run, teacher, QUIET)
        assert running.paid() == asked
    summary = build(run, tmp_path / "corpus", progress=False, workers=1)
    records = list(CorpusReader(tmp_path / "corpus"))
    assert summary.records == len(records) == 2 * kinds["ok"]
    assert summary.rows == summary.records + kinds["failed"]
    notes = [line["detail"] for line in rejections(tmp_path / "corpus")]
    assert len(notes) == kinds["failed"]
    assert {note.split(":")[0] for note in notes} == {"teacher (refusal)", "teacher (missing)"}
    for caption, question in zip(records[::2], records[1::2], strict=True):
        id = caption.id.removesuffix("-caption")
        name = caption.image_sha256[0][:6]
        assert (caption.prompt, caption.responses[0].text) == (caption_prompt(CAPTIONS, 0, id), f"Sees {name}.")
        assert question.id == f"{id}-question"
        assert (question.prompt, question.responses[0].text) == ("Why?", f"So {name}.")
        assert question.responses[0].model == "teacher"
        assert question.extra == {"candidates": ["1. Why?", "2. Who?"], "models_reported": ["strong-2026-01-01"]}
        assert question.images == caption.images
    assert len({record.prompt for record in records[::2]}) > 1
    again = build(run, tmp_path / "again", progress=False, workers=2, shards=3)
    assert again == summary
    assert list(CorpusReader(tmp_path / "again")) == records


def test_given_questions_are_answered(tmp_path):
    run = make_run(tmp_path / "run", 8, "Why{}?")
    with Server(Script(reply=teach)) as running:
        outcome = synthesize(run, write_teacher(tmp_path / "teacher", running.url, form="question"), QUIET)
    build(run, tmp_path / "corpus", progress=False, workers=1)
    records = list(CorpusReader(tmp_path / "corpus"))
    assert len(records) == 2 * outcome.states["ok"] > 0
    for question in records[1::2]:
        assert question.prompt == f"Why{question.id[1:].split('-')[0]}?"
        assert question.responses[0].text == f"{question.prompt} {question.image_sha256[0][:6]}."


def test_what_cannot_be_asked(tmp_path):
    with Run.create(tmp_path / "run") as run:
        run.write_instructions([Instruction("i", "Why?")], {"of": "a test"})
    with Server(Script(reply=teach)) as running:
        teacher = write_teacher(tmp_path / "teacher", running.url)
        assert synthesize(tmp_path / "run", teacher, QUIET).notes == (
            "1 instructions show no image: the teacher was not asked about them",
        )
        other = write_teacher(tmp_path / "teacher", running.url, form="question")
        with pytest.raises(UserError, match="another teacher: form was 'image' and is 'question'"):
            synthesize(tmp_path / "run", other, QUIET)
        assert not running.log
    for changes, message in (
        ({"form": "both"}, "form: 'both' is unknown; choose image or question"),
        ({"captions": [" "]}, "captions has no text"),
        ({"template": "gone.j2"}, "the template cannot be read"),
        ({"parse_attempts": 0}, "parse_attempts must be at least 1, not 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(write_teacher(tmp_path / "t", "http://127.0.0.1:9/v1", **changes))


@pytest.mark.parametrize("form", PARTS)
def test_a_teacher_that_echoes_its_request_has_said_nothing_of_use(tmp_path, form):
    """Its own parts hold three dots each: seen, they are no description that a build should keep."""
    run = make_run(tmp_path / "run", 1)
    with Server(Script(reply=lambda request: server.read(request)[0])) as running:
        outcome = synthesize(run, write_teacher(tmp_path / "teacher", running.url, form=form), QUIET)
    assert outcome.states == {"failed": 1}
