"""VALOR-Eval: the official numbers and post-processing, what `fixed` mends, a judge's replies, and other files."""

import json
import shutil

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import valor
from silkie_jax.evaluation.benchmark import Replies
from silkie_jax.evaluation.rules import valor_parts as parts
from silkie_jax.evaluation.rules import valor_rows as rows
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "valor"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def objects(truth, generated, matched=(), broader=(), image="1"):
    row = {"image_id": image, "gt_words": truth, "generated_words": generated}
    return {**row, "matched_objects": dict(matched), "broader_concept": dict(broader)}


class TestGolden:
    def test_every_part(self, folder, golden):
        expected = next(e for e in load(golden / "evaluation" / "index.json") if e["benchmark"] == "valor")["expected"]
        found = score("valor", None, folder)
        assert found.official == expected
        assert score("valor", folder, folder).official == expected
        assert score("valor", None, folder, parser="fixed").official == expected
        for part in parts.PARTS:
            names = ("faithfulness_s", "faithfulness", "coverage_s", "coverage")
            printed = [round(figures(found)[f"{part}/{name}"], 1) for name in names]
            assert printed == pytest.approx(expected[part], abs=0.051)

    @pytest.mark.parametrize("part", parts.PARTS)
    def test_one_file_and_every_image(self, folder, part):
        expected = load(folder / "expected.json")["official"][part]
        file = folder / f"{part}.matched.jsonl"
        assert score("valor", None, file).official[part] == expected["printed"]
        for row, image in zip(lines(file), expected["per_image"], strict=True):
            tally = parts.PARTS[part](row, False)
            assert tally.all_faithful == image["faithfulness_score_s"]
            assert tally.all_covered == image["coverage_score_s"]
            assert tally.faithful == pytest.approx(image["faithfulness_score_i"] * tally.generated)

    def test_without_postprocess(self, folder):
        expected = load(folder / "expected.json")["official"]["attribute_object_without_postprocess"]["per_image"]
        for row, image in zip(lines(folder / "attribute_object.matched.jsonl"), expected, strict=True):
            tally = parts.attribute_object_without_postprocess(row)
            assert tally.covered == pytest.approx(image["coverage_score_i"] * tally.truth)

    @pytest.mark.parametrize(
        ("part", "process", "names"),
        [
            ("attribute_object", parts.object_postprocess, ("matched_att_obj", "broader_concept")),
            ("attribute_people", parts.people_postprocess, ("matched_att_obj", "broader_concept")),
            (
                "relation_comparative",
                parts.comparative_postprocess,
                ("matched_objects_filtered", "num_broader_concept_filtered", "broader_concept"),
            ),
        ],
    )
    def test_after_postprocess(self, folder, part, process, names):
        expected = load(folder / "expected.json")["official"][part]["after_postprocess"]
        for row, image in zip(lines(folder / f"{part}.matched.jsonl"), expected, strict=True):
            assert process(row) == tuple(image[name] for name in names)

    def test_the_stop_list(self, folder):
        expected = load(folder / "expected.json")["official"]["object_existence_filter_of_extracted_objects"]
        for row in lines(folder / "object_existence.extracted.jsonl"):
            features = rows.read_features("object_existence", row["response"], "a row")
            assert rows.clean_features("object_existence", features, False) == expected[row["image_id"]]

    def test_nothing_generated(self, golden):
        found = score("valor", None, golden / "evaluation" / "errors" / "valor" / "nothing_generated.jsonl")
        assert found.official == {"object_existence": [100.0, None, 0.0, 0.0]}
        assert any("faithfulness is undefined" in note for note in found.notes)
        assert figures(found)["object_existence/faithfulness"] != figures(found)["object_existence/faithfulness"]

    def test_an_empty_mapping(self, golden):
        found = score("valor", None, golden / "evaluation" / "errors" / "valor" / "empty_mapping.jsonl")
        assert found.official["attribute_object_without_postprocess"] == [0.0, 0.0, 0.0, 0.0]


