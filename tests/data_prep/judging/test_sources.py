"""Judges that are asked about the instructions of some sources alone."""

import pytest

from data_prep.corpora.build import build
from data_prep.judging.rate import rate
from data_prep.respond import respond
from data_prep.run import Instruction, Run
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.pairs import pairs
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, everything, write_judge, write_pool
from tests.endpoints.server import Server


def judge(path, url, **changes):
    return write_judge(path, url, changes)


def test_each_source_has_its_judge_and_its_aspects(tmp_path):
    run = tmp_path / "run"
    with Run.create(run) as opened:
        named = (Instruction(f"i{n}", f"What {n}?", source="red-team" if n % 2 else "photos") for n in range(6))
        opened.write_instructions(named, {"of": "a test"})
    with Server() as server:
        pool = write_pool(tmp_path / "pool", server.url, ("m0", "m1"), {"models_per_instruction": 2})
        respond(run, pool, QUIET)
        judges = [
            write_judge(tmp_path / name, server.url, {"name": name, "rubric": rubric, "sources": [source]})
            for name, rubric, source in (("a", "five_attributes", "photos"), ("b", "red_team", "red-team"))
        ]
        rate(run, judges, QUIET)
        other = judge(tmp_path / "a", server.url, name="a", rubric="five_attributes")
        with pytest.raises(UserError, match=r"another judge a: sources was \['photos'\] and is None"):
            rate(run, [other], QUIET)
        for sources, message in (
            (["red"], "no instructions of 'red'; it has photos, red-team"),
            ([], "sources is empty"),
        ):
            wrong = write_judge(tmp_path / "c", server.url, {"name": "c", "sources": sources})
            with pytest.raises(UserError, match=message):
                rate(run, [wrong], QUIET)
    for gathered in everything(run):
        assert [reply.judge for reply in gathered.replies] == [
            "b" if gathered.instruction.source == "red-team" else "a"
        ]
    # scales of Helpfulness differ, and must not where both judges count
    with pytest.raises(UserError, match="cannot be averaged"):
        build(run, tmp_path / "corpus", progress=False, workers=1)
    build(run, tmp_path / "corpus", judges=["b"], progress=False, workers=1)
    rule = {
        "name": "by_source",
        "red-team": {"name": "aspect", "aspect": "Ethical Considerations"},
        "other": "longest_as_best",
    }
    for record in CorpusReader(tmp_path / "corpus"):
        aspects = (
            ["Ethical Considerations", "Helpfulness", "Visual Faithfulness"] if record.source == "red-team" else []
        )
        assert [list(response.ratings) for response in record.responses] == [aspects] * 2
        assert pairs(record, rule) == pairs(record, rule["red-team"] if aspects else "longest_as_best")
