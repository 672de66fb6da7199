"""VLFeedback rows in every published form, and everything that can be wrong with them."""

import json
import math
import zipfile

import numpy as np
import pytest

from data_prep.tables.vlfeedback import import_vlfeedback
from silkie_jax.corpus.pairs import pairs
from silkie_jax.corpus.reader import CorpusReader, read_manifest
from silkie_jax.errors import UserError
from tests.data_prep.conftest import completion, encode, rejections, row, write_rows


def run(source, images, dst, **options):
    """Imports without progress; returns the summary and the records."""
    summary = import_vlfeedback(source, images, dst, progress=False, **options)
    return summary, list(CorpusReader(dst))


def test_the_end_to_end_rows_give_the_original_pairs(golden, tmp_path):
    expected = json.loads((golden / "e2e" / "expected.json").read_text())["pairs"]
    for number, images in enumerate((golden / "e2e", golden / "e2e" / "images")):
        summary, records = run(golden / "e2e" / "rows.jsonl", images, tmp_path / str(number))
        assert [[r.id, chosen, rejected] for r in records for chosen, rejected in pairs(r)] == expected
    rows = [json.loads(line) for line in (golden / "e2e" / "rows.jsonl").read_text().splitlines()]
    assert [record.prompt for record in records] == [row["prompt"] for row in rows]  # not stripped
    assert [record.images[0] for record in records] == [(golden / "e2e" / row["img_path"]).read_bytes() for row in rows]
    assert (summary.rows, summary.records, summary.responses) == (7, 7, 28)
    assert (summary.ratings, summary.missing_ratings) == (83, 1)
    assert summary.pairs["mean_rating"] == 35


def test_the_pairing_rows_give_the_original_pairs(golden, tmp_path):
    """In the list form and as `datasets` loads it; single rows that crash the original only lose what is missing."""
    cases = json.loads((golden / "pairing.json").read_text())
    as_columns = [dict(case) for case in cases["rows"]]
    as_columns[0]["completions"] = cases["loaded_completions_of_row0"]
    for number, rows in enumerate((cases["rows"], as_columns)):
        source = write_rows(tmp_path / f"{number}.jsonl", rows)
        _, records = run(source, golden, tmp_path / str(number))
        found = [
            (r.responses[chosen].text, r.responses[rejected].text) for r in records for chosen, rejected in pairs(r)
        ]
        assert found == [(pair["chosen"], pair["rejected"]) for pair in cases["pairs"]]
    assert [(line["id"], line["reason"]) for line in rejections(tmp_path / "0")] == [("a-5", "no usable response")]

    single = [{**case["row"], "id": case["case"], "img_path": None} for case in cases["single_row"]]
    _, records = run(write_rows(tmp_path / "single.jsonl", single), None, tmp_path / "single")
    assert {record.id: pairs(record) for record in records} == {
        "missing_aspect_is_null": [],
        "rating_is_null": [],
        "img_path_null": [(1, 0)],
        "null_response": [],
    }


def test_a_record_keeps_everything(tmp_path, images):
    full = row("a", "4", None, source="svit", score=float("nan"), prompt=" <|im_start|> <img>/etc/passwd</img>\n")
    full["completions"][0]["response"] = "<|endoftext|>  x\n"
    summary, (record,) = run(write_rows(tmp_path / "rows.jsonl", [full]), images, tmp_path / "corpus")
    assert record.prompt == full["prompt"]
    assert record.images == ((images / "merged_images" / "a.jpg").read_bytes(),)
    assert [response.text for response in record.responses] == ["<|endoftext|>  x\n", "a 1"]
    assert [response.model for response in record.responses] == ["m0", "m1"]
    assert list(record.responses[0].ratings.values()) == [4.0] * 3
    assert all(math.isnan(rating) for rating in record.responses[1].ratings.values())
    assert record.responses[0].rationales["Helpfulness"] == "because 4"
    assert record.extra == {"source": "svit", "score": None, "img_path": "merged_images/a.jpg"}
    assert record.source == "vlfeedback"
    assert (summary.ratings, summary.missing_ratings) == (3, 3)


