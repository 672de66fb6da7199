"""Preference pairs in the plain and the conversational form."""

import pytest

from data_prep.tables.given_pairs import import_pairs
from silkie_jax.corpus.pairs import pairs
from silkie_jax.corpus.reader import CorpusReader, read_manifest
from silkie_jax.corpus.schema import Response
from silkie_jax.corpus.shards import FORMAT, FORMAT_VIEWS
from silkie_jax.errors import UserError
from tests.data_prep.conftest import rejections, write_rows


def run(tmp_path, rows, images=None, name="corpus", **options):
    source = write_rows(tmp_path / f"{name}.jsonl", rows)
    summary = import_pairs(source, images, tmp_path / name, progress=False, **options)
    return summary, list(CorpusReader(tmp_path / name))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_plain_rows(tmp_path, images):
    rows = [
        {"image": "a.jpg", "prompt": "p", "chosen": "good", "rejected": "bad", "idx": 3},
        {
            "image": ["merged_images/a.jpg", "b.jpg"],
            "prompt": "p",
            "chosen": "good",
            "rejected": "<|im_end|>",
            "id": "x",
        },
        {"prompt": "p", "chosen": "", "rejected": "bad", "history": [["hello", "hi"], ["and", "so"]], "id": "x"},
        {"images": ["c.jpg"], "prompt": "<img>/etc/passwd</img>", "chosen": "1", "rejected": "2", "id": 5},
        {"image": None, "prompt": "p", "chosen": "1", "rejected": "2", "id": "x"},
    ]
    summary, records = run(tmp_path, rows, images)
    assert [record.id for record in records] == ["row-1", "x", "x#2", "5", "x#3"]
    assert records[0].responses == (Response("good"), Response("bad"))
    assert records[0].extra == {"idx": 3}
    files = [(images / "merged_images" / f"{name}.jpg").read_bytes() for name in "abc"]
    assert [record.images for record in records] == [(files[0],), (files[0], files[1]), (), (files[2],), ()]
    assert records[2].history == (("hello", "hi"), ("and", "so"))
    assert records[3].prompt == "<img>/etc/passwd</img>"
    assert [pairs(record, "given") for record in records] == [[(0, 1)]] * 5
    assert [pairs(record, "mean_rating") for record in records] == [[]] * 5
    assert (summary.records, summary.images, summary.text_only, summary.ratings) == (5, 4, 2, 0)
    assert (summary.duplicate_ids_identical, summary.duplicate_ids_differing) == (0, 2)
    assert summary.pairs["given"] == 5
    assert CorpusReader(tmp_path / "corpus").aspects == ()


def test_conversations(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "look "}, {"type": "text", "text": "here"}]
    turns = [user("q1"), assistant("a1"), user("q2")]
    system = {"role": "system", "content": "You are a helpful assistant."}
    rows = [
        {
            "prompt": [user(parts)],
            "chosen": [assistant("good")],
            "rejected": [assistant([{"type": "text", "text": "bad"}])],
        },
        {"prompt": [system, *turns], "chosen": [assistant("good")], "rejected": "bad"},
        {"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]},
    ]
    _, records = run(tmp_path, rows)
    assert [record.prompt for record in records] == ["look here", "q2", "q2"]
    assert [record.history for record in records] == [(), (("q1", "a1"),), (("q1", "a1"),)]
    assert all(record.responses == (Response("good"), Response("bad")) for record in records)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("prompt is not a text", {"prompt": None}),
        ("chosen is not a text", {"chosen": 3}),
        ("rejected is not a text", {"rejected": None}),
        ("chosen and rejected are the same", {"rejected": "good"}),
        ("history is malformed", {"history": [["only the user"]]}),
        ("history is malformed", {"history": "text"}),
        ("history is not a text", {"history": [["user", None]]}),
        ("image not found", {"image": "nothing.jpg"}),
        ("image is neither a path nor a file", {"image": 3}),
        ("messages are malformed", {"prompt": []}),
        ("messages are malformed", {"prompt": [assistant("first")]}),
        ("messages are malformed", {"prompt": [user("a"), user("b")]}),
        ("messages are malformed", {"prompt": ["text"]}),
        ("messages are malformed", {"chosen": [user("I am no assistant")]}),
        ("messages are malformed", {"chosen": []}),
        ("content is not a text", {"prompt": [user(None)]}),
        ("system message", {"prompt": [{"role": "system", "content": "Be rude."}, user("q")]}),
        ("no common prompt", {"prompt": None, "chosen": [user("a"), assistant("x")], "rejected": [assistant("y")]}),
    ],
)
def test_what_cannot_be_used_is_listed(tmp_path, reason, changes):
    good = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    summary, records = run(tmp_path, [{**good, **changes}, good])
    assert [record.id for record in records] == ["row-2"]
    assert summary.rejected == {reason: 1}
    assert [(line["line"], line["reason"]) for line in rejections(tmp_path / "corpus")] == [(1, reason)]


