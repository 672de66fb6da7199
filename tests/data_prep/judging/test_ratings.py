"""The parser of judges' replies: every form that judges give, and fuzzed: it never raises and never invents."""

# ruff: noqa: E501 (replies are given whole)

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.judging.ratings import parse, rating_in
from data_prep.judging.rubric import Rubric, load_rubric
from silkie_jax.yaml_files import make

VLFEEDBACK = load_rubric("vlfeedback")
NAMES = VLFEEDBACK.names
NAN = math.nan
# Two aspects and two texts keep the variants short; A and B are rated (4, 2) and (5, 1).
SMALL = make({"name": "small", "aspects": [{"name": "Aspect A", "aliases": ["Alpha"]}, {"name": "Beta Thing"}]}, Rubric)
WANTED = {"Aspect A": [4, 2], "Beta Thing": [5, 1]}


def text_form(ratings, rubric=VLFEEDBACK, rating="Rating: {}", between="\n"):
    """The reply that the template asks for."""
    lines = []
    for name in rubric.names:
        lines.append(f"#### {name} Assessment")
        for n, value in enumerate(ratings[name], 1):
            lines += [f"##### Output for Text {n}", rating.format(value), f"Rationale: because of {n}"]
    return between.join(lines)


def same(found, wanted):
    return list(found) == list(wanted) and all(
        len(found[name]) == len(wanted[name])
        and all(a == b or (a != a and b != b) for a, b in zip(found[name], wanted[name], strict=True))
        for name in wanted
    )