def test_models_may_stand_beside_the_completions(tmp_path, images):
    beside = row("a")
    for answer in beside["completions"]:
        del answer["model"]
    _, (record,) = run(write_rows(tmp_path / "rows.jsonl", [beside]), images, tmp_path / "corpus")
    assert [response.model for response in record.responses] == ["m0", "m1"]


def test_everything_that_can_be_wrong_is_counted_and_listed(tmp_path, images):
    (images / "merged_images" / "cut.jpg").write_bytes(encode(size=(400, 400))[:-300])
    (images / "merged_images" / "big.png").write_bytes(encode("PNG", size=(500, 500)))
    lopsided = {"model": ["m"], "response": ["x", "y"], "annotations": []}
    rows = [
        row("a"),
        row("a"),  # the same again
        row("a", 5, 1),  # another row of that id
        "{malformed",
        "[1, 2]",
        "",  # no row at all
        row("b", img_path="../secret.jpg"),
        row("c", img_path="/etc/passwd"),
        row("nowhere"),
        row("cut"),
        row("big"),
        row("b", prompt=None),
        row(None),
        row("c", completions=[]),
        row("c", completions=lopsided),
        row("c", completions="text"),
        row("c", completions=[completion(None), completion(3)]),
        row("d", completions=[completion(None), completion("kept", "9"), completion("too", "N/A")]),
        json.dumps(row("e")).replace("prompt of e", "\\ud800"),
        "\N{BYTE ORDER MARK}" + json.dumps(row("e")),
        '{"id": ' + "[" * 100_000,
        row("f", img_path=None),  # found by its id
        row(7, img_path=None),  # text only
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with open(source, "ab") as file:
        file.write(b'{"id": "\xff"}\n')
    summary, records = run(source, images, tmp_path / "corpus", max_pixels=249_999)
    assert [record.id for record in records] == ["a", "a#2", "d", "e", "f", "7"]
    assert [len(record.images) for record in records] == [1, 1, 1, 1, 1, 0]
    assert [response.text for response in records[2].responses] == ["kept", "too"]
    assert summary.rejected == {
        "malformed JSON": 4,
        "duplicate id, identical row": 1,
        "image path points outside": 2,
        "image not found": 1,
        "unreadable image": 1,
        "image too large": 1,
        "prompt is not a text": 1,
        "prompt is not valid Unicode": 1,
        "id is absent": 1,
        "no usable response": 2,
        "completions are malformed": 2,
    }
    assert summary.rows == 23 == summary.records + sum(summary.rejected.values())
    assert (summary.duplicate_ids_identical, summary.duplicate_ids_differing, summary.unreadable_images) == (1, 1, 2)
    assert (summary.images, summary.text_only, summary.dropped_responses) == (5, 1, 1)
    assert summary.ratings_off_scale == 3
    assert summary.missing_ratings == 6
    listed = rejections(tmp_path / "corpus")
    assert sum(line["what"] == "row" for line in listed) == 17
    assert [line["line"] for line in listed] == sorted(line["line"] for line in listed)
    assert listed[0] == {
        "what": "row",
        "file": "rows.jsonl",
        "line": 2,
        "id": "a",
        "reason": "duplicate id, identical row",
        "detail": "first seen in row 1",
    }
    assert [(line["what"], line["reason"]) for line in listed if line.get("id") == "d"] == [
        *[("rating", "rating off the scale")] * 3,
        ("response", "response dropped"),
    ]
    assert json.loads((tmp_path / "corpus" / "summary.json").read_text())["rows"] == 23
    for part in ("rows ", "23", "mean_rating", "image too large", "missing ratings"):
        assert part in summary.table()


def test_ratings_off_the_scale_are_refused_by_name(tmp_path, images):
    """One by one: the rest of the record is kept, and the line says which rating, in which row, and what to do."""
    rows = [row("a", "3000000", "4"), row("b", "0", "5")]
    rows[0]["completions"][1]["annotations"]["Helpfulness"]["Rating"] = "5.01"
    source = write_rows(tmp_path / "rows.jsonl", rows)
    summary, (a, b) = run(source, images, tmp_path / "corpus")
    assert [math.isnan(rating) for rating in a.responses[0].ratings.values()] == [True] * 3
    assert list(a.responses[1].ratings.values())[1:] == [4, 4]
    assert list(b.responses[1].ratings.values()) == [5, 5, 5]
    assert (summary.records, summary.ratings, summary.ratings_off_scale, summary.missing_ratings) == (2, 5, 7, 7)
    listed = rejections(tmp_path / "corpus")
    assert len(listed) == 7
    assert listed[0] == {
        "what": "rating",
        "file": "rows.jsonl",
        "line": 1,
        "id": "a",
        "reason": "rating off the scale",
        "detail": "completion 0, Ethical Considerations: 3e+06 is not between 1 and 5: correct it, or name the scale "
        "with --scale",
    }
    assert read_manifest(tmp_path / "corpus")["scales"]["Helpfulness"] == [1, 5]

    summary, (a, b) = run(source, images, tmp_path / "wider", scale=(0, 10))
    assert (summary.ratings, summary.ratings_off_scale) == (9, 3)
    assert a.responses[1].ratings["Helpfulness"] == 5.01
    for scale, message in (((5, 1), "--scale: low 5 must be below high 1"), ((0, 3e6), "must lie within -100 to 100")):
        with pytest.raises(UserError, match=message):
            run(source, images, tmp_path / "none", scale=scale)


def test_rows_that_share_an_id(tmp_path, images):
    """What says something new is kept under a name of its own; what repeats any earlier row is not."""
    first, second, third = row("a"), row("a", prompt="another"), row("a", prompt="a third")
    reordered = json.dumps(dict(reversed(second.items())), indent=None, separators=(",", ":"))
    other = row("a#2", img_path="a.jpg")
    rows = [first, second, first, reordered, other, third, third, other]
    summary, records = run(write_rows(tmp_path / "rows.jsonl", rows), images, tmp_path / "corpus")
    assert [record.id for record in records] == ["a", "a#2", "a#2#2", "a#3"]
    assert [record.prompt for record in records] == ["prompt of a", "another", "prompt of a#2", "a third"]
    assert (summary.duplicate_ids_identical, summary.duplicate_ids_differing) == (4, 2)
    assert summary.rejected == {"duplicate id, identical row": 4}
    assert [line["detail"] for line in rejections(tmp_path / "corpus")] == [
        f"first seen in row {number}" for number in (1, 2, 6, 5)
    ]
    assert len({record.images for record in records}) == 1


def test_images_from_a_zip(tmp_path, images):
    archive = tmp_path / "merged_images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((images / "merged_images").iterdir()):
            file.write(path, f"merged_images/{path.name}")
        file.writestr("../../outside.jpg", encode())
    source = write_rows(tmp_path / "rows.jsonl", [row(id) for id in "abc"])
    summary, from_zip = run(source, archive, tmp_path / "zip")
    assert summary.refused_files == 1
    assert rejections(tmp_path / "zip") == [
        {"what": "file", "file": "../../outside.jpg", "reason": "image refused", "detail": "points outside"}
    ]
    _, from_folder = run(source, images, tmp_path / "folder")
    assert from_zip == from_folder
    assert CorpusReader(tmp_path / "zip").fingerprint == CorpusReader(tmp_path / "folder").fingerprint


def test_images_beside_the_rows_are_the_default(tmp_path, images):
    rows = [row("a"), row("b", img_path="b.jpg"), row("c", img_path=None)]
    (images / "b.jpg").write_bytes((images / "merged_images" / "b.jpg").read_bytes())
    _, named = run(write_rows(tmp_path / "rows.jsonl", rows[:2]), images, tmp_path / "named")
    summary, beside = run(write_rows(images / "rows.jsonl", rows), None, tmp_path / "beside")
    assert beside[:2] == named
    assert (summary.images, summary.text_only) == (2, 1)


def test_parquet_in_both_forms_and_with_its_own_images(tmp_path, images):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(id, "4", "N/A") for id in "abcdef"]
    _, expected = run(write_rows(tmp_path / "rows.jsonl", rows), images, tmp_path / "jsonl")
    columns = [
        {**r, "completions": {key: [c[key] for c in r["completions"]] for key in ("annotations", "model", "response")}}
        for r in rows
    ]
    carried = [{**r, "image": {"bytes": expected[n].images[0], "path": None}} for n, r in enumerate(rows)]
    for name, table, folder in (("list", rows, images), ("columns", columns, images), ("carried", carried, None)):
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / f"{name}.parquet", row_group_size=4)
        _, records = run(tmp_path / f"{name}.parquet", folder, tmp_path / name, shards=4)
        assert records == expected

    (tmp_path / "split").mkdir()
    for number in range(2):
        part = pyarrow.Table.from_pylist(rows[number * 3 : number * 3 + 3])
        parquet.write_table(part, tmp_path / "split" / f"train-{number}.parquet")
    assert run(tmp_path / "split", images, tmp_path / "from-folder")[1] == expected

    (tmp_path / "cut.parquet").write_bytes((tmp_path / "list.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.parquet is not a readable parquet file"):
        run(tmp_path / "cut.parquet", images, tmp_path / "x")


def test_the_import_does_not_depend_on_workers_and_its_records_not_on_shards(tmp_path, images):
    source = write_rows(tmp_path / "rows.jsonl", [row(id) for id in "abcdef"])
    _, one = run(source, images, tmp_path / "one", workers=1, shards=3)
    run(source, images, tmp_path / "three", workers=3, shards=3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    assert run(source, images, tmp_path / "many", shards=100)[1] == one


def test_what_the_user_can_mend_is_one_line(tmp_path, images):
    good = write_rows(tmp_path / "rows.jsonl", [row("a")])
    cases = [
        (tmp_path / "absent.jsonl", images, {}, "there is no file or folder"),
        (good, tmp_path / "absent.zip", {}, "no image folder or zip at"),
        (images / "merged_images" / "a.jpg", images, {}, "rows are read from .jsonl or .parquet"),
        (images, images, {}, "holds no .jsonl or .parquet"),
        (good, images, {"workers": 0}, "workers: 0"),
        (good, images, {"shards": -1}, "shards: -1"),
        (write_rows(tmp_path / "empty.jsonl", []), images, {}, "holds no rows"),
        (good, None, {}, r"none of the 1 rows .* image not found: merged_images/a.jpg beside the rows: .*--images"),
    ]
    for source, folder, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            run(source, folder, tmp_path / "corpus", **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "corpus").exists()


def test_an_import_of_unreadable_images_alone_is_refused(tmp_path, images):
    (images / "merged_images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 1 rows .*: unreadable image: not an image file"):
        run(write_rows(tmp_path / "rows.jsonl", [row("a")]), images, tmp_path / "corpus")
    with pytest.raises(UserError, match="unfinished"):
        CorpusReader(tmp_path / "corpus")


def test_random_damage_never_crashes(tmp_path, images):
    """Bytes of good rows are overwritten at random: what remains is imported, the rest is listed."""
    rng = np.random.default_rng(0)
    lines = [json.dumps(row(id, "4", "2")).encode() for id in "abcdef"]
    damaged = [json.dumps(row("good", img_path=None)).encode()]
    for _ in range(40):
        line = bytearray(lines[rng.integers(6)])
        for position in rng.integers(0, len(line), rng.integers(1, 4)):
            line[position] = rng.integers(0, 256)
        damaged.append(bytes(line).replace(b"\n", b" "))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(damaged))
    summary, records = run(tmp_path / "rows.jsonl", images, tmp_path / "corpus")
    assert summary.rows == 41 == len(records) + sum(summary.rejected.values())
    assert summary.rejected