class TestFixed:
    def test_a_match_with_nothing_in_the_truth(self):
        row = objects(["dog"], ["cat"], {"cat": "yak"})
        assert parts.object_existence(row, False).covered == 1
        assert parts.object_existence(row, True) == parts.Tally(1, 0, 1, 0, False, False)
        assert rows.strangers("object_existence", row) == 1

    def test_two_ways_to_say_one_relation(self):
        row = objects({"0": ["a left of b", "b right of a"]}, ["x", "y"], {"x": "a left of b", "y": "b right of a"})
        assert parts.relation_positional(row, False).covered == 2
        assert parts.relation_positional(row, True).covered == 1

    def test_relations_of_one_key(self):
        assert parts.relation_positional(objects({}, {"relations": ["x", "y"]}), False).generated == 2
        assert parts.relation_positional(objects({}, {}), False).generated == 0

    def test_pairs_of_one_order_number(self):
        text = "(red, cup), (blue, cup)"
        pairs = {"(red, cup)": "(red, cup)", "(blue, cup)": "(blue, cup)"}
        row = {"gt_obj_atts": {"1": text}, "generated_obj_atts": {"1": text}, "matched_att_obj": {"1": pairs}}
        assert parts.attribute_object(row, False) == parts.Tally(1, 1, 1, 1, True, True)
        assert parts.attribute_object(row, True) == parts.Tally(2, 2, 2, 2, True, True)

    def test_unknown_is_no_attribute(self):
        row = {"gt_obj_atts": {"1": "(red, cup)"}, "generated_obj_atts": {"1": "(unknown, cup)"}}
        row |= {"matched_att_obj": {}, "broader_concept": {"1": {"(unknown, cup)": "(red, cup)"}}}
        assert [parts.attribute_object(row, fixed).faithful for fixed in (False, True)] == [1, 0]

    def test_a_caption_equal_to_the_truth(self):
        person = {"person": "man", "object": "(red, hat), (blue, coat)"}
        pairs = {"(red, hat)": "(red, hat)", "(blue, coat)": "(blue, coat)"}
        row = {"gt_obj_atts": {"1": person}, "generated_obj_atts": {"1": person}, "broader_concept": {}}
        row["matched_att_obj"] = {"1": {"person": "man", "object": pairs}}
        assert parts.attribute_people(row, False) == parts.Tally(2, 1, 1, 1, False, True)
        assert parts.attribute_people(row, True) == parts.Tally(2, 2, 2, 2, True, True)

    def test_sizes_out_of_order(self):
        truth = {"1": "sky", "2": "cup / mug", "3": "pen"}
        said = {"1": "pen", "2": "heaven", "3": "mug"}
        row = objects(truth, said, {"heaven": "sky", "mug": "mug"}, {"pen": "pen"})
        # official: "mug" is none of the truth; "pen" is alone in order with "sky" after it: one of them stays
        assert parts.relation_comparative(row, False) == parts.Tally(3, 1, 3, 1, False, False)
        assert parts.relation_comparative(row, True) == parts.Tally(3, 2, 3, 2, False, False)

    def test_broader_ones_out_of_order_are_subtracted(self):
        truth, said = {"1": "a", "2": "b", "3": "c"}, {"1": "x", "2": "y", "3": "z"}
        row = objects(truth, said, {"y": "a", "z": "b"}, {"x": "c"})
        assert parts.relation_comparative(row, False) == parts.Tally(3, 1, 3, 1, False, False)
        assert parts.relation_comparative(row, True) == parts.Tally(3, 2, 3, 2, False, False)

    def test_surroundings(self):
        assert rows.clean_features("object_existence", ["surroundings"], False) == ["surroundings"]
        assert rows.clean_features("object_existence", ["surroundings", "moment"], True) == []


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([], []), ([3, 1, 2], [1, 2]), ([2, 2], [2]), ([2, 3, 1, 4, 5], [2, 3, 4, 5]), ([5, 1], [5])],
)
def test_in_order(ranks, expected):
    assert parts.in_order(ranks) == expected