def test_names_do_not_collide(tmp_path):
    """An id that looks like one of ours keeps every record apart."""
    good = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    rows = [{**good, "id": "x#2"}, {**good, "id": "x"}, {**good, "id": "x"}, {**good, "id": "row-5"}, good, good]
    _, records = run(tmp_path, rows)
    assert [record.id for record in records] == ["x#2", "x", "x#3", "row-5", "row-5#2", "row-6"]


def test_parquet_with_lists_and_images(tmp_path, images):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = (images / "merged_images" / "a.jpg").read_bytes()
    rows = [
        {
            "images": [{"bytes": data, "path": "a.jpg"}],
            "history": [["u", "a"]],
            "prompt": "p",
            "chosen": "1",
            "rejected": "2",
        },
        {"images": [], "history": None, "prompt": "p", "chosen": "1", "rejected": "2"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    import_pairs(tmp_path / "rows.parquet", None, tmp_path / "corpus", progress=False)
    first, second = CorpusReader(tmp_path / "corpus")
    assert (first.images, first.history) == ((data,), (("u", "a"),))
    assert (second.images, second.history) == ((), ())


def test_image_pairs(tmp_path, images):
    """Two images are one for each response; the same text may stand under both."""
    (images / "merged_images" / "again.jpg").write_bytes((images / "merged_images" / "a.jpg").read_bytes())
    rows = [
        {"images": ["a.jpg", "b.jpg"], "prompt": "p", "chosen": "a cat"},
        {"images": ["b.jpg", "a.jpg"], "prompt": "p", "chosen": "a cat", "rejected": "a cat"},
        {"images": ["a.jpg", "b.jpg"], "prompt": "p", "chosen": "a cat", "rejected": "a dog"},
        {"image": "a.jpg", "prompt": "p", "chosen": "a cat", "rejected": "a dog"},
        {"prompt": "p", "chosen": "a cat", "rejected": "a dog"},
        {"images": ["a.jpg", "a.jpg"], "prompt": "p", "chosen": "a cat"},
        {"images": ["a.jpg", "again.jpg"], "prompt": "p", "chosen": "a cat"},
        {"images": ["a.jpg", "again.jpg"], "prompt": "p", "chosen": "a cat", "rejected": "a dog"},
        {"images": ["a.jpg", "b.jpg", "c.jpg"], "prompt": "p", "chosen": "a cat"},
        {"image": "a.jpg", "prompt": "p", "chosen": "a cat"},
    ]
    summary, records = run(tmp_path, rows, images, image_pairs=True)
    views = [[response.images for response in record.responses] for record in records]
    pair = [(0,), (1,)]
    assert views == [pair, pair, pair, [(0,), (0,)], [(), ()], pair]
    assert [[response.text for response in record.responses] for record in records] == [
        *[["a cat", "a cat"]] * 2,
        *[["a cat", "a dog"]] * 4,
    ]
    files = [(images / "merged_images" / f"{name}.jpg").read_bytes() for name in "ab"]
    assert [record.images for record in records[:2]] == [tuple(files), tuple(files[::-1])]
    assert all(pairs(record, "given") == [(0, 1)] for record in records)
    assert summary.rejected == {"chosen and rejected are the same": 2, "no image pair": 1, "rejected is not a text": 1}
    assert summary.pairs["given"] == 6
    # The same rows without the option show both images to both: another corpus, which does not go on with this one.
    with pytest.raises(UserError, match="made from other input"):
        run(tmp_path, rows, images)
    _, records = run(tmp_path, rows[2:3], images, "plain")
    assert [response.images for response in records[0].responses] == [None, None]


def test_a_corpus_of_image_pairs_opens_with_tfds(tmp_path, images):
    import tensorflow_datasets as tfds

    rows = [
        {"images": ["a.jpg", "b.jpg"], "prompt": "p", "chosen": "a cat"},
        {"image": "a.jpg", "prompt": "p", "chosen": "a cat", "rejected": "a dog"},
    ]
    run(tmp_path, rows, images, image_pairs=True)
    source = tfds.builder_from_directory(tmp_path / "corpus").as_data_source("train")
    assert [list(record["responses"]["images"]) for record in source] == [[b"[0]", b"[1]"], [b"[0]", b"[0]"]]
    assert read_manifest(tmp_path / "corpus")["format"] == FORMAT_VIEWS
    run(tmp_path, [row | {"rejected": "x"} for row in rows], images, "plain")
    assert read_manifest(tmp_path / "plain")["format"] == FORMAT
    (record, _) = tfds.builder_from_directory(tmp_path / "plain").as_data_source("train")
    assert "images" not in record["responses"]
