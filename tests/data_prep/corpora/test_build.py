"""A run becomes a corpus: the right ratings on the right responses, and the same bytes whoever makes them and however
often they are killed."""

import contextlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
import types

import pytest

from data_prep.corpora.build import build
from data_prep.judging.rubric import Rubric, load_rubric
from data_prep.run import Run
from silkie_jax.corpus import CorpusReader
from silkie_jax.endpoints.store import DATABASE
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make
from tests.data_prep.conftest import rejections
from tests.data_prep.rated import MODELS, files, fill, quality, settle, text_reply
from tests.data_prep.runs import picture, start

QUIET = {"progress": False, "workers": 1}
VLFEEDBACK = load_rubric("vlfeedback")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("build") / "run", 40, orders=2)


@pytest.fixture(scope="module")
def corpus(run):
    build(run, run.parent / "corpus", shards=4, **QUIET)
    return run.parent / "corpus"


def test_records_hold_what_was_said(corpus):
    reader = CorpusReader(corpus)
    reader.verify()
    assert [record.id for record in reader] == [f"i{n}" for n in range(40)]
    assert reader.aspects == tuple(VLFEEDBACK.names)
    for number, record in enumerate(reader, 1):
        assert record.images == (picture((number - 1) // 2),)
        assert record.prompt == f"What is in picture {number - 1}?"
        assert record.source == f"source-{(number - 1) % 3}"
        assert record.extra["licence"] == "CC-BY-4.0"
        assert record.extra["kind"] == (number - 1) % 2
        assert [r.model for r in record.responses] == [MODELS[(number + slot) % 5] for slot in range(4)]
        assert record.extra["models_reported"] == [f"{r.model}-2026" for r in record.responses]
        for slot, response in enumerate(record.responses):
            assert response.text.endswith(f"well, {slot}")
            assert set(response.ratings.values()) == {quality(number, slot)}
        places = {slot: place for place, slot in enumerate(record.extra["judgements"][0]["shown"], 1)}
        assert [r.rationales["Helpfulness"] for r in record.responses] == [
            f"Helpfulness of {places[slot]}" for slot in range(4)
        ]
        assert [judgement["order"] for judgement in record.extra["judgements"]] == [0, 1]


def test_the_manifest_says_who_judged_and_what_it_cost(corpus):
    manifest = json.loads((corpus / "corpus.json").read_text())
    assert manifest["judges"]["judge"]["complete"] == 80
    assert manifest["scales"]["Helpfulness"] == [1, 5]
    assert {row["agent"]: row["ok"] for row in manifest["spending"]} == {**dict.fromkeys(MODELS, 32), "judge": 80}
    assert sum(row["cost"] for row in manifest["spending"]) == pytest.approx(0.001 * (160 + 80))


def test_it_opens_with_tfds_without_tensorflow(corpus):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(corpus).as_data_source("train")
    assert len(source) == 40
    assert source[3]["id"].decode() == "i3"
    assert source[3]["images"][0].shape == (12, 16, 3)
    assert "tensorflow" not in sys.modules


def test_orders_and_judges_are_averaged_and_gaps_stay_gaps(tmp_path):
    def reply(number, judge, order, shown, said):
        if number == 1 and judge == "a":  # orders disagree: 2 and 4 for each
            return text_reply(VLFEEDBACK, [2 + 2 * order] * 4)
        if number == 1:
            return text_reply(VLFEEDBACK, [5] * 4)
        if number == 2 and judge == "a":  # the first order lacks slot 0, the second has it
            return text_reply(VLFEEDBACK, ["N/A" if slot == 0 and order == 0 else 3 for slot in shown])
        if number == 2:
            return "I'm sorry, I can't."
        if number == 3:
            return text_reply(VLFEEDBACK, ["N/A" if slot == 2 else 1 for slot in shown])
        return said

    summary = build(fill(tmp_path / "run", 4, 2, ("a", "b"), reply=reply), tmp_path / "corpus", **QUIET)
    records = list(CorpusReader(tmp_path / "corpus"))
    assert {r.ratings["Helpfulness"] for r in records[0].responses} == {4.0}  # (mean(2, 4) + 5) / 2
    assert {r.ratings["Helpfulness"] for r in records[1].responses} == {3.0}
    assert [math.isnan(r.ratings["Helpfulness"]) for r in records[2].responses] == [False, False, True, False]
    assert [kind["kind"] for kind in records[1].extra["judgements"]] == ["complete", "complete", "refusal", "refusal"]
    assert summary.missing_ratings == 3
    build(tmp_path / "run", tmp_path / "only-b", judges=["b"], **QUIET)
    only = CorpusReader(tmp_path / "only-b")
    assert {r.ratings["Helpfulness"] for r in only[0].responses} == {5.0}
    assert all(math.isnan(rating) for r in only[1].responses for rating in r.ratings.values())


@pytest.mark.parametrize("threaded", [set(), {"sys"}], ids=["forked", "forked by a server"])
def test_more_processes_give_the_same_bytes(run, corpus, tmp_path, monkeypatch, threaded):
    monkeypatch.setattr("data_prep.corpora.build._THREADED", threaded)
    build(run, tmp_path / "corpus", shards=4, workers=2, progress=False)
    assert files(tmp_path / "corpus") == files(corpus)


def test_beam_gives_the_same_bytes(run, corpus, tmp_path):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    build(run, tmp_path / "corpus", shards=4, runner="beam", beam_options=["--runner=DirectRunner"], progress=False)
    assert files(tmp_path / "corpus") == files(corpus)


class Step:
    """Stands for a transform of Apache Beam, and does it at once."""

    def __init__(self, apply):
        self.apply = apply

    def __rrshift__(self, label):
        return self

    def __ror__(self, items):
        return self.apply(items)


def stand_in_for_beam(monkeypatch, database):
    """Workers that are this process, from which the run's database is hidden meanwhile."""
    beam, options = types.ModuleType("apache_beam"), types.ModuleType("apache_beam.options.pipeline_options")

    def make_all(numbers, function, job):
        hidden = database.with_suffix(".hidden")
        os.rename(database, hidden)
        try:
            return [function(number, pickle.loads(pickle.dumps(job))) for number in numbers]
        finally:
            os.rename(hidden, database)

    beam.Pipeline = lambda options: contextlib.nullcontext(())
    beam.Create = lambda items: Step(lambda _: items)
    beam.Reshuffle = lambda: Step(list)
    beam.Map = lambda function, job: Step(lambda numbers: make_all(numbers, function, job))
    options.PipelineOptions = list
    for name, module in {"apache_beam": beam, "apache_beam.options.pipeline_options": options}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "apache_beam.options", types.ModuleType("apache_beam.options"))


def test_other_machines_need_no_part_of_the_runs_database(run, corpus, tmp_path, monkeypatch):
    """SQLite's log is for one host: workers of a cluster get a snapshot. The bytes are those of one machine."""
    stand_in_for_beam(monkeypatch, run / DATABASE)
    build(run, tmp_path / "corpus", shards=4, runner="beam", progress=False)
    assert files(tmp_path / "corpus") == files(corpus)


def test_a_snapshot_holds_what_came_of_a_run_and_no_more(run, tmp_path):
    with Run.open(run) as opened:
        opened.snapshot(tmp_path / "copy")
        with Run.open(run, snapshot=tmp_path / "copy") as copy:
            assert list(copy.gathered()) == list(opened.gathered())
            assert copy.settings("run id") == opened.settings("run id")
            assert {body for (body,) in copy.db.execute("SELECT body FROM requests")} == {""}
            assert not list(tmp_path.glob("copy-*"))  # no log, and no locks


def test_without_beam_it_says_how_to_get_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'silkie-jax\[beam\]'"):
        build(run, tmp_path / "corpus", runner="beam", progress=False)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(run, corpus, tmp_path):
    dst = tmp_path / "corpus"
    lots = random.Random(0)
    for _ in range(4):
        process = start("build", run, dst, "--shards", 4, "--workers", 2)
        time.sleep(lots.uniform(0.3, 3.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        if (dst / "corpus.json").exists():
            break
        with pytest.raises(UserError, match=r"unfinished|there is no"):
            CorpusReader(dst)
    process = start("build", run, dst, "--shards", 4, "--workers", 2)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert files(dst) == files(corpus)


def test_a_finished_corpus_is_left_alone_and_another_refused(run, corpus, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert build(run, corpus, shards=4, **QUIET).records == 40
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before
    with pytest.raises(UserError, match="other input"):
        build(fill(tmp_path / "run", 3), corpus, **QUIET)


def test_finished_shards_are_kept_and_others_made_anew(run, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    from data_prep.corpora.build import BuildJob
    from silkie_jax.corpus.shards import CorpusBuilder

    with Run.open(run) as opened:
        rubric = opened.settings("judge:judge")["rubric"]
    job = BuildJob(str(run), str(tmp_path / "half"), "corpus", 4, 40, {"judge": json.loads(json.dumps(rubric))})
    with CorpusBuilder(job.dst, "corpus", 4):
        first = job.make(2)
        file = tmp_path / "half" / first.shard.file
        stamp = file.stat().st_mtime_ns
        assert job.make(2) == first
        assert file.stat().st_mtime_ns == stamp
        file.write_bytes(b"damaged")
        assert job.make(2).shard == first.shard


def test_an_unfinished_run_is_refused_unless_one_wants_it(tmp_path):
    fill(tmp_path / "run", 3)
    with Run.create(tmp_path / "run") as run, run.transaction():
        settle(run, "rate", 1, "judge", 7, [0, 1, 2, 3], None)
    with pytest.raises(UserError, match=r"1 requests of `silkie corpus rate` are still open: .*--partial"):
        build(tmp_path / "run", tmp_path / "corpus", **QUIET)
    assert build(tmp_path / "run", tmp_path / "corpus", partial=True, **QUIET).records == 3


def test_instructions_without_a_response_are_listed(tmp_path):
    fill(tmp_path / "run", 3)
    with Run.create(tmp_path / "run") as run, run.transaction():
        run.db.execute("UPDATE requests SET state = 'failed' WHERE instruction = 2 AND stage = 'respond'")
    summary = build(tmp_path / "run", tmp_path / "corpus", **QUIET)
    assert (summary.rows, summary.records, summary.rejected) == (3, 2, {"no usable response": 1})
    assert [record.id for record in CorpusReader(tmp_path / "corpus")] == ["i0", "i2"]
    assert json.loads((tmp_path / "corpus" / "rejected.jsonl").read_text())["id"] == "i1"


def test_replies_that_leave_gaps_are_listed(tmp_path):
    """A number off the scale is no rating: the line names the record, the judge and which rating it would have been."""

    def reply(number, judge, order, shown, said):
        return said.replace("Rating: 5", "Rating: 3000000", 1) if number == 2 else "" if number == 3 else said

    summary = build(fill(tmp_path / "run", 4, reply=reply), tmp_path / "corpus", **QUIET)
    assert (summary.records, summary.rejected, summary.missing_ratings) == (4, {}, 13)
    listed = rejections(tmp_path / "corpus")
    assert [(line["what"], line["id"], line["reason"]) for line in listed] == [
        ("reply", "i1", "reply not complete"),
        ("reply", "i2", "reply not complete"),
    ]
    assert listed[0]["detail"].startswith(
        "judge, order 0 (missing): 1 ratings are absent, unclear or off the scale: Helpfulness of text "
    )
    assert "judge, order 0 (failed): there is no reply (ok)" in listed[1]["detail"]


def test_mistakes_are_one_line(tmp_path):
    fill(tmp_path / "run", 2, judges=("a",))
    with pytest.raises(UserError, match="has judges a"):
        build(tmp_path / "run", tmp_path / "corpus", judges=["z"], **QUIET)
    with pytest.raises(UserError, match="no run at"):
        build(tmp_path / "nothing", tmp_path / "corpus", **QUIET)
    with Run.create(tmp_path / "run") as run:
        rubric = {"name": "ten", "scale": {"low": 1, "high": 10}, "aspects": [{"name": "Helpfulness"}]}
        run.save_settings("judge:b", {"rubric": rubric})
    with pytest.raises(UserError, match="judges a and b rate Helpfulness from 1 to 5 and from 1 to 10"):
        build(tmp_path / "run", tmp_path / "corpus", **QUIET)
    with Run.create(tmp_path / "run") as run:
        rubric["scale"] = {"low": 0, "high": 3_000_000}
        run.save_settings("judge:b", {"rubric": rubric})
    with pytest.raises(UserError, match=r"judge b: scale\.low 0 and high 3e\+06 must lie within -100 to 100"):
        build(tmp_path / "run", tmp_path / "corpus", judges=["b"], **QUIET)
    for options, words in (
        ({"shards": 0}, "shards: 0 is not at least 1"),
        ({"workers": 0}, "workers: 0 is not at least 1"),
        ({"beam_options": ["--runner=FlinkRunner"]}, "--beam-option --runner=FlinkRunner: add --runner beam"),
        ({"evaluation": tmp_path / "corpus"}, "name a folder of its own"),
        ({"evaluation": tmp_path / "corpus" / "held-out"}, "name a folder of its own"),
    ):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "run", tmp_path / "corpus", **QUIET | options)
        assert not (tmp_path / "corpus").exists()
    with Run.create(tmp_path / "empty"):
        pass
    with pytest.raises(UserError, match="no instructions yet"):
        build(tmp_path / "empty", tmp_path / "corpus", **QUIET)


def test_held_out_instructions_share_no_image(run, tmp_path):
    build(
        run, tmp_path / "train", evaluation=tmp_path / "evaluation", evaluation_fraction=0.25, shards=3, **QUIET
    )  # fmt: skip
    train, held_out = CorpusReader(tmp_path / "train"), CorpusReader(tmp_path / "evaluation")
    assert len(train) + len(held_out) == 40
    assert 1 <= len(held_out) <= 10
    images = [{sha for record in corpus for sha in record.image_sha256} for corpus in (train, held_out)]
    assert images[0].isdisjoint(images[1])


def test_another_rubric_is_a_file(tmp_path):
    """Five attributes from 0 to 4, two of which have no weight."""
    rubric = load_rubric("five_attributes")
    fill(
        tmp_path / "run", 2, rubric=rubric,
        reply=lambda number, judge, order, shown, said: text_reply(rubric, list(shown)),
    )  # fmt: skip
    build(tmp_path / "run", tmp_path / "corpus", **QUIET)
    reader = CorpusReader(tmp_path / "corpus")
    assert reader.aspects == ("Helpfulness", "Correctness", "Coherence", "Complexity", "Verbosity")
    assert [r.ratings["Verbosity"] for r in reader[0].responses] == [0, 1, 2, 3]
    manifest = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert manifest["weights"]["Verbosity"] == 0
    assert make({"name": "x", "aspects": [{"name": "A"}]}, Rubric).weights == {"A": 1}