class TestJudge:
    TRUTH = ("dog", "dog", "tree")

    def steps(self, replies, part="object_existence", truth=TRUTH, caption="a dog", extracted=None):
        return rows.follow(
            part, list(truth) if part == "object_existence" else truth, caption, extracted, replies, False
        )

    def test_two_requests(self):
        first = self.steps([])
        assert "a dog" in first.ask.user
        assert (first.ask.temperature, first.ask.max_tokens, first.row) == (0, 2000, None)
        said = '```json\n{"objects": ["puppy", "scene"]}\n```'
        second = self.steps([said])
        assert '["dog", "tree"]' in second.ask.user
        assert '["puppy"]' in second.ask.user
        done = self.steps([said, '{"matched": {"puppy": "dog", "x": null}}'])
        assert done.ask is None
        assert {"image_id": "1", **done.row} == objects(["dog", "tree"], ["puppy"], {"puppy": "dog"})

    def test_a_reply_of_another_form_is_asked_for_again_and_then_given_up(self):
        bad = ["no JSON", '{"objects": "dog"}', "{"]
        assert self.steps(bad[:2]).ask == self.steps([]).ask
        assert self.steps(bad) == rows.Progress(None, None)
        good = '{"objects": ["puppy"]}'
        assert self.steps([*bad[:2], good, *bad[:2]]).ask is not None
        assert self.steps([*bad[:2], good, *bad]) == rows.Progress(None, None)

    def test_nothing_to_match_asks_nothing(self):
        done = self.steps(['{"objects": []}'])
        assert done.ask is None
        assert done.row["generated_words"] == []

    def test_what_was_extracted_is_not_asked_for(self):
        assert '["puppy"]' in self.steps([], extracted=["puppy"]).ask.user

    def test_a_refusal_is_no_ranking(self):
        done = self.steps([], "relation_comparative", {"1": "sky"}, "Sorry, I cannot")
        assert (done.ask, done.row["generated_words"]) == (None, "")
        assert self.steps([], "relation_positional", {"0": ["x"]}, "Sorry, I cannot").ask is not None

    def test_a_ranking_that_repeats_itself_is_cut(self):
        ask = self.steps([], "relation_comparative", {"1": "sky"}, "1. a cup. 2. a pen. 3").ask
        assert ask.user.rstrip().endswith("Description: 1. a cup. 2. a pen. 3")
        ask = self.steps([], "relation_comparative", {"1": "sky"}, "x. y. z. y. w").ask
        assert ask.user.rstrip().endswith("Description: x. y")

    @pytest.mark.parametrize(
        ("part", "truth", "said", "matched"),
        [
            ("attribute_object", {"1": "(red, cup)"}, {"1": "(red, mug)"}, {"1": {"(red, mug)": "(red, cup)"}}),
            (
                "attribute_people",
                {"1": {"person": "man", "object": "(red, hat), (blue, tie)"}},
                {"1": {"person": "boy", "object": "(red, cap)"}},
                {"1": {"person": "man", "object": {"(red, cap)": "(red, hat)"}}},
            ),
            (
                "relation_positional",
                {"0": ["a is left of b"]},
                ["b is right of a"],
                {"b is right of a": "a is left of b"},
            ),
            ("relation_comparative", {"1": "sky"}, {"1": "heaven"}, {"heaven": "sky"}),
        ],
    )
    def test_every_part(self, part, truth, said, matched):
        replies = [json.dumps({rows.SHAPES[part].reply: said}), json.dumps({"matched": matched, "broader": {}})]
        done = self.steps(replies, part, truth)
        assert done.ask is None
        tally = parts.PARTS[part](done.row, False)
        assert (tally.generated, tally.faithful, tally.truth, tally.covered) == (1, 1, 1, 1)

    def test_from_captions_to_a_score(self, tmp_path):
        data = write(
            tmp_path / "data" / "object_existence.jsonl", [{"image_id": i, "gt_objects": ["dog"]} for i in "1234"]
        )
        answers = write(
            tmp_path / "run_object_existence.json", {i: {"generated_caption": f"caption {i}"} for i in "123"}
        )
        items = valor.items(data.parent, {})
        items, given = valor.read_answers(answers, items, {})
        assert set(valor.dialogues(items, given, {})) == {f"object_existence/{i}" for i in "123"}
        said = {"object_existence/1": ['{"objects": ["dog", "cat"]}', '{"matched": {"dog": "dog"}}']}
        said["object_existence/2"] = ["nothing", "nothing", "nothing"]
        found = valor.score(items, given, Replies([said], failed={"refusal": 1}), "official", {})
        assert found.official == {"object_existence": [0.0, 50.0, 100.0, 100.0]}
        assert (found.counts["replies not in form"], found.counts["no reply"], found.counts["missing"]) == (1, 1, 1)
        assert set(found.outcomes) == {"object_existence/1"}
        with pytest.raises(UserError, match="no image is matched yet"):
            valor.score(items, given, None, "official", {})

    def test_extracted_rows_beside_matched_ones_are_not_needed(self, tmp_path):
        write(tmp_path / "object_existence.extracted.jsonl", [{"image_id": "1", "response": {"objects": ["x"]}}])
        write(tmp_path / "object_existence.matched.jsonl", [objects(["dog"], ["dog"], {"dog": "dog"})])
        assert score("valor", None, tmp_path).official == {"object_existence": [100.0] * 4}


