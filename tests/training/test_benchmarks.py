"""`evaluate_with`: what a run says of itself at a checkpoint is what `silkie evaluate` says of that checkpoint."""

import dataclasses
import zlib
from pathlib import Path

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import yesno
from silkie_jax.evaluation.running.local import LocalModel
from silkie_jax.evaluation.running.questions import AnswerOptions, open_questions
from silkie_jax.evaluation.running.scoring import score_answers
from silkie_jax.training.config_file import make_config
from silkie_jax.training.loop import train
from tests.evaluation.support import write_yesno
from tests.training.support import make_tiny, read_lines, record, write_corpus


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    make_tiny(folder / "model")
    write_corpus(folder / "corpus", [record(n, images=0) for n in range(6)])
    write_yesno(folder / "data", images=4, each=2)
    return {
        "model": str(folder / "model"),
        "corpus": str(folder / "corpus"),
        "run_dir": str(folder / "run"),
        "lora": {"rank": 2, "alpha": 64},
        "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
        "batch_rows": 2,
        "steps": 4,
        "dtype": "float32",
        "remat": "none",
        "mesh": {"data": 1},
        "log_every": 1,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "evaluate_every": 0,
        "evaluate_at_start": True,
        "evaluation_fraction": 0,
        "evaluate_with": [{"benchmark": "yesno", "data": str(folder / "data" / "questions.jsonl"), "slots": 2}],
    }


@pytest.mark.slow
def test_figures_are_those_of_the_checkpoint(base, tmp_path, monkeypatch):
    # A tiny model answers neither yes nor no: here any change of an answer may change how it is read.
    monkeypatch.setitem(yesno.RULES, "mme_official", lambda text: "yes" if zlib.crc32(text.encode()) % 2 else "no")
    run = train(make_config(base))
    found = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    measured = {step: line["eval_yesno/accuracy"] for step, line in found.items() if "eval_yesno/accuracy" in line}
    assert sorted(measured) == [0, 2, 4]
    data = base["evaluate_with"][0]["data"]
    questions = open_questions("yesno", Path(data), AnswerOptions(limit=200))
    answers = {}
    for step, adapter in ((0, None), (4, run / "adapter")):
        model = LocalModel(base["model"], [questions], adapter=adapter, dtype="float32", mesh=(1, 1, 1), slots=2)
        out = tmp_path / f"{step}.jsonl"
        model.answer(questions, out)
        scored = score_answers("yesno", out)
        assert measured[step] == float(scored.score.sums.figures()["accuracy"])
        answers[step] = [answer.text for answer in scored.answers]
    assert answers[0] != answers[4]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"benchmark": "mmvet"}, "mmvet needs a judge"),
        ({"benchmark": "dance"}, "no benchmark 'dance'"),
        ({"prompt": "x"}, "--prompt x: yesno has"),
        ({"data": "/nowhere"}, "/nowhere: no such data"),
    ],
)
def test_what_cannot_be_measured_is_said_at_the_start(base, tmp_path, entry, said):
    config = make_config(base | {"run_dir": str(tmp_path / "run")})
    config = dataclasses.replace(config, evaluate_with=[dataclasses.replace(config.evaluate_with[0], **entry)])
    with pytest.raises(UserError, match=said):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