COMPLETE = {
    "the asked form": "#### Aspect A Assessment\n##### Output for Text 1\nRating: 4\nRationale: r\n##### Output for Text 2\n"
    "Rating: 2\nRationale: r\n\n#### Beta Thing Assessment\n##### Output for Text 1\nRating: 5\nRationale: r\n"
    "##### Output for Text 2\nRating: 1\nRationale: r",
    "after thoughts": f"<think>\n{text_form({name: [1, 1] for name in WANTED}, SMALL)}\n</think>\n\n" + text_form(WANTED, SMALL),
    "after thoughts whose beginning stands in the prompt": "Text 1 looks better.\nRating: 3\n</think>\n" + text_form(WANTED, SMALL),
    "JSON after thoughts": '<think>{"Aspect A": {"Text 1": 1}}</think>{"Aspect A": [4, 2], "Beta Thing": [5, 1]}',
    "out of five": text_form(WANTED, SMALL, "Rating: {}/5"),
    "out of five, words": text_form(WANTED, SMALL, "Rating: {} out of 5"),
    "decimals": text_form(WANTED, SMALL, "Rating: {}.0"),
    "bold value": text_form(WANTED, SMALL, "Rating: **{}**"),
    "bold label": text_form(WANTED, SMALL, "**Rating:** {}"),
    "bold label, colon outside": text_form(WANTED, SMALL, "**Rating**: {}"),
    "bold line": text_form(WANTED, SMALL, "**Rating: {}**"),
    "bold line, out of five": text_form(WANTED, SMALL, "**Rating: {}/5**"),
    "brackets": text_form(WANTED, SMALL, "Rating: [{}]"),
    "angle brackets": text_form(WANTED, SMALL, "Rating: <{}>"),
    "quotes": text_form(WANTED, SMALL, 'Rating: "{}"'),
    "code": text_form(WANTED, SMALL, "Rating: `{}`"),
    "full stop": text_form(WANTED, SMALL, "Rating: {}."),
    "stars": text_form(WANTED, SMALL, "Rating: {} stars"),
    "level's name": text_form(WANTED, SMALL, "Rating: {} (Good)"),
    "explained": text_form(WANTED, SMALL, "Rating: {} - it sees the cat"),
    "explained with numbers later": text_form(WANTED, SMALL, "Rating: {}, for it sees 3 cats"),
    "bullets": text_form(WANTED, SMALL, "- Rating: {}"),
    "bullets and bold": text_form(WANTED, SMALL, "* **Rating:** {}"),
    "spaces": text_form(WANTED, SMALL, "   Rating :   {}   "),
    "lower case": text_form(WANTED, SMALL, "rating: {}").lower(),
    "upper case": text_form(WANTED, SMALL).upper(),
    "equals": text_form(WANTED, SMALL, "Rating = {}"),
    "dash": text_form(WANTED, SMALL, "Rating - {}"),
    "scale in the label": text_form(WANTED, SMALL, "Rating (1-5): {}"),
    "score": text_form(WANTED, SMALL, "Score: {}"),
    "full width": text_form(WANTED, SMALL, "Rating：{}").translate(str.maketrans("1245", "１２４５")),
    "value on the next line": text_form(WANTED, SMALL, "Rating:\n{}"),
    "label without colon": text_form(WANTED, SMALL, "Rating {}"),
    "same line as the reason": text_form(WANTED, SMALL, "Rating: {} Rationale: seen"),
    "same line, bar": text_form(WANTED, SMALL, "Rating: {} | Rationale: seen"),
    "reason first": text_form(WANTED, SMALL, "Rationale: 3 of 4 things\nRating: {}"),
    "Windows line ends": text_form(WANTED, SMALL, between="\r\n"),
    "blank lines": text_form(WANTED, SMALL, between="\n\n\n"),
    "rules between": text_form(WANTED, SMALL, between="\n---\n"),
    "in a fence": f"```markdown\n{text_form(WANTED, SMALL)}\n```",
    "quoted whole": "\n".join("> " + line for line in text_form(WANTED, SMALL).splitlines()),
    "preamble": "Sure! Here is my assessment of the 2 texts.\n\n" + text_form(WANTED, SMALL),
    "afterword": text_form(WANTED, SMALL) + "\n\n#### Summary\nRating: 3\nText 1 is the better one.",
    "other heading depth": text_form(WANTED, SMALL).replace("##### ", "### ").replace("#### ", "## "),
    "headings in bold": re.sub(r"#+ (.*)", r"**\1**", text_form(WANTED, SMALL)),
    "headings bare": re.sub(r"#+ ", "", text_form(WANTED, SMALL)),
    "headings with colons": re.sub(r"(#+ .*)", r"\1:", text_form(WANTED, SMALL)),
    "headings numbered": text_form(WANTED, SMALL).replace("#### Aspect", "#### 1. Aspect").replace("#### Beta", "#### 2) Beta"),
    "Text n": text_form(WANTED, SMALL).replace("Output for ", ""),
    "Response n": text_form(WANTED, SMALL).replace("Output for Text", "Response"),
    "text with its model": re.sub(r"(Text \d)", r"\1 (a model)", text_form(WANTED, SMALL)),
    "text in angle brackets": re.sub(r"Text (\d)", r"Text <\1>", text_form(WANTED, SMALL)),
    "alias": text_form(WANTED, SMALL).replace("Aspect A", "Alpha"),
    "assessment of": text_form(WANTED, SMALL).replace("Beta Thing Assessment", "Assessment of Beta-Thing"),
    "name alone": text_form(WANTED, SMALL).replace(" Assessment", ""),
    "sections swapped": "#### Beta Thing Assessment\n##### Output for Text 2\nRating: 1\n##### Output for Text 1\nRating: 5\n"
    "#### Aspect A Assessment\n##### Output for Text 2\nRating: 2\n##### Output for Text 1\nRating: 4\n",
    "text by text": "### Text 1\n#### Aspect A\nRating: 4\n#### Beta Thing\nRating: 5\n### Text 2\n#### Aspect A\nRating: 2\n"
    "#### Beta Thing\nRating: 1",
    "text by text, short": "Text 1:\n- Aspect A: 4\n- Beta Thing: 5/5\n\nText 2:\n- **Aspect A:** 2\n- Beta Thing: **1**",
    "aspect by aspect, short": "Aspect A\nText 1: 4\nText 2: 2/5\n\nBeta Thing\nText 1 - 5\nText 2 - 1",
    "repeated alike": text_form(WANTED, SMALL) + "\n\n" + text_form(WANTED, SMALL),
    "a third text that was not there": text_form({"Aspect A": [4, 2, 3], "Beta Thing": [5, 1, 3]}, SMALL),
    "prose that names texts": text_form(WANTED, SMALL).replace("because of 2", "\nText 1: sees more\nText 10 of 10\nRating scales"),
    "JSON": json.dumps({n: {f"Text {i}": {"Rationale": "r", "Rating": v} for i, v in enumerate(r, 1)} for n, r in WANTED.items()}),
    "JSON in a fence": '```json\n{"Aspect A": {"Text 1": {"Rating": 4}, "Text 2": {"Rating": 2}},\n"Beta Thing": {"Text 1": '
    '{"Rating": 5}, "Text 2": {"Rating": 1}}}\n```\nDone.',
    "JSON among words": 'Here [1] it is: {"Aspect A": {"Text 1": 4, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}} {ok}',
    "JSON, texts as values": '{"aspect a": {"text_1": "4", "text_2": "2/5"}, "BETA_THING": {"1": "**5**", "2": "1.0"}}',
    "JSON, lists in order": '{"Aspect A": [4, 2], "Beta Thing": [{"rating": 5}, {"rating": 1}]}',
    "JSON, lists by number": '{"Aspect A": [{"text": 2, "score": 2}, {"text": 1, "score": 4}], "Beta Thing": [{"id": "2", "rating": 1},'
    ' {"id": "1", "rating": 5}]}',
    "JSON, text by text": '{"Text 1": {"Aspect A": 4, "Beta Thing": {"Rating": 5}}, "Text 2": {"Aspect A": 2, "Beta Thing": 1}}',
    "JSON, flat": '[{"aspect": "Aspect A", "text": 1, "rating": 4}, {"aspect": "Aspect A", "text": 2, "rating": 2},'
    '{"aspect": "Beta Thing", "text": 1, "rating": 5}, {"aspect": "Beta Thing", "text": 2, "rating": 1}]',
    "JSON, wrapped": '{"assessment": {"results": {"Aspect A": {"Text 1": 4, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}}}',
    "JSON, with other things": '{"Aspect A": {"Text 1": {"Rating": 4, "confidence": 3, "worse example": {"Rating": 1}}, "Text 2": '
    '{"Rating": 2}, "overall": {"Rating": 3}}, "Beta Thing": {"Text 1": 5, "Text 2": 1}, "Charm": {"Text 1": 3, "Text 2": 3}}',
}  # fmt: skip


