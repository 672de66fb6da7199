"""Judges' replies as files: every form, and what does not fit."""

from types import SimpleNamespace

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Ask, Exchange, Item, Replies
from silkie_jax.evaluation.running.replies import read_replies, write_replies
from tests.evaluation.scoring import write

ITEMS = [Item(id=name, question="q") for name in ("a", "b", "c")]
ASKED = SimpleNamespace(dialogues=lambda *_: {name: lambda _: Ask("x") for name in ("a", "b")})  # not about c


def read(path, benchmark=ASKED):
    return read_replies(path, benchmark, ITEMS, [], {})


@pytest.mark.parametrize(
    ("raw", "runs"),
    [
        (["1", "2"], [{"a": ("1",), "b": ("2",)}]),
        ([["0", "1"], "2"], [{"a": ("0", "1"), "b": ("2",)}]),
        ({"b": "2", "a": "1", "c": "3"}, [{"a": ("1",), "b": ("2",), "c": ("3",)}]),
        ({"a": ["0", "1"], "b": ["2"], "c": []}, [{"a": ("0", "1"), "b": ("2",)}]),
        ({"a": [["0"], ["1"]], "b": [["2"], ["3"]]}, [{"a": ("0",), "b": ("2",)}, {"a": ("1",), "b": ("3",)}]),
    ],
)
def test_forms(tmp_path, raw, runs):
    assert list(read(write(tmp_path / "r.json", raw)).runs) == runs


def test_a_dialogue_without_a_reply_is_counted(tmp_path):
    replies = read(write(tmp_path / "r.json", {"a": [], "b": "2"}))
    assert list(replies.runs) == [{"b": ("2",)}]
    assert replies.failed == {"no reply": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (["1"], "a list of 1 replies, but 2 are needed"),
        ({"a": "1"}, "no reply to b: 2 requests"),
        ({"a": "1", "b": "2", "d": "3"}, "replies to d, which the data does not have"),
        ({"a": [["1"], ["2"]], "b": "2"}, "no reply of run 1 to b"),
        ({"a": 1, "b": "2"}, "a: expected a text, .* found a number"),
        ({"a": ["1", 2], "b": "2"}, "a: expected a text, .* found a list with something else in it"),
        ("text", "expected replies by key"),
        (None, "expected replies by key"),
    ],
)
def test_what_does_not_fit(tmp_path, raw, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / "r.json", raw))
    assert str(caught.value).startswith(f"{tmp_path}/r.json")
    assert "\n" not in str(caught.value)


EXCHANGES = [
    Exchange("b", 0, ("2\u2028\n", "猫"), ("m", "m")),
    Exchange("a", 1, ("3",), ("m",)),
    Exchange("a", 0, (), (), "refusal"),
    Exchange("b", 1, ("\ud800",), ("n",)),
]


def test_there_and_back(tmp_path):
    path = tmp_path / "replies.jsonl"
    write_replies(path, Replies.of(EXCHANGES))
    found = read(path)
    assert list(found.runs) == [{"b": ("2\u2028\n", "猫")}, {"a": ("3",), "b": ("\ud800",)}]
    assert (found.models, found.failed) == ({"m": 3, "n": 1}, {"refusal": 1})
    first = path.read_bytes()
    write_replies(path, found)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["replies.jsonl"]


def test_one_line_is_a_file_too(tmp_path):
    benchmark = SimpleNamespace(dialogues=lambda *_: {"a": None})
    assert read(write(tmp_path / "r.jsonl", [{"key": "a", "replies": ["1"]}]), benchmark).runs[0] == {"a": ("1",)}
    (tmp_path / "r.json").write_text('{"key": "a", "replies": ["1"]}\r\n')
    assert read(tmp_path / "r.json", benchmark).runs[0] == {"a": ("1",)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": 1, "replies": ["1"]}, "'key' must be a text"),
        ({"key": "b", "replies": "1"}, "'replies' must be a list of texts"),
        ({"key": "b", "run": -1, "replies": ["1"]}, "'run' must be a whole number from 0"),
        ({"key": "b", "run": 10**9, "replies": ["1"]}, "'run' must be a whole number from 0"),
        ({"key": "b", "replies": ["1"], "outcome": 5}, "'outcome' must be a text"),
        ({"key": "a", "replies": ["1"]}, r"replies to a \(run 0\) are there twice"),
    ],
)
def test_lines_that_do_not_fit(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "r.jsonl", [{"key": "a", "replies": ["1"]}, line]))


@pytest.mark.parametrize("content", ["", "{", '{"a": "1", "a": "2"}', '{"a": "1"}\n{"b": "2"}', "\xff"])
def test_files_that_do_not_fit(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"r\.json"):
        read(path)


def test_no_replies_where_none_are_needed(tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    assert read(tmp_path / "r.jsonl", SimpleNamespace(dialogues=lambda *_: {})).runs == [{}]


def test_the_official_form_of_a_benchmark(tmp_path):
    def official(raw, items, answers):
        if "bad" in raw:
            raise UserError("bad: no text")
        return {name: [entry["text"]] for name, entry in raw.items()}

    benchmark = SimpleNamespace(dialogues=ASKED.dialogues, official_replies=official)
    path = write(tmp_path / "r.json", {"a": {"text": "1"}, "b": {"text": "2"}})
    assert read(path, benchmark).runs[0] == {"a": ("1",), "b": ("2",)}
    assert read(write(tmp_path / "plain.json", ["1", "2"]), benchmark).runs[0] == {"a": ("1",), "b": ("2",)}
    with pytest.raises(UserError, match=r"bad.json: bad: no text"):
        read(write(tmp_path / "bad.json", {"bad": {}}), benchmark)