def test_parts_are_known_by_what_rows_hold(folder, tmp_path):
    for part in parts.PARTS:
        shutil.copy(folder / f"{part}.matched.jsonl", tmp_path / "x.jsonl")
        assert part in score("valor", None, tmp_path / "x.jsonl").official


def test_prompts(tmp_path):
    write(tmp_path / "human_annotation" / "relation_comparative.json", {"7": {"1": "sky"}})
    (item,) = valor.items(tmp_path, {})
    assert item.id == "relation_comparative/7"
    assert "size" in valor.prompt(item, "own")
    with pytest.raises(UserError, match=r"no generation/relation_comparative.txt"):
        valor.prompt(item, "official")
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation" / "relation_comparative.txt").write_text("Rank them.\n", encoding="utf-8")
    (item,) = valor.items(tmp_path, {})
    assert valor.prompt(item, "official") == "Rank them."
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.png").write_bytes(b"png")
    assert item.pictures[0].read() == b"png"


def test_line_ends_and_marks(tmp_path):
    row = json.dumps(objects(["dog\u2028"], ["dog"], {"dog": "dog\u2028"}), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + row + "\r\n\r\n").encode())
    assert score("valor", None, tmp_path / "a.jsonl").official == {"object_existence": [100.0] * 4}


OBJECTS = objects(["dog"], ["dog"])
PEOPLE = {"image_id": "1", "gt_obj_atts": {"1": {"person": "man", "object": "(a, b)"}}, "generated_obj_atts": {}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty"),
        ([3], "line 1: expected an object"),
        ([{"image_id": "1"}], "of which part"),
        ([{k: v for k, v in OBJECTS.items() if k != "image_id"}], "line 1: no field 'image_id'"),
        ([{k: v for k, v in OBJECTS.items() if k != "generated_words"}], "line 1: no field 'generated_words'"),
        ([{k: v for k, v in OBJECTS.items() if k != "broader_concept"}], "line 1: no field 'broader_concept'"),
        ([OBJECTS | {"generated_words": "dog"}], "generated_words: expected a list, found a text"),
        ([OBJECTS | {"generated_words": [1]}], "generated_words: expected a list of texts, found a number"),
        ([OBJECTS | {"matched_objects": ["dog"]}], "matched_objects: expected an object, found a list"),
        ([OBJECTS | {"matched_objects": {"dog": ["dog"]}}], "matched_objects, 'dog': expected a text, found a list"),
        ([OBJECTS, OBJECTS], "line 2: image 1 of object_existence is there twice: remove one"),
        ([objects({"x": "sky"}, {})], "gt_words: rank 'x' is not a number"),
        ([objects({"1": "sky"}, ["sky"])], "generated_words: expected an object, found a list"),
        ([objects({"1": ["a"]}, "")], "generated_words: expected a list, found a text"),
        (
            [PEOPLE | {"matched_att_obj": {"1": "man"}, "broader_concept": {}}],
            "matched_att_obj, '1': expected an object",
        ),
        ([PEOPLE | {"matched_att_obj": {"1": {"object": "x"}}, "broader_concept": {}}], "object: expected an object"),
    ],
)
def test_other_rows(tmp_path, given, message):
    with pytest.raises(UserError, match=message) as error:
        score("valor", None, write(tmp_path / "a.jsonl", given))
    assert "\n" not in str(error.value)


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        score("valor", None, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"no \*.matched.jsonl"):
        score("valor", None, tmp_path)
    with pytest.raises(UserError, match="no annotations of VALOR-Eval"):
        valor.items(tmp_path / "absent", {})
    captions = write(tmp_path / "object_existence.json", {"1": {"generated_caption": "x"}})
    with pytest.raises(UserError, match="have no image 1; name them with --data"):
        score("valor", None, captions)
    with pytest.raises(UserError, match="'1': no field 'generated_caption'"):
        score("valor", None, write(tmp_path / "object_existence.json", {"1": {}}))
    with pytest.raises(UserError, match=r"expected .image: .generated_caption: text.."):
        score("valor", None, write(tmp_path / "object_existence.json", {"1": "x"}))
    with pytest.raises(UserError, match="of which part"):
        score("valor", None, write(tmp_path / "b.json", {"1": {"generated_caption": "x"}}))


def test_an_image_that_the_annotations_lack(tmp_path):
    data = write(tmp_path / "d" / "object_existence.jsonl", [{"image_id": "2", "gt_objects": ["dog"]}])
    with pytest.raises(UserError, match="the annotations of object_existence have no image 1"):
        score("valor", data.parent, write(tmp_path / "a.jsonl", [OBJECTS]))
