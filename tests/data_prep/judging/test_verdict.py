"""Verdicts: which of several texts is best, in both orders, beside the right answer."""

import json
import math
from dataclasses import asdict

import pytest

from data_prep.judging.aggregate import judgements_of, to_record
from data_prep.judging.by_rubric import RubricReading
from data_prep.judging.kinds import load_judge
from data_prep.judging.rate import rate
from data_prep.judging.ratings import parse
from data_prep.judging.rubric import Rubric, load_rubric
from data_prep.respond import respond
from data_prep.run import Instruction, Run
from silkie_jax.corpus.pairs import pairs
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make
from tests.data_prep.runs import QUIET, everything, picture, write_judge, write_pool
from tests.endpoints import server
from tests.endpoints.server import Script, Server

CRITIC = load_rubric("self_critic")


def verdict(reply: str | None, **options) -> int | None:
    """The text that a reply names, from 1."""
    row = parse(reply, CRITIC, 2, **options).ratings["Preferred"]
    return row.index(1.0) + 1 if 1.0 in row else None


def test_golden_replies(golden):
    cases = json.loads((golden / "related" / "sima_critic.json").read_text())["replies"]
    assert [verdict(case["reply"]) for case in cases] == [case["proposed"] for case in cases]


def test_what_comes_of_a_reply():
    reply = parse("Text 1 invents a dog. The best text is [[ 2 ]].", CRITIC, 2)
    assert (reply.kind, reply.ratings) == ("complete", {"Preferred": [0.0, 1.0]})
    assert reply.rationales == {"Preferred": ["", "Text 1 invents a dog. The best text is"]}
    three = parse("[[3]]", CRITIC, 3)
    assert three.ratings == {"Preferred": [0.0, 0.0, 1.0]}
    assert verdict("<think>\n[[1]]\n</think>\nIt is [[2]].") == 2
    for text in ("The best text is [[1", "[[0]]", "[[1]] or rather [[3]]", "[[1] ]", "", "1"):
        found = parse(text, CRITIC, 2)
        assert (found.kind, found.retry, found.usable) == ("unparsable", True, False), text
        assert found.note
    assert parse("Text 1 is", CRITIC, 2, finish_reason="length").kind == "truncated"
    assert parse("I'm sorry, I cannot compare them.", CRITIC, 2).kind == "refusal"
    assert parse("", CRITIC, 2, finish_reason="content_filter").kind == "refusal"
    assert parse("[[1]]", CRITIC, 2, refusal="no").kind == "refusal"
    assert parse("[[" * 300_000, CRITIC, 2).kind == "unparsable"


