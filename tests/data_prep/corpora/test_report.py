"""The report: its numbers, the biases that it exposes, and a page that needs nothing else."""

import json
import math
import re
import subprocess
import tracemalloc
from dataclasses import replace
from statistics import stdev

import pytest

from data_prep.corpora.build import build
from data_prep.corpora.measures import Measures
from data_prep.corpora.report import measure, remarks, write_report
from data_prep.corpora.show import show
from data_prep.judging.rate import rate
from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.corpus.shards import CorpusBuilder
from silkie_jax.errors import UserError
from tests.data_prep.rated import fill, quality, text_reply
from tests.data_prep.runs import QUIET, make_answered, picture, write_judge
from tests.endpoints.server import Script, Server

QUIETLY = {"progress": False, "workers": 1}


def corpus_of(folder, records, **facts):
    """A corpus of these records."""
    with CorpusBuilder(folder, "corpus", 1) as builder:
        builder.finish([builder.write(0, "", records, {})], {}, {"aspects": ["A"], **facts})
    return CorpusReader(folder)


def record(number, ratings, texts=None, **changes):
    responses = tuple(
        Response(text, f"m{n}", {"A": rating})
        for n, (rating, text) in enumerate(zip(ratings, texts or ["x" * 10] * len(ratings), strict=True))
    )
    return Record(f"r{number}", (picture(number),), "prompt", responses, **changes)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The same responses rated by a judge that favours the first text: in one order, and in all four."""
    folder = tmp_path_factory.mktemp("bias")
    corpora = {}
    with Server(Script(bias=2)) as server:
        for orders in (1, 4):
            run = make_answered(folder / f"run-{orders}", 48, server.url)
            rate(run, [write_judge(folder / "judge", server.url, {"orders": orders})], QUIET)
            build(run, folder / f"corpus-{orders}", **QUIETLY)
            corpora[orders] = measure(CorpusReader(folder / f"corpus-{orders}"), run=run)
    return corpora


def test_a_judge_that_favours_the_first_text_is_exposed(judged):
    numbers = judged[1]
    places = numbers["position"]["as_judged"]["judge"]["places"]
    assert places["1"]["mean"] > 0.5
    assert places["1"]["mean"] > 8 * places["1"]["standard_error"]
    assert all(places[place]["mean"] < 0 for place in "234")
    assert numbers["position"]["as_judged"]["judge"]["earlier_text_preferred"]["share"] > 0.6
    (found,) = [line for line in remarks(numbers) if "place 1" in line]
    assert "average more orders" in found


def test_averaging_all_orders_takes_the_bias_out(judged):
    numbers = judged[4]
    assert numbers["position"]["as_judged"]["judge"]["places"]["1"]["mean"] > 0.5
    kept = numbers["position"]["in_corpus"]
    for row in kept.values():  # what remains is chance: the texts' own quality
        assert abs(row["mean"]) < 4 * row["standard_error"]
    assert abs(kept["1"]["mean"]) < judged[1]["position"]["in_corpus"]["1"]["mean"] / 3
    assert numbers["judges"]["judge"]["difference_between_orders"]["mean"] > 1
    (found,) = [line for line in remarks(numbers) if "place 1" in line]
    assert "has taken it out" in found


def test_costs_are_those_of_the_run(judged):
    numbers = judged[1]
    assert numbers["cost"] == pytest.approx(numbers["run"]["spent_at_most"], abs=1e-5)
    assert sum(row["ok"] for row in numbers["spending"]) == 48 * 5


def test_the_page_says_what_the_whole_run_cost(tmp_path):
    run = fill(tmp_path / "run", 3)
    build(run, tmp_path / "corpus", **QUIETLY)
    page = write_report(tmp_path / "corpus", tmp_path / "page.html", run=run, progress=False)
    agents = json.loads(page.with_suffix(".json").read_text())["run"]["agents"]
    (judge,) = [row for row in agents if row["agent"] == "judge"]
    assert (judge["requests"], judge["attempts"]) == ({"ok": 3}, {"ok": 3})
    assert judge["cost"] == pytest.approx(0.003)
    assert "The whole run, attempts in vain included" in page.read_text()
    assert "<td>ok 3 </td>" in page.read_text()


def test_an_unbiased_judge_is_not_accused(tmp_path):
    build(fill(tmp_path / "run", 60), tmp_path / "corpus", **QUIETLY)
    assert not [line for line in remarks(measure(CorpusReader(tmp_path / "corpus"))) if "place" in line]


def test_ratings_ties_lengths_and_models():
    measures = Measures()
    measures.add(record(0, [1, 5, 5, math.nan], ["x" * 10, "x" * 30, "x" * 60, "x" * 5]))
    measures.add(record(1, [2, 3.5, 3, 4], ["x" * 10, "x" * 20, "x" * 30, "x" * 1000], source="s"))
    numbers = measures.to_json()
    assert numbers["ratings"]["A"] == {
        "histogram": {"1": 1, "2": 1, "3": 1, "4": 2, "5": 2},
        "missing": 1,
        "n": 7,
        "mean": pytest.approx(23.5 / 7, abs=1e-6),
        "standard_error": pytest.approx(stdev([1, 5, 5, 2, 3.5, 3, 4]) / math.sqrt(7), abs=1e-6),
    }
    assert numbers["ties"] == {"n": 9, "share": pytest.approx(1 / 9, abs=1e-6)}
    assert numbers["length"]["longer_response_preferred"] == {"n": 8, "share": pytest.approx(7 / 8, abs=1e-6)}
    assert numbers["length"]["histogram"]["0"] == 4
    assert numbers["length"]["rating"]["800"]["mean"] == 4
    assert numbers["models"]["m1"]["overall"]["mean"] == 4.25
    assert numbers["pairs"]["mean_rating"] == 8
    assert numbers["sources"] == {"": 1, "s": 1}
    apart = numbers["by_source"]
    assert {name: (row["records"], row["responses"], row["pairs"]) for name, row in apart.items()} == {
        "": (1, 4, 2),
        "s": (1, 4, 6),
    }
    assert apart["s"]["overall"]["mean"] == apart["s"]["aspects"]["A"]["mean"] == 3.125
    assert apart[""]["ties"] == {"n": 3, "share": pytest.approx(1 / 3, abs=1e-6)}


def test_one_absurd_rating_costs_no_memory_and_is_named(tmp_path):
    records = [record(0, [1, 5, 3e6]), record(1, [-1e300, 4, math.inf]), record(2, [2, 6, 3])]
    tracemalloc.start()
    numbers = Measures()
    for one in records[:2]:  # as imported before scales were kept
        numbers.add(one)
    found = numbers.to_json()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert found["ratings"]["A"]["histogram"] == {"1": 1, "2": 0, "3": 0, "4": 1, "5": 1}
    assert (found["ratings"]["A"]["n"], found["ratings"]["A"]["missing"], found["off_scale"]) == (3, 0, {"A": 3})

    corpus_of(tmp_path / "corpus", [records[0], records[2]], scales={"A": [1, 5]})
    page = write_report(tmp_path / "corpus", progress=False)
    assert json.loads(page.with_suffix(".json").read_text())["off_scale"] == {"A": 2}
    assert "2 ratings of A are off the scale" in page.read_text()


def test_numbers_stay_small_however_many_names_there_are():
    measures = Measures()
    for n in range(300):
        responses = (Response("x", f"m{n}", {f"A{n}": 3}),)
        judged = {"judge": f"j{n}", "order": 0, "kind": "complete", "shown": [0], "ratings": {"A": [3]}}
        extra = {"licence": f"l{n}", "judgements": [judged]}
        measures.add(Record(f"r{n}", (), "prompt", responses, source=f"s{n}", extra=extra))
    numbers = measures.to_json()
    for key in ("sources", "by_source", "licences", "models", "ratings", "judges", "pairs"):
        assert len(numbers[key]) == 101
    assert numbers["models"]["(others)"]["responses"] == numbers["sources"]["(others)"] == 200


def test_a_corpus_without_any_number_is_reported(tmp_path):
    corpus_of(tmp_path / "corpus", [record(0, [math.nan, math.nan])])
    assert "2 missing" in write_report(tmp_path / "corpus", progress=False).read_text()


def test_weights_count_in_the_overall_rating():
    ratings = {"A": 5.0, "B": 1.0, "C": math.nan}
    assert Measures({"A": 3, "B": 1, "C": 0}).overall(ratings) == 4
    assert math.isnan(Measures({"A": 3, "B": 1}).overall(ratings))


def test_judges_are_compared(tmp_path):
    def reply(number, judge, order, shown, said):
        if judge == "b":  # one lower where it can be, and the other way round for every fifth
            ratings = [quality(number, slot) for slot in shown]
            return text_reply(RUBRIC, [6 - r for r in ratings] if number % 5 == 0 else [max(1, r - 1) for r in ratings])
        return said

    from data_prep.judging.rubric import load_rubric

    RUBRIC = load_rubric("vlfeedback")
    build(fill(tmp_path / "run", 50, judges=("a", "b"), reply=reply), tmp_path / "corpus", **QUIETLY)
    (found,) = measure(CorpusReader(tmp_path / "corpus"))["agreement"]
    assert found["judges"] == ["a", "b"]
    assert 0.7 < found["same_preference"]["share"] < 0.9
    assert 0 < found["correlation_within_instructions"]["r"] < 1


def test_judges_of_different_aspects_are_compared_by_what_they_prefer():
    judgements = [
        {"judge": judge, "order": 0, "kind": "complete", "shown": [0, 1], "ratings": {aspect: ratings}}
        for judge, aspect, ratings in (("a", "A", [1, 5]), ("b", "B", [70, 90]), ("c", "A", [3, 4]))
    ]
    measures = Measures()
    measures.add(record(0, [1, 5], extra={"judgements": judgements}))
    found = {"".join(row["judges"]): row for row in measures.to_json()["agreement"]}
    assert {pair: row["same_preference"]["share"] for pair, row in found.items()} == {"ab": 1, "ac": 1, "bc": 1}
    assert {pair: row["mean_difference"]["n"] for pair, row in found.items()} == {"ab": 0, "ac": 2, "bc": 0}


def test_refusals_and_unparsable_replies_are_counted(tmp_path):
    words = {1: "I'm sorry, I can't help with that.", 2: "They are all fine.", 3: ""}
    fill(tmp_path / "run", 6, reply=lambda number, judge, order, shown, said: words.get(number, said))
    build(tmp_path / "run", tmp_path / "corpus", **QUIETLY)
    numbers = measure(CorpusReader(tmp_path / "corpus"))
    assert numbers["judges"]["judge"]["replies"] == {"complete": 3, "refusal": 1, "unparsable": 1, "failed": 1}
    assert any("not complete" in line for line in remarks(numbers))


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path):
    attack = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> {{ 7 * 7 }} \x1b[2J"
    records = [record(n, [1, 5], [attack, "fine"], source=attack, extra={"licence": attack}) for n in range(3)]
    corpus_of(tmp_path / "corpus", records)
    page = write_report(tmp_path / "corpus", tmp_path / "r.html", examples=2, progress=False)
    html = page.read_text()
    assert "<script" not in html.lower()
    sources = re.findall(r"<[a-z]+[^>]*?\s(?:src|href)=[\"']?([^\"'>]*)", html)
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "Content-Security-Policy" in html
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert "\x1b" not in html
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["records"] == 3
    assert numbers["ratings"]["A"]["histogram"] == {"1": 3, "2": 0, "3": 0, "4": 0, "5": 3}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\n"


@pytest.mark.parametrize("data", [EPS, b"no image", picture(0)[:-30]], ids=["EPS", "text", "cut off"])
def test_what_is_no_image_is_said_and_never_handed_to_another_program(tmp_path, monkeypatch, data):
    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    corpus_of(tmp_path / "corpus", [replace(record(0, [1, 5]), images=(data,))])
    page = write_report(tmp_path / "corpus", progress=False)
    assert "unreadable image: " in page.read_text()
    text = show(tmp_path / "corpus", number=0)
    assert "image 1: PNG 16 x 12" in text if data.startswith(b"\x89PNG") else "image 1: unreadable image" in text


def test_a_corpus_without_ratings_and_one_of_vlfeedback(tmp_path):
    plain = Record("r", (), "prompt", (Response("a"), Response("b")), pairs=((0, 1),))
    corpus_of(tmp_path / "pairs", [plain])
    page = write_report(tmp_path / "pairs", progress=False)
    assert page == tmp_path / "pairs" / "report.html"
    assert json.loads(page.with_suffix(".json").read_text())["pairs"]["given"] == 1
    build(fill(tmp_path / "run", 3), tmp_path / "corpus", **QUIETLY)
    numbers = measure(CorpusReader(tmp_path / "corpus"))
    assert numbers["published"]["ratings"]["Helpfulness"] == [22.8, 14.2, 13.4, 23.4, 26.3]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_report(corpus_of(tmp_path / "c", [record(0, [1, 2])]).path, tmp_path / "report.txt", progress=False)
    with pytest.raises(UserError):
        write_report(tmp_path / "nothing", progress=False)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "c", tmp_path / "no" / "r.html", progress=False)


def test_show(tmp_path):
    build(fill(tmp_path / "run", 3), tmp_path / "corpus", **QUIETLY)
    text = show(tmp_path / "corpus", id="i1", images=tmp_path / "images")
    for part in ("record 1: i1", "CC-BY-4.0", "PNG 16 x 12", "What is in picture 1?", "Helpfulness 3", "pairs (mean"):
        assert part in text
    (image,) = (tmp_path / "images").iterdir()
    assert image.read_bytes() == picture(0)
    value = json.loads(show(tmp_path / "corpus", number=1, as_json=True))
    assert value["id"] == "i1"
    assert value["responses"][0]["ratings"]["Helpfulness"] == quality(2, 0)
    with pytest.raises(UserError, match="no record 'i9'; the first is i0"):
        show(tmp_path / "corpus", id="i9")
    with pytest.raises(UserError, match="records 0 to 2, not 3"):
        show(tmp_path / "corpus", number=3)
    corpus_of(tmp_path / "odd", [record(0, [math.nan, 2], ["\x1b[31mred\x07", ""])])
    text = show(tmp_path / "odd", number=0)
    assert "\x1b" not in text
    assert "A -" in text