@pytest.mark.parametrize("reply", COMPLETE.values(), ids=COMPLETE.keys())
def test_variants_say_the_same(reply):
    result = parse(reply, SMALL, 2)
    assert same(result.ratings, WANTED), result
    assert result.kind == "complete"
    assert not result.missing


def swap(old, new):
    """The asked form with the rating of text 1 for aspect A, `Rating: 4`, replaced."""
    reply = COMPLETE["the asked form"]
    assert old in reply
    return reply.replace(old, new, 1)


# What is not clearly one rating of this aspect and this text is missing; the others stand.
MISSING = {
    **{
        f"value {value!r}": swap("Rating: 4", f"Rating: {value}")
        for value in (
            "10", "0", "6", "-4", "14", "40", "4/10", "8/10", "4%", "1e0", "1,5", "3-4", "3 - 4", "3–4", "3 or 4", "3 to 4",
            "4 and 5", "4, 5", "4 5", "4/5/5", "4th", "about 4", "< 4", ">=4", "[1-5]", "[Rating]", "X", "?", "good", "1.0.0",
            "1\u20600", "4 if one is kind", "Text 1: 4, Text 2: 5", "four or five", "", "4²", "4 (2 errors)",
        )
    },
    "no line": swap("Rating: 4\n", ""),
    "contradiction": swap("Rating: 4\n", "Rating: 4\nRating: 5\n"),
    "text's heading absent": swap("##### Output for Text 1\nRating: 4", "Rating: 4"),
    "text 10": swap("Text 1\nRating: 4", "Text 10\nRating: 4"),
    "quoted rating": swap("Rating: 4\nRationale: r", 'Rationale: the text says\n> Rating: 4\n"Rating: 4"'),
    "rating within the reason": swap("Rating: 4\nRationale: r", "Rationale: I thought of Rating: 4 at first"),
    "JSON null key twice": '{"Aspect A": {"Text 1": 4, "Text 1": 5, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON true": '{"Aspect A": {"Text 1": true, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON 10": '{"Aspect A": {"Text 1": 10, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON huge": '{"Aspect A": {"Text 1": 1e400, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON list": '{"Aspect A": {"Text 1": [4], "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON words": '{"Aspect A": {"Text 1": "between 3 and 4", "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
    "JSON only an example below": '{"Aspect A": {"Text 1": {"why": {"Rating": 4}}, "Text 2": 2}, "Beta Thing": {"Text 1": 5, "Text 2": 1}}',
}  # fmt: skip


@pytest.mark.parametrize("reply", MISSING.values(), ids=MISSING.keys())
def test_unclear_ratings_are_missing_and_the_others_stand(reply):
    result = parse(reply, SMALL, 2)
    assert same(result.ratings, {"Aspect A": [NAN, 2], "Beta Thing": [5, 1]}), result
    assert result.kind == "missing"
    assert result.missing == [("Aspect A", 0)]
    assert "Aspect A of text 1" in result.note
    assert result.retry
    assert result.usable


@pytest.mark.parametrize(
    "word", ["N/A", "n/a", "NA", "**N/A**", "N.A.", "None", "not applicable", "N/A - no image", "-", "cannot be rated"]
)
def test_an_explicit_absence_is_an_answer(word):
    result = parse(swap("Rating: 4", f"Rating: {word}"), SMALL, 2)
    assert same(result.ratings, {"Aspect A": [NAN, 2], "Beta Thing": [5, 1]})
    assert result.kind == "complete"
    assert not result.missing
    assert not result.retry


def test_an_unknown_section_takes_no_ratings_and_gives_none():
    reply = COMPLETE["the asked form"].replace("#### Beta Thing Assessment", "#### Charm Assessment")
    result = parse(reply, SMALL, 2)
    assert same(result.ratings, {"Aspect A": [4, 2], "Beta Thing": [NAN, NAN]})


@pytest.mark.parametrize(
    "heading", ["Output for Texts 1 and 2", "Output for Text 1.5", "Output for Text -1", "Text 1-2"]
)
def test_a_heading_of_something_else_ends_the_section(heading):
    result = parse(swap("Output for Text 1\nRating: 4", f"{heading}\nRating: 4"), SMALL, 2)
    assert same(result.ratings, {"Aspect A": [NAN, NAN], "Beta Thing": [5, 1]})
    assert result.kind == "missing"


def test_texts_numbered_from_zero_are_not_placed():
    for reply in (
        COMPLETE["the asked form"].replace("Text 1", "Text 0").replace("Text 2", "Text 1"),
        '{"Aspect A": [{"text": 0, "rating": 4}, {"text": 1, "rating": 2}]}',
    ):
        result = parse(reply, SMALL, 2)
        assert result.kind == "unparsable"
        assert "from 0" in result.note
        assert not result.usable


def test_rationales_are_kept():
    reply = text_form({name: [4, 3, 2, 1] for name in NAMES}).replace(
        "because of 3", "because of 3\n- and a second line"
    )
    result = parse(reply, VLFEEDBACK, 4)
    assert result.rationales["Helpfulness"] == [
        "because of 1",
        "because of 2",
        "because of 3\nand a second line",
        "because of 4",
    ]
    reply = json.dumps({n: {"Text 1": {"Rationale": "seen \ud800", "Rating": 3}} for n in NAMES})
    assert parse(reply, VLFEEDBACK, 1).rationales["Helpfulness"] == ["seen ?"]


def test_a_single_text_needs_no_heading():
    result = parse("#### Aspect A Assessment\nRating: 3\n#### Beta Thing Assessment\nRating: 4\n", SMALL, 1)
    assert same(result.ratings, {"Aspect A": [3], "Beta Thing": [4]})
    result = parse('{"Aspect A": {"Rating": 3}, "Beta Thing": 4}', SMALL, 1)
    assert same(result.ratings, {"Aspect A": [3], "Beta Thing": [4]})


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, I cannot help with identifying people.",
        "Sorry, no.",
        "I cannot rate these texts.",
        "Unfortunately, I won't judge this.",
        "As an AI, I do not rate people.",
        "**I am unable to view the image.**",
        "抱歉，我无法处理。",
    ],
)
def test_refusals(reply):
    result = parse(reply, VLFEEDBACK, 4)
    assert result.kind == "refusal"
    assert result.note
    assert not result.retry
    assert not result.usable


def test_refusals_that_the_server_names():
    assert parse(None, VLFEEDBACK, 4, refusal="I will not.").kind == "refusal"
    assert parse("", VLFEEDBACK, 4, finish_reason="content_filter").kind == "refusal"
    assert parse(text_form({n: ["N/A"] * 4 for n in NAMES}), VLFEEDBACK, 4).kind == "refusal"
    apology = "I'm sorry that the texts are so long.\n" + text_form({n: [3] * 4 for n in NAMES})
    assert parse(apology, VLFEEDBACK, 4).kind == "complete"


def test_truncated_replies_keep_what_is_certain():
    whole = text_form({n: [4, 3, 2, 1] for n in NAMES})
    cut = (
        whole[: whole.index("Visual Faithfulness")]
        + "Visual Faithfulness Assessment\n##### Output for Text 1\nRating: 1"
    )
    result = parse(cut, VLFEEDBACK, 4, finish_reason="length")
    assert result.kind == "truncated"
    assert not result.retry
    assert result.ratings["Helpfulness"] == [4, 3, 2, 1]
    assert all(math.isnan(rating) for rating in result.ratings["Visual Faithfulness"]), "1 may have been going to be 10"
    # all ratings are there, only a reason is cut
    assert parse(whole, VLFEEDBACK, 4, finish_reason="length").kind == "complete"
    assert parse('{"Helpfulness": {"Text 1": {"Rating": 4', VLFEEDBACK, 4, finish_reason="length").kind == "truncated"


@pytest.mark.parametrize(
    "reply", [None, "", "  \n", "The texts are fine.", "{", "4", "[4, 4, 4, 4]", "Rating: 4", "x" * 2_000_000]
)
def test_unparsable(reply):
    result = parse(reply, VLFEEDBACK, 4)
    assert result.kind == "unparsable"
    assert result.retry
    assert len(result.missing) == 12


@pytest.mark.parametrize(
    "name", ["Tone (politeness)", "5. Tone", "Q1: relevance", "Truth / honesty", "Text 1 quality", "安全"]
)
def test_any_name_of_an_aspect_is_found_in_the_form_that_is_asked_for(name):
    rubric = make({"name": "own", "aspects": [{"name": name}, {"name": "Other"}]}, Rubric)
    wanted = {name: [4, 2], "Other": [5, 1]}
    assert same(parse(text_form(wanted, rubric), rubric, 2).ratings, wanted)
    assert same(parse(json.dumps(wanted), rubric, 2).ratings, wanted)


def test_what_is_left_of_two_names_alike_is_neither():
    rubric = make({"name": "own", "aspects": [{"name": "Tone (formal)"}, {"name": "Tone (warm)"}]}, Rubric)
    assert parse("#### Tone Assessment\n##### Output for Text 1\nRating: 4", rubric, 1).kind == "unparsable"


def test_thoughts_alone_are_no_ratings():
    draft = text_form(WANTED, SMALL)
    assert parse(f"<think>\n{draft}", SMALL, 2, finish_reason="length").kind == "truncated"
    quoted = text_form(WANTED, SMALL).replace("because of 2", 'it says "</think>", which is odd')
    assert same(parse(quoted, SMALL, 2).ratings, WANTED)


def test_another_scale_and_other_aspects_are_a_file():
    rubric = load_rubric("five_attributes")
    ratings = {name: [0, 4] for name in rubric.names}
    assert same(parse(text_form(ratings, rubric, "Rating: {}/4"), rubric, 2).ratings, ratings)
    assert parse(text_form({name: [5, 4] for name in rubric.names}, rubric), rubric, 2).kind == "missing"
    ten = make({"name": "ten", "scale": {"low": 1, "high": 10}, "aspects": [{"name": "All"}]}, Rubric)
    result = parse("All\nText 1: 10\nText 2: 1\nText 3: 1/10\nText 4: 11", ten, 4)
    assert same(result.ratings, {"All": [10, 1, 1, NAN]})


@given(st.text(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_text_is_survived_and_gives_no_rating(reply):
    result = parse(reply, VLFEEDBACK, 4)
    assert not result.usable
    assert result.kind in ("unparsable", "refusal")


PIECES = st.sampled_from(
    [
        "#### ", "##### ", "**", "\n", "\n", "Helpfulness", " Assessment", "Visual Faithfulness", "Ethical Considerations",
        "Output for ", "Text 1", "Text 2", "Text ", "Rating: ", "Rating", ": ", "Rationale: ", "1", "4", "0", "10", "/5", ".", "-",
        "N/A", "{", "}", "[", "]", '"', ", ", "{\"Helpfulness\": ", '"Text 1": ', "null", "```", "> ", "| ", "  ", "５", "\u2028", "and",
    ]
)  # fmt: skip


@given(st.lists(PIECES, max_size=60).map("".join), st.sampled_from([None, "stop", "length", "content_filter"]))
@settings(max_examples=600, deadline=None)
def test_pieces_of_replies_never_raise_and_ratings_stand_in_the_reply(reply, finish):
    result = parse(reply, VLFEEDBACK, 4, finish_reason=finish)
    numbers = {float(n) for n in re.findall(r"\d+(?:\.\d+)?", reply.replace("５", "5"))}
    for row in result.ratings.values():
        assert len(row) == 4
        for rating in row:
            assert math.isnan(rating) or (1 <= rating <= 5 and rating in numbers)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_reply_never_changes_a_rating(data):
    """Lines removed from a true reply leave fewer ratings, never other ones."""
    numbers = st.lists(st.integers(1, 5), min_size=4, max_size=4)
    ratings = {name: data.draw(numbers) for name in NAMES}
    lines = text_form(ratings).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    kept = [line for line in lines if line in headings or data.draw(st.booleans())]
    result = parse("\n".join(kept), VLFEEDBACK, 4)
    for name in NAMES:
        for found, said in zip(result.ratings[name], ratings[name], strict=True):
            assert math.isnan(found) or found == said


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_one_rating_never_raises_and_never_leaves_the_scale(words):
    value = rating_in(words, 1, 5)
    assert math.isnan(value) or value == math.inf or 1 <= value <= 5


@pytest.mark.parametrize("nasty", ["[" * 100_000, "{" * 100_000, '{"a":' * 20_000, "*" * 100_000, ". " * 50_000, "Rating: " * 20_000,
                                   "#" * 100_000, "> " * 50_000, "(" * 100_000, "Text 1 " * 10_000, "1" * 100_000, "\n" * 100_000])  # fmt: skip
def test_hostile_replies_are_quick(nasty):
    import time

    begin = time.perf_counter()
    assert not parse(nasty, VLFEEDBACK, 4).usable
    assert time.perf_counter() - begin < 3
