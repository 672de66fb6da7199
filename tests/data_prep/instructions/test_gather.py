"""Instructions: every published form, images alone, what repeats, what is drawn, and what is refused."""

# ruff: noqa: E501 (rows are given whole)

import base64
import csv
import io
import json
import random
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep.instructions.config import InstructionsConfig, from_arguments, load_instructions_config
from data_prep.instructions.files import _json_rows
from data_prep.instructions.forms import read_row
from data_prep.instructions.gather import gather_instructions
from data_prep.run import Run
from data_prep.tables.rejections import Rejected
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make
from tests.data_prep.conftest import encode, lock


def noise(seed, size=(64, 48)):
    """An image that looks like no other."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return blocks.resize(size, Image.Resampling.BICUBIC)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Images 0.jpg to 9.jpg."""
    images = tmp_path / "images"
    images.mkdir()
    for n in range(10):
        (images / f"{n}.jpg").write_bytes(jpeg(noise(n)))
    return images


def gather(tmp_path, sources, run="run", **changes):
    config = make({"sources": sources, **changes}, InstructionsConfig)
    report = gather_instructions(config, tmp_path / run, progress=False, workers=2)
    with Run.open(tmp_path / run) as opened:
        return report, list(opened.instructions())


def rejected(tmp_path, run="run"):
    lines = (tmp_path / run / "instructions_rejected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PNG64 = base64.b64encode(encode("PNG")).decode()
FORMS = {
    "LLaVA": (
        {"id": "1", "image": "0.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A."},
            {"from": "human", "value": "And why?"}, {"from": "gpt", "value": "B."}]},
        "What is this?", "1"),
    "LLaVA-Med": (
        {"id": "1", "image": "0.jpg", "domain": {"mri": True}, "conversatons": [
            {"from": "human", "value": "What is seen?\n<image>"}, {"from": "gpt", "value": "A."}]},
        "What is seen?", "1"),
    "SVIT": (
        {"image_id": 0, "conversations": [{"content": [
            {"from": "user", "value": "How many?"}, {"from": "gpt", "value": "Two."}]}]},
        "How many?", "0"),
    "LRV": ({"image_id": "0", "question": "Is it red?", "answer": "No.", "task": "attr"}, "Is it red?", "0"),
    "M3IT": (
        {"instruction": "Answer the question.", "inputs": "What colour?", "image_base64_str": [PNG64], "outputs": "x"},
        "Answer the question.\nWhat colour?", ""),
    "PMC-VQA": (
        {"Figure_path": "0.jpg", "Question": "Which organ?", "Answer": "Liver", "Choice A": " A:Liver", "Choice B": "B: Heart ",
         "Choice C": "C:", "Answer_label": "A"},
        "Which organ?\nA. Liver\nB. Heart", ""),
    "PCA-EVAL": (
        {"domain": "traffic", "question": "What to do?", "actions": ["A. Brake", "Go on"], "answer_index": 0,
         "image_path": "0.jpg"},
        "What to do?\nA. Brake\nB. Go on", ""),
    "ComVint": ({"id": 7, "image": "0.jpg", "instruction": "Say why.", "answer": "x"}, "Say why.", "7"),
    "VLFeedback": ({"id": "q", "prompt": "Describe.", "img_path": "a/0.jpg", "completions": []}, "Describe.", "q"),
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": "Look."}]}], "images": ["0.jpg"]},
        "Look.", ""),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "id"), FORMS.values(), ids=FORMS.keys())
def test_published_forms(tmp_path, folder, row, prompt, id):
    (asked,) = read_row(row)
    assert (asked.prompt, asked.id, asked.history) == (prompt, id, [])
    assert not {"answer", "outputs", "completions", "conversations"} & asked.extra.keys()
    path = write(tmp_path / "rows.jsonl", [row])
    _, (instruction,) = gather(tmp_path, {"s": {"path": path, "images": str(folder), "licence": "L"}})
    assert instruction.prompt == prompt
    assert len(instruction.images) == 1
    assert (instruction.source, instruction.licence) == ("s", "L")


def test_the_right_answer_is_kept_for_judges():
    wanted = {
        "LLaVA": "A.",
        "LLaVA-Med": "A.",
        "SVIT": "Two.",
        "LRV": "No.",
        "M3IT": "x",
        "PMC-VQA": "Liver",
        "ComVint": "x",
    }
    assert {form: asked.extra.get("reference") for form in FORMS for asked in read_row(FORMS[form][0])} == (
        dict.fromkeys(FORMS) | wanted
    )
    assert [asked.extra.get("reference") for asked in read_row(FORMS["LLaVA"][0], "each")] == ["A.", "B."]
    (own,) = read_row({"prompt": "p", "answer": "x", "reference": "mine"})
    assert own.extra == {"reference": "mine"}


