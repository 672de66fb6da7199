"""Multiple choice: every tool's rule on golden's traps and on ours, and the generic benchmark."""

import json

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mcq
from silkie_jax.evaluation.rules.letters import RULES, mathvista_choice, mrag_letter

FOUR = ("kettle", "ladder", "violin", "saddle")


def row(k, answer, response, **more):
    return {"id": k, "question": "Which?", "options": FOUR, "answer": answer, "response": response, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("rule", RULES)
def test_golden_labels(golden, rule):
    if rule.startswith("mathvista"):
        pytest.importorskip("rapidfuzz")
    folder = golden / "evaluation" / "yesno_mcq"
    expected = json.loads((folder / "expected.json").read_text())["mcq.jsonl"][rule]
    items, answers = mcq.read_answers(folder / "mcq.jsonl", None, {})
    found = [RULES[rule](answer.text, item.options) or "other" for item, answer in zip(items, answers, strict=True)]
    assert found == expected["labels"]


def test_golden_numbers_right(golden):
    pytest.importorskip("rapidfuzz")
    folder = golden / "evaluation" / "yesno_mcq"
    expected = json.loads((folder / "expected.json").read_text())["mcq.jsonl"]
    items, answers = mcq.read_answers(folder / "mcq.jsonl", None, {})
    for rule in RULES:
        score = mcq.score(items, answers, None, rule, {})
        assert score.official == {name: labels["right"] for name, labels in expected.items()}
        assert score.counts["undecided"] == expected[rule]["undecided"]


@pytest.mark.parametrize(
    ("rule", "text", "letter"),
    [
        ("letter_exact_llava_seed", "AB", None),
        ("letter_exact_llava_seed", "", None),
        ("letter_exact_llava_seed", "E", None),
        ("first_character_lmms_eval_seed", "  b or a", "B"),
        ("first_character_lmms_eval_seed", "ﬁ", None),  # its capital is two letters
        ("mrag_official_before_the_judge", "A'.", "A"),
        ("mrag_official_before_the_judge", "A!'", None),
        ("mrag_official_before_the_judge", "D and (A)", "A"),  # brackets come first
        ("mrag_official_before_the_judge", "A\nbecause", None),
        ("vlmevalkit_can_infer", "Here B is what you see", None),  # too far from the end
        ("vlmevalkit_can_infer", "It is B as you see", "B"),
        ("vlmevalkit_can_infer", "B is what I see: a violin", "C"),
        ("vlmevalkit_can_infer", "A VIOLIN" + " indeed" * 9, None),  # longer than twice all contents
        ("vlmevalkit_can_infer", "Cannot determine the answer. A", "Z"),
        ("vlmevalkit_can_infer", "Failed to obtain answer via API. A", None),
        ("vlmevalkit_can_infer", "Z", "Z"),
    ],
)
def test_traps(rule, text, letter):
    assert RULES[rule](text, FOUR) == letter


@pytest.mark.parametrize(
    ("extraction", "choice"),
    [
        (" (b) x (A)", "ladder"),  # the first in brackets
        ("B", "ladder"),
        ("(E)", "kettle"),  # compared as "E"
        ("", "kettle"),  # the first of equally short ones
        ("sadle", "saddle"),
        ("B.", "kettle"),
    ],
)
def test_mathvista_choice(extraction, choice):
    pytest.importorskip("rapidfuzz")
    assert mathvista_choice(extraction, FOUR) == choice


def test_mathvista_shortest():
    pytest.importorskip("rapidfuzz")
    assert mathvista_choice("", ["long", "ab", "cd"]) == "ab"


def test_letters_beyond_the_options():
    assert mrag_letter("D") == "D"
    assert RULES["mrag_official_before_the_judge"]("D", FOUR[:2]) is None
    assert RULES["first_character_lmms_eval_seed"]("e", (*FOUR, "fifth")) == "E"


def test_prompt_and_missing(tmp_path):
    data = write(tmp_path / "data.jsonl", [row(k, "B", "") for k in range(2)])
    items = mcq.items(data, {})
    assert mcq.prompt(items[0], "question") == "Which?\nA. kettle\nB. ladder\nC. violin\nD. saddle"
    assert mcq.prompt(items[0], "llava").endswith("\nAnswer with the option's letter from the given choices directly.")
    items, answers = mcq.read_answers(write(tmp_path / "a.jsonl", [{"id": 1, "response": "B"}]), items, {})
    score = mcq.score(items, answers, None, "letter_exact_llava_seed", {})
    assert score.sums.figures()["accuracy"] == 0.5
    assert score.outcomes == {"1": 1.0}
    assert score.counts["missing"] == 1
    assert score.notes == ["1 of 2 questions have no answer; they count as wrong."]


def test_files_without_ids_go_by_position(tmp_path):
    rows = [row(0, "A", "A"), row(0, "B", "A")]
    for r in rows:
        del r["id"]
    items, answers = mcq.read_answers(write(tmp_path / "a", rows), None, {})
    assert mcq.score(items, answers, None, "letter_exact_llava_seed", {}).outcomes == {"0": 1.0, "1": 0.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": "AB"}, "options must be a list of 2 to 26 texts, found a text"),
        ({"options": ["one"]}, "options must be a list of 2 to 26 texts, found 1 of them"),
        ({"options": ["one", 2]}, "options must be texts, found a number"),
        ({"options": ["one", None]}, "options must be texts, found null"),
        ({"answer": "E"}, "answer must be a letter from A to D, found 'E'"),
        ({"answer": ""}, "answer must be a letter from A to D, found ''"),
        ({"answer": 1}, "answer must be a text, found a number"),
    ],
)
def test_malformed(tmp_path, more, message):
    path = write(tmp_path / "a.jsonl", [row(0, "A", ""), row(1, "A", "") | more])
    with pytest.raises(UserError) as error:
        mcq.read_answers(path, None, {})
    assert f"{path}: line 2: {message}" in str(error.value)
