"""Pairs for other trainers: trl's and LLaMA-Factory's forms, with their images."""

import json

import pytest

from data_prep.corpora.build import build
from data_prep.corpora.export import export_pairs
from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.corpus.pairs import pairs
from silkie_jax.errors import UserError
from tests.data_prep.corpora.test_report import corpus_of
from tests.data_prep.rated import fill
from tests.data_prep.runs import picture


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    build(fill(folder / "run", 6), folder / "corpus", progress=False, workers=1)
    return folder / "corpus"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wanted(corpus, rule="mean_rating"):
    return [
        (record.prompt, record.responses[chosen].text, record.responses[rejected].text, record.images)
        for record in CorpusReader(corpus)
        for chosen, rejected in pairs(record, rule)
    ]


def test_trl(corpus, tmp_path):
    assert export_pairs(corpus, tmp_path / "out") == len(wanted(corpus)) == 36
    rows = read(tmp_path / "out" / "pairs.jsonl")
    found = []
    for row in rows:
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        answers = [row[key][0]["content"][0]["text"] for key in ("chosen", "rejected")]
        images = tuple((tmp_path / "out" / path).read_bytes() for path in row["images"])
        found.append((message["content"][1]["text"], *answers, images))
    assert found == wanted(corpus)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 3  # each once
    assert len({row["id"] for row in rows}) == 36


def test_llama_factory(corpus, tmp_path):
    export_pairs(corpus, tmp_path / "out", form="llama-factory", rule="{name: aspect, aspect: Helpfulness}")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["silkie"]
    rows = read(tmp_path / "out" / info["file_name"])
    columns = info["columns"]
    assert info["ranking"] is True
    found = [
        (
            row[columns["messages"]][0]["value"].removeprefix("<image>"),
            row[columns["chosen"]]["value"],
            row[columns["rejected"]]["value"],
            tuple((tmp_path / "out" / path).read_bytes() for path in row[columns["images"]]),
        )
        for row in rows
    ]
    assert found == wanted(corpus)
    assert all(row["conversations"][0]["value"].count("<image>") == len(row["images"]) for row in rows)


@pytest.mark.parametrize("form", ["trl", "llama-factory"])
def test_parquet_holds_what_json_lines_do(corpus, tmp_path, form):
    import pyarrow.parquet

    export_pairs(corpus, tmp_path / "json", form=form)
    export_pairs(corpus, tmp_path / "parquet", form=form, file_format="parquet")
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "pairs.parquet").to_pylist()
    for row, same in zip(table, read(tmp_path / "json" / "pairs.jsonl"), strict=True):
        assert row["id"] == same["id"]
        assert row["chosen"] == same["chosen"]
        if form == "trl":
            assert [image["bytes"] for image in row["images"]] == [
                (tmp_path / "json" / path).read_bytes() for path in same["images"]
            ]
        else:
            assert row["images"] == same["images"]


def test_histories_text_only_and_marks_in_texts(tmp_path):
    answers = (Response("a <image> b", ratings={"A": 5}), Response("c", ratings={"A": 1}))
    records = [
        Record("r0", (picture(0), picture(1)), "and <image>?", answers, history=(("first", "yes"),)),
        Record("r1", (), "text only", answers),
    ]
    corpus_of(tmp_path / "corpus", records)
    export_pairs(tmp_path / "corpus", tmp_path / "lf", form="llama-factory")
    first, second = read(tmp_path / "lf" / "pairs.jsonl")
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt", "human"]
    assert json.dumps(first["conversations"] + [first["chosen"]]).count("<image>") == 2 == len(first["images"])
    assert second["images"] == []
    export_pairs(tmp_path / "corpus", tmp_path / "trl")
    first, second = read(tmp_path / "trl" / "pairs.jsonl")
    assert [len(m["content"]) for m in first["prompt"]] == [3, 1, 1]
    assert first["chosen"][0]["content"][0]["text"] == "a <image> b"
    assert [part["type"] for part in second["prompt"][0]["content"]] == ["text"]


def test_mistakes_are_one_line_and_leave_nothing(corpus, tmp_path):
    for rule, message in (("best", "no rule 'best'"), ("{name: aspect, aspect: X}", "no aspect 'X'"), ("{", "YAML"),
                          ("given", "makes no pair")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            export_pairs(corpus, tmp_path / "out", rule=rule)
        assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        export_pairs(corpus, tmp_path / "full")


def test_pairs_go_out_and_come_in_again(corpus, tmp_path):
    """What is exported in trl's form is what `silkie corpus import --pairs` takes."""
    from data_prep.tables.given_pairs import import_pairs

    export_pairs(corpus, tmp_path / "out")
    import_pairs(tmp_path / "out" / "pairs.jsonl", tmp_path / "out", tmp_path / "back", progress=False)
    back = [(r.prompt, r.responses[0].text, r.responses[1].text, r.images) for r in CorpusReader(tmp_path / "back")]
    assert back == wanted(corpus)


@pytest.mark.parametrize("form", ["trl", "llama-factory"])
def test_pairs_are_exported_with_the_images_that_their_responses_show(tmp_path, form):
    """And those that show different ones have no place in these forms."""
    pictures = (picture(1), picture(2))

    def record(number, *views):
        responses = tuple(Response(text, images=view) for text, view in zip("ab", views, strict=True))
        return Record(f"r{number}", pictures, "p", responses, pairs=((0, 1),))

    views = [record(1, (1,), (1,)), record(2, (0,), (1,)), record(3, (1, 0), (1, 0)), record(4, (), ())]
    said = []
    count = export_pairs(
        corpus_of(tmp_path / "views", views).path, tmp_path / "out", form=form, rule="given", say=said.append
    )
    rows = read(tmp_path / "out" / "pairs.jsonl")
    assert (count, [row["id"] for row in rows]) == (3, ["r1/0", "r3/0", "r4/0"])
    found = [[(tmp_path / "out" / path).read_bytes() for path in row["images"]] for row in rows]
    assert found == [[pictures[1]], [pictures[1], pictures[0]], []]
    assert said == [f"1 pairs left out: chosen and rejected show different images, which form {form} cannot say"]
    with pytest.raises(UserError, match="show different images in all pairs"):
        export_pairs(corpus_of(tmp_path / "apart", views[1:2]).path, tmp_path / "none", form=form, rule="given")
    assert not (tmp_path / "none").exists()