def test_the_prompt_shows_criteria_examples_and_the_right_answer():
    prompt = CRITIC.prompt("What is it?", ["one", "two"], reference="A {{ cat }}.")
    order = [
        "Objects",
        "Relations",
        "Attributes",
        "Example 1",
        "[[1]]",
        "Example 2",
        "[[2]]",
        "What is it?",
        "A {{ cat }}.",
    ]
    places = [prompt.index(words) for words in order]
    assert places == sorted(places)
    assert prompt.index("<text 1>\none\n") < prompt.index("<text 2>\ntwo\n")
    assert "A {{ cat }}." not in load_rubric("vlfeedback").prompt("What is it?", ["one"], reference="A {{ cat }}.")
    again = make(json.loads(json.dumps(asdict(CRITIC))), Rubric)
    assert again.fingerprint == CRITIC.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verdict: true\naspects: [{name: A}]", r"write scale: \{low: 0, high: 1\}"),
        ("verdict: true\nscale: {low: 0, high: 1}\naspects: [{name: A, weight: 2}]",
         "leave out levels, aliases and weight"),
        (
            "verdict: true\nscale: {low: 0, high: 1}\naspects: [{name: A}]\n"
            "examples: [{instruction: i, texts: [a, b], verdict: 3}]",
            r"examples\[0\].verdict must name one of its 2 texts, not 3",
        ),
        (
            "verdict: true\nreference: true\nscale: {low: 0, high: 1}\naspects: [{name: A}]\n"
            "examples: [{instruction: i, texts: [a, b], verdict: 1}]",
            r"examples\[0\].reference: give it one",
        ),
        ("aspects: [{name: A}]\nexamples: [{instruction: i, texts: [a], verdict: 1}]", "examples are for verdicts"),
    ],
)  # fmt: skip
def test_mistakes_in_rubrics_are_one_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(f"name: x\n{text}")
    with pytest.raises(UserError, match=message) as error:
        load_rubric(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


# Against a server


def answered(folder, url, references=True):
    """A run of twelve instructions, each answered twice; the last has no right answer."""
    with Run.create(folder) as run:
        with run.transaction():
            images = [run.add_image(picture(n)) for n in range(12)]
        run.write_instructions(
            (
                Instruction(f"i{n}", f"What is in {n}?", (images[n],), extra={"reference": "A."} if n < 11 else {})
                for n in range(12)
            ),
            {"of": "a test"},
        )  # fmt: skip
    respond(folder, write_pool(folder.with_suffix(".pool"), url, ("m0", "m1"), {"models_per_instruction": 2}), QUIET)
    return folder


def critic(request) -> str:
    """Answers, or names the text of higher quality; what it sees first where they are alike. One reply is cut off."""
    words, _ = server.read(request)
    if "<reference answer>" not in words:
        return server.reply(request)
    material = words[words.rindex("# Material") :]
    first, second = (float(part[: part.index("\n")]) for part in material.split("quality ")[1:])
    return f"[[{1 if first >= second else 2}]] seems better. The best text is [[{1 if first >= second else 2}]]."


def ratings(run, rubric=CRITIC):
    found = []
    judges = {"judge": RubricReading("judge", rubric)}
    for gathered in everything(run):
        judgements = judgements_of(gathered, judges)
        record = to_record(gathered, judges, judgements, [])
        found.append(([response.ratings["Preferred"] for response in record.responses], record))
    return found


def write_critic(path, url, **changes):
    return write_judge(path, url, {"kind": "verdict", "rubric": "self_critic", "orders": 2, **changes})


def test_both_orders_are_asked_and_a_contradiction_is_a_tie(tmp_path):
    with Server(Script(reply=critic)) as running:
        run = answered(tmp_path / "run", running.url)
        outcome = rate(run, [write_critic(tmp_path / "judge", running.url)], QUIET)
        assert outcome.states == {"ok": 22}
        assert outcome.notes == (
            "1 times a judge that is shown the right answer was not asked: their instructions have no `reference`",
        )
        before = len(running.log)
        rate(run, [write_critic(tmp_path / "judge", running.url)], QUIET)
        assert len(running.log) == before, "nothing is asked twice"
    qualities = [[float(r.text.split("quality ")[1]) for r in gathered.responses] for gathered in everything(run)]
    for number, (row, record) in enumerate(ratings(run)):
        (a, b) = qualities[number]
        if number == 11:
            assert all(map(math.isnan, row))
            continue
        assert row == ([0.5, 0.5] if a == b else [float(a > b), float(b > a)])
        assert pairs(record, {"name": "aspect", "aspect": "Preferred"}) == (
            [] if a == b else [(0, 1) if a > b else (1, 0)]
        )
    assert {a == b for a, b in qualities[:11]} == {True, False}, "the case is not tested"


def test_a_judge_that_always_says_the_first_makes_no_pair(tmp_path):
    def first(request):
        return "[[1]]" if "<reference answer>" in server.read(request)[0] else server.reply(request)

    with Server(Script(reply=first)) as running:
        run = answered(tmp_path / "run", running.url)
        rate(run, [write_critic(tmp_path / "judge", running.url)], QUIET)
    for _, record in ratings(run):
        assert pairs(record, {"name": "aspect", "aspect": "Preferred"}) == []


def test_a_verdict_in_one_order_alone_decides_nothing(tmp_path):
    """Text 1 is named where it was `m0`'s; the other order gets a mark that is cut off, twice."""

    def half(request):
        words, _ = server.read(request)
        if "<reference answer>" not in words:
            return server.reply(request)
        material = words[words.rindex("# Material") :]
        return "[[1]]" if material.index("m0 sees") < material.index("m1 sees") else "The best is [[1"

    with Server(Script(reply=half)) as running:
        run = answered(tmp_path / "run", running.url)
        outcome = rate(run, [write_critic(tmp_path / "judge", running.url)], QUIET)
    assert outcome.states == {"ok": 11, "failed": 11}
    assert outcome.attempts == {"ok": 11, "unparsable": 22}, "a cut-off mark is asked for again"
    assert all(map(math.isnan, ratings(run)[0][0]))


def test_kinds_and_forms_are_checked(tmp_path):
    url = "http://127.0.0.1:9/v1"
    assert load_judge(write_critic(tmp_path / "judge", url)).settings()["kind"] == "verdict"
    for changes, message in (
        ({"kind": "verdict", "rubric": "vlfeedback"}, "kind: 'verdict' is not 'rubric'"),
        ({"form": "json"}, "leave out form: json"),
    ):
        with pytest.raises(UserError, match=message):
            rate(tmp_path, [write_critic(tmp_path / "judge", url, **changes)], QUIET)