def test_turns_of_a_conversation():
    row = FORMS["LLaVA"][0]
    (last,) = read_row(row, "last")
    assert (last.prompt, last.history) == ("And why?", [("What is this?", "A.")])
    each = read_row(row, "each")
    assert [(asked.id, asked.prompt, len(asked.history)) for asked in each] == [
        ("1-1", "What is this?", 0),
        ("1-2", "And why?", 1),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": ""},
        {"prompt": 3},
        {"conversations": []},
        {"conversations": "x" * 3, "prompt": None},
        {"conversations": [{"from": "gpt", "value": "first"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "<image>"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [{"content": [3]}]},
        {"prompt": "p", "image_base64_str": "no base64!"},
        {"prompt": "p", "image": 3},
        {"prompt": "\ud800"},
    ],
)
def test_odd_rows_are_rejected(row):
    with pytest.raises(Rejected):
        read_row(row)


def test_json_arrays_csv_and_parquet(tmp_path, folder):
    rows = [{"id": n, "image": f"{n}.jpg", "question": f"q{n}"} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    with open(tmp_path / "b.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    table = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "c.parquet")
    found = []
    for name in ("a.json", "b.csv", "c.parquet"):
        _, instructions = gather(
            tmp_path, {"s": {"path": str(tmp_path / name), "images": str(folder)}}, run=name + ".run"
        )
        found.append([(i.id, i.prompt, i.images) for i in instructions])
    assert found[0] == found[1] == found[2]
    assert [id for id, _, _ in found[0]] == [f"s-{n}" for n in range(5)]


def test_json_arrays_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.instructions.files._CHUNK", 7)
    rows = [{"a": "é" * n, "b": [n, {"c": "],["}]} for n in range(30)] + [12345678901, None]
    (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert list(_json_rows(tmp_path / "a.json")) == rows
    for text in ('{"a": 1}', "[1, 2", '[{"a": }]', ""):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=r"b\.json"):
            list(_json_rows(tmp_path / "b.json"))


def test_rows_look_at_nothing_beside_them_but_their_images(tmp_path, folder, monkeypatch):
    (tmp_path / "secret").mkdir()
    (tmp_path / "leaves.png").symlink_to("/etc/passwd")
    lock(monkeypatch, "secret")
    path = write(tmp_path / "rows.jsonl", [{"image": "images/1.jpg", "prompt": "p"}, {"prompt": "text alone"}])
    report, instructions = gather(tmp_path, {"s": {"path": path}})
    assert [len(instruction.images) for instruction in instructions] == [1, 0]
    assert report.sources["s"]["accepted"] == 2
    assert rejected(tmp_path) == []


def test_images_alone_from_a_folder_a_zip_and_a_tar(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive, tarfile.open(tmp_path / "images.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
            tar.add(file, file.name)
    (folder / "readme.txt").write_text("not an image")
    prompts = ["What is this?", "Why?"]
    found = []
    for path in (folder, tmp_path / "images.zip", tmp_path / "images.tar"):
        _, instructions = gather(tmp_path, {"s": {"path": str(path), "prompts": prompts}}, run=f"run{len(found)}")
        found.append([(i.id, i.prompt, i.images) for i in instructions])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 10
    assert {prompt for _, prompt, _ in found[0]} == set(prompts)


def test_duplicates_exact_and_near(tmp_path, folder):
    image = noise(3, (640, 480))
    (folder / "small.jpg").write_bytes(jpeg(image.resize((320, 240))))
    (folder / "worse.jpg").write_bytes(jpeg(image.filter(ImageFilter.GaussianBlur(1))))
    (folder / "big.png").write_bytes(encode("PNG"))
    image.save(folder / "big.png")
    (folder / "copy.png").write_bytes((folder / "big.png").read_bytes())
    rows = [
        {"image": "big.png", "prompt": "What is this?"},
        {"image": "copy.png", "prompt": "What is this?"},  # the same
        {"image": "copy.png", "prompt": "  what IS this ?! "},  # reads alike
        {"image": "small.jpg", "prompt": "What is this?"},  # looks alike
        {"image": "worse.jpg", "prompt": "What is this?"},
        {"image": "worse.jpg", "prompt": "What is that?"},  # another question
        {"image": "5.jpg", "prompt": "What is this?"},  # another image
    ]
    source = {"s": {"path": write(tmp_path / "rows.jsonl", rows), "images": str(folder)}}
    report, instructions = gather(tmp_path, source)
    assert [i.id for i in instructions] == ["s-1", "s-6", "s-7"]
    assert report.sources["s"] == {
        "rows": 7, "accepted": 3, "duplicate": 2, "near duplicate": 2, "images like another": 2,
    }  # fmt: skip
    assert [(line["reason"], line["detail"]) for line in rejected(tmp_path)] == [
        ("duplicate", "of s-1"), ("duplicate", "of s-1"), ("near duplicate", "of s-1"), ("near duplicate", "of s-1"),
    ]  # fmt: skip
    report, instructions = gather(tmp_path, source, run="kept", duplicates="keep")
    assert len(instructions) == 7
    assert report.sources["s"]["near duplicate"] == 2
    assert len(rejected(tmp_path, "kept")) == 4


def test_plain_images_of_different_colours_are_not_duplicates(tmp_path, folder):
    for n in range(6):
        (folder / f"plain{n}.png").write_bytes(encode("PNG", colour=(n * 40, 0, 0)))
    rows = [{"image": f"plain{n}.png", "prompt": "p"} for n in range(6)]
    report, _ = gather(tmp_path, {"s": {"path": write(tmp_path / "rows.jsonl", rows), "images": str(folder)}})
    assert report.instructions == 6


def test_quotas_and_samples_are_seeded(tmp_path, folder):
    rows = [{"id": n, "image": f"{n}.jpg", "prompt": f"p{k}"} for n in range(10) for k in range(3)]
    rows[4]["image"] = "gone.jpg"
    sources = {
        "a": {"path": write(tmp_path / "a.jsonl", rows), "images": str(folder), "quota": 7},
        "b": {"path": write(tmp_path / "b.jsonl", [{**row, "prompt": row["prompt"] + "!b"} for row in rows]),
              "images": str(folder)},
    }  # fmt: skip
    report, first = gather(tmp_path, sources, run="1")
    assert report.sources["a"]["accepted"] == 7
    assert report.sources["b"]["accepted"] == 29
    _, again = gather(tmp_path, sources, run="2")
    assert again == first
    _, other = gather(tmp_path, sources, run="3", seed=1)
    assert [i.id for i in other] != [i.id for i in first]
    report, sample = gather(tmp_path, sources, run="4", sample=10)
    assert report.instructions == len(sample) == 10
    assert [i.id for i in first if i.id in {s.id for s in sample}] == [i.id for i in sample]
    ids = [i.id for i in first]
    assert len(set(ids)) == len(ids)


def test_images_are_checked_turned_upright_and_stored_once(tmp_path, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(jpeg(noise(50, (64, 32)), exif=exif))
    (folder / "broken.jpg").write_bytes(jpeg(noise(51))[:200])
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    (folder / "large.jpg").write_bytes(jpeg(noise(52)) + b"\0" * 20_000)
    rows = [{"image": f"{name}", "prompt": f"about {n}"} for n, name in enumerate(
        ["turned.jpg", "broken.jpg", "bomb.png", "large.jpg", "../images/0.jpg", "/etc/passwd", "0.jpg", "0.jpg"])]  # fmt: skip
    report, instructions = gather(
        tmp_path, {"s": {"path": write(tmp_path / "rows.jsonl", rows), "images": str(folder)}}, max_image_bytes=20_000
    )
    assert [i.id for i in instructions] == ["s-1", "s-7", "s-8"]
    assert instructions[1].images == instructions[2].images
    with Run.open(tmp_path / "run") as run:
        with Image.open(io.BytesIO(run.image(instructions[0].images[0]))) as image:
            assert image.size == (32, 64)
            assert 0x0112 not in image.getexif()
        assert run.db.execute("SELECT count(*) FROM images").fetchone()[0] == 2
    assert report.sources["s"]["image too large"] == 2
    assert report.sources["s"]["image path points outside"] == 2
    assert report.sources["s"]["unreadable image"] == 1


def test_hostile_tars_and_links(tmp_path, folder):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / "0.jpg", "ok.jpg")
        for name, kind in (
            ("../up.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(b""))
    rows = [{"image": name, "prompt": name} for name in ("ok.jpg", "../up.jpg", "link.jpg", "hard.jpg")]
    source = {"s": {"path": write(tmp_path / "rows.jsonl", rows), "images": str(tmp_path / "images.tar")}}
    _, instructions = gather(tmp_path, source)
    assert [i.prompt for i in instructions] == ["ok.jpg"]
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(folder / "0.jpg", "ok.jpg")
    source["s"]["images"] = str(tmp_path / "images.tar.gz")
    with pytest.raises(UserError, match="unpack it first"):
        gather(tmp_path, source, run="other")


def test_what_was_left_out_is_named_as_its_owner_knows_it(tmp_path, folder):
    (folder / "damaged.png").write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as images:
        images.write(folder / "0.jpg", "sub/0.jpg")
        images.writestr("sub/damaged.png", b"no image")
        images.writestr("../up.jpg", b"")
    gather(tmp_path, {"s": {"path": str(tmp_path / "images.zip")}}, run="zip")
    refused, damaged = rejected(tmp_path, "zip")
    assert (refused["what"], refused["file"], refused["reason"]) == ("file", "../up.jpg", "image refused")
    assert (damaged["what"], damaged["file"], damaged["id"]) == ("row", "sub/damaged.png", "s-sub/damaged")

    rows = [{"id": 7, "image": "damaged.png", "prompt": "p"}, {"id": "x", "prompt": ""}, {"prompt": "ok"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    gather(tmp_path, {"s": {"path": str(tmp_path / "rows.json"), "images": str(folder)}}, run="json")
    damaged, empty = rejected(tmp_path, "json")
    assert (damaged["file"], damaged["line"], damaged["id"]) == ("rows.json", 1, "s-7")
    assert (empty["file"], empty["line"], empty["id"]) == ("rows.json", 2, "s-x")


def test_the_same_again_does_nothing_and_another_is_refused_once_asked(tmp_path, folder):
    source = {"s": {"path": str(folder)}}
    report, instructions = gather(tmp_path, source)
    stamp = (tmp_path / "run" / "instructions.json").stat().st_mtime_ns
    assert gather(tmp_path, source) == (report, instructions)
    assert (tmp_path / "run" / "instructions.json").stat().st_mtime_ns == stamp
    assert gather(tmp_path, source, sample=3)[0].instructions == 3  # nothing was asked yet
    with Run.create(tmp_path / "run") as run:
        run.db.execute(
            "INSERT INTO requests (stage, instruction, agent, slot, body, text_bytes, image_tokens) "
            "VALUES ('respond', 1, 'm', 0, '{}', 0, 0)"
        )
    with pytest.raises(UserError, match="make a new run"):
        gather(tmp_path, source, sample=4)
    assert not (tmp_path / "run" / "instructions.tmp").exists()


def test_configuration_from_yaml_and_from_a_command_line(tmp_path, folder):
    rows = write(tmp_path / "rows.jsonl", [{"image": "0.jpg", "prompt": "p"}])
    (tmp_path / "sources.yaml").write_text("sources: {mine: {path: rows.jsonl, images: images, quota: 3}}\nseed: 5\n")
    config = load_instructions_config(tmp_path / "sources.yaml")
    assert config.sources["mine"].path == rows
    assert from_arguments([str(tmp_path / "sources.yaml")], sample=2).sample == 2
    config = from_arguments([rows, str(folder)], images=str(folder), quota=4, keep_duplicates=True)
    assert list(config.sources) == ["rows", "images"]
    assert config.duplicates == "keep"
    bad = {
        "sources: {mine: {path: rows.jsonl, quote: 3}}": "unknown key sources.mine.quote; did you mean sources.mine.quota",
        "sources: {}": "sources is empty",
        "sources: {a: {path: gone.jsonl}}": "there is no",
        "sources: {a: {path: rows.jsonl, turns: some}}": "turns: 'some' is none of first, last, each",
        "sources: {a: {path: rows.jsonl, quota: 0}}": "quota must be at least 1",
        "sources: {a: {path: rows.jsonl, quota: many}}": "quota",
        "duplicates: maybe\nsources: {a: {path: rows.jsonl}}": "duplicates: 'maybe'",
        "[1, 2]": "expected keys and values",
        "a: [": "not valid YAML",
    }
    for text, message in bad.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            load_instructions_config(tmp_path / "bad.yaml")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="set quota in it"):
        from_arguments([str(tmp_path / "sources.yaml")], quota=3)


def test_nothing_usable_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no instruction can be used; the first row: .*no prompt"):
        gather(tmp_path, {"s": {"path": write(tmp_path / "rows.jsonl", [{"x": 1}])}})
    with pytest.raises(UserError, match=r"no instruction can be used: .*rows.jsonl holds no rows"):
        gather(tmp_path, {"s": {"path": write(tmp_path / "rows.jsonl", [])}})


def test_random_damage_never_crashes(tmp_path, folder):
    lots = random.Random(0)
    good = [json.dumps(row).encode() for row, _, _ in FORMS.values()]
    lines = []
    for _ in range(120):
        line = bytearray(lots.choice(good))
        for _ in range(lots.randrange(1, 4)):
            line[lots.randrange(len(line))] = lots.randrange(256)
        lines.append(bytes(line).replace(b"\n", b" "))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*good, *lines]))
    report, _ = gather(tmp_path, {"s": {"path": str(tmp_path / "rows.jsonl"), "images": str(folder)}})
    assert report.sources["s"]["rows"] == 120 + len(good)
    assert report.instructions >= len(good) - 2


def test_the_papers_sources_are_a_sound_file():
    from pathlib import Path

    from silkie_jax.yaml_files import load_yaml

    config = load_yaml(Path(__file__).parents[3] / "configs/sources/vlfeedback.yaml", InstructionsConfig)
    assert sum(source.quota for source in config.sources.values()) == 80_258
