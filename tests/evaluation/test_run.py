"""The whole road: answered, scored and laid side by side; and what is refused on the way."""

import json
import re
import shutil

import pytest

from silkie_jax import cli
from silkie_jax.evaluation.report.page import marked
from silkie_jax.evaluation.report.runs import published, read_runs
from silkie_jax.evaluation.running import answers as files
from silkie_jax.evaluation.table import BENCHMARKS, find_benchmark
from tests.endpoints.server import Script, Server
from tests.evaluation.support import write_mcq, write_mme, write_yesno
from tests.training.support import image_bytes, make_tiny


@pytest.fixture
def silkie(capsys):
    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_tiny(folder / "model")
    write_mme(folder / "data" / "mme", images=1)
    write_yesno(folder / "data" / "yesno-data", images=4)
    write_mcq(folder / "data" / "mcq-data", images=4)
    return folder


def rewrite(path, answer) -> None:
    """Another model's answers, as if it had given them."""
    header, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    path.write_text("\n".join([header, *(json.dumps(r | {"response": answer(r["id"])}) for r in rows)]) + "\n")


@pytest.fixture(scope="module")
def runs(folder):
    """Two runs of MME and yes/no questions; of the second all answers are made right."""
    where = [f"--data=mme={folder}/data/mme", f"--data=yesno={folder}/data/yesno-data/questions.jsonl"]
    asked = [
        "--model",
        folder / "model",
        "--dtype",
        "float32",
        "--mesh",
        "data=1",
        "--slots",
        "4",
        "--max-new-tokens",
        "4",
    ]
    for name in ("base", "dpo"):
        command = ["evaluate", "run", "mme", "yesno", *where, *asked, "--out", folder / name]
        assert cli.main([str(a) for a in command]) == 0
        for benchmark in ("mme", "yesno"):
            path = folder / name / benchmark / "answers.jsonl"
            right = {item.id: item.truth for item in _items(path)}
            rewrite(path, right.__getitem__ if name == "dpo" else lambda id: "Yes")
        assert cli.main([str(a) for a in command]) == 0  # answered before: scored again, without a model's work
    return folder / "base", folder / "dpo"


def _items(path):
    from pathlib import Path

    origin, _ = files.read_answers(path)
    return find_benchmark(origin.benchmark).items(Path(origin.data), {})


def test_a_run_says_what_its_numbers_rest_on(runs):
    score = json.loads((runs[1] / "mme" / "score.json").read_text())
    assert score["official"]["perception"] == 2000
    assert score["figures"]["cognition"] == {"value": 800, "low": 800, "high": 800}
    assert score["answers"]["prompt"] == "official"
    assert score["answers"]["decoding"] == {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0}
    assert re.fullmatch("[0-9a-f]{64}", score["answers"]["weights"])
    assert score["rows"] == 28
    # As anybody would score the same answers, without a model.
    assert json.loads((runs[0] / "yesno" / "score.json").read_text())["figures"]["yes_ratio"]["value"] == 1


def test_a_report_lays_runs_side_by_side(silkie, runs, tmp_path):
    base, dpo = runs
    status, said, _ = silkie("evaluate", "report", f"before={base}", dpo, "--out", tmp_path / "page.html")
    assert (status, said) == (0, f"report: {tmp_path / 'page.html'}\n")
    page, table = (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in re.sub(r"Content-Security-Policy|http-equiv", "", page)  # nothing is fetched
    for text in (page, table):
        assert "14 of 28 better, 0 worse: the second is better, beyond noise (McNemar" in text
        assert "Silkie (paper)" in text
        assert "1539.6" in text
        assert "before" in text
    assert "perception +1500.0 (+1500.0 to +1500.0); cognition +600.0 (+600.0 to +600.0)." in table
    assert "perception <b>+1500.0</b> (+1500.0 to +1500.0)" in page
    assert "| dpo | 2000.0 (2000.0 to 2000.0) | 800.0 (800.0 to 800.0) | 28 | official |" in table
    assert page.count("data:image/jpeg;base64,") >= 12  # answers that differ, with their images
    assert "12 of 14 answers that came out differently" in page


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("There is a red circle.", "There is a small circle.\nNo more."),
        ("", "Yes"),
        ("a  b\n", "a b"),
        ("the same", "the same"),
        ("一 二", "二 三 "),
    ],
)
def test_what_differs_is_marked_and_nothing_is_lost(first, second):
    for pieces, text in zip(marked(first, second), (first, second), strict=True):
        assert "".join(piece for piece, _ in pieces) == text
    kept = [
        [word for piece, differs in pieces if not differs for word in piece.split()] for pieces in marked(first, second)
    ]
    assert kept[0] == kept[1]
    assert marked(first, first)[0] == ([(first, False)] if first else [])


def test_a_report_of_other_experiments_says_so(silkie, runs, tmp_path, folder):
    score = runs[0] / "yesno" / "score.json"
    changed = json.loads(score.read_text())
    changed["answers"]["prompt"] = "another"
    (tmp_path / "other" / "yesno").mkdir(parents=True)
    (tmp_path / "other" / "yesno" / "score.json").write_text(json.dumps(changed))
    outcomes = (runs[0] / "yesno" / "outcomes.jsonl").read_text()
    (tmp_path / "other" / "yesno" / "outcomes.jsonl").write_text(outcomes)
    silkie("evaluate", "report", runs[0], tmp_path / "other", "--out", tmp_path / "page.html")
    assert "Not the same experiment: prompt differ" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("part", [("answers", "limit", 14), ("settings", "tasks", "existence")])
def test_a_part_of_a_benchmark_does_not_stand_beside_published_figures(silkie, runs, tmp_path, part):
    where, key, value = part
    shutil.copytree(runs[0] / "mme", tmp_path / "part" / "mme")
    score = json.loads((tmp_path / "part" / "mme" / "score.json").read_text())
    score[where][key] = value
    (tmp_path / "part" / "mme" / "score.json").write_text(json.dumps(score))
    for others, shown in (((), False), ((runs[1],), True)):
        silkie("evaluate", "report", tmp_path / "part", *others, "--out", tmp_path / "page.html")
        assert ("Silkie (paper)" in (tmp_path / "page.html").read_text()) is shown


def test_published_figures_are_figures_of_their_benchmarks():
    for name, rows in published().items():
        headline = {figure.name for figure in find_benchmark(name).ABOUT.figures}
        for row in rows.values():
            assert headline & set(row), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_it_needs(name):
    about = find_benchmark(name).ABOUT
    assert about.title
    assert about.data
    assert about.figures
    assert about.prompts
    assert about.parsers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score dance {tmp}", "no benchmark 'dance'; there are mme,"),
        ("score mme {tmp}/none", "{tmp}/none: no such file or folder"),
        ("score mme {tmp} --parser other", "--parser other: mme has official, vlmevalkit, lmms-eval"),
        ("score mme {tmp} --set other=1", "--set other: mme has no such setting; there are: tasks"),
        ("score mme {tmp} --set other", "--set 'other' is not like name=value"),
        ("score mme {tmp} --replies x", "--replies: mme has no judge"),
        ("score pope {base}/mme/answers.jsonl", "holds answers to mme, not to pope"),
        ("score mmvet {tmp}/file.json", "mmvet needs --data"),
        ("answer mme --data {tmp}/none --model {model} --out {tmp}/a", "{tmp}/none: no such data; mme needs"),
        ("answer yesno --data {tmp}/none --model m --out {tmp}/a --prompt x", "--prompt x: yesno has question"),
        (
            "answer yesno --data {yesno} --model m --out {tmp}/a --template x",
            "--template x: there are chat,",
        ),
        ("answer yesno --data {yesno} --model m --out {tmp}/a --limit 0", "--limit must be at least 1, not 0"),
        ("answer yesno --data {yesno} --model {tmp}/none --out {tmp}/a", "{tmp}/none"),
        ("answer yesno --data {yesno} --model {model} --out {tmp}/none/a", "{tmp}/none: no such folder to write a in"),
        (
            "answer yesno --data {yesno} --model m --endpoint http://x --adapter a --out {tmp}/a",
            "--adapter, --quantize, --slots",
        ),
        ("run mme pope --data mme={tmp} --model m --out {tmp}/r", "--data: nothing for pope; add pope=PATH"),
        ("run mme --data pope={tmp} --model m --out {tmp}/r", "'pope' is none of mme"),
        ("judge mme {tmp} --judge x --out {tmp}/r", "mme has no judge: score it without"),
        ("report {tmp}/none", "{tmp}/none: no such run"),
        ("report {tmp}", "holds no score.json"),
        ("report {base} {base}", "two runs have one name"),
        ("report {base} --out {tmp}/page.pdf", "name a file that ends in .html"),
    ],
)
def test_a_mistake_is_one_line(silkie, runs, folder, tmp_path, arguments, message):
    (tmp_path / "file.json").write_text("{}")
    names = {
        "tmp": tmp_path,
        "base": runs[0],
        "model": folder / "model",
        "yesno": folder / "data/yesno-data/questions.jsonl",
    }
    status, _, complaint = silkie("evaluate", *arguments.format(**names).split())
    assert status == 1
    assert message.format(**names) in complaint
    assert complaint.count("\n") == 1


def test_runs_are_named_by_their_folders(runs):
    base, dpo = runs
    assert [c.name for c in read_runs([str(base), f"other={dpo}"])] == ["base", "other"]


# With a judge


@pytest.fixture
def questions(tmp_path):
    """MM-Vet in small."""
    (tmp_path / "data").mkdir()
    record = {"imagename": "i.png", "answer": "a", "capability": ["ocr"]}
    asked = {f"v1_{n}": {**record, "question": f"q{n}?"} for n in range(3)}
    (tmp_path / "data" / "mm-vet.json").write_text(json.dumps(asked))
    (tmp_path / "data" / "images").mkdir()
    (tmp_path / "data" / "images" / "i.png").write_bytes(image_bytes(0))
    return tmp_path / "data"


def answers_and_grades(request: dict) -> str:
    """The model says that it does not know; the judge gives the number of the question as tenths."""
    content = request["messages"][-1]["content"]
    if request["model"] == "judge":
        return f"0.{content.split(chr(10) + 'q')[-1][0]}"
    return "I do not know"


def test_answers_are_judged_as_often_as_asked_and_paid_for_once(silkie, questions, tmp_path):
    with Server(Script(reply=answers_and_grades)) as server:
        agent = {"model": "judge", "base_url": server.url, "price": {"input": 1.0, "output": 2.0}}
        (tmp_path / "judge.yaml").write_text(json.dumps({"agent": agent}))
        model = ["--model", "theirs", "--endpoint", server.url, "--data", questions, "--out", tmp_path / "run"]
        judged = [*model, "--judge", tmp_path / "judge.yaml", "--runs", "2"]
        status, said, _ = silkie("evaluate", "run", "mmvet", *model)
        assert status == 0
        assert "its score needs a judge (as officially gpt-4-0613)" in said
        status, said, _ = silkie("evaluate", "run", "mmvet", *judged, "--dry-run")
        assert status == 0
        assert re.search(r"judge +6 ", said)  # requests that are to come, and their cost
        assert not any(seen.model == "judge" for seen in server.log)
        for _ in range(2):
            assert silkie("evaluate", "run", "mmvet", *judged)[0] == 0
        assert len(server.log) == 3 + 6
    score = json.loads((tmp_path / "run" / "mmvet" / "score.json").read_text())
    assert score["official"]["total"] == 10.0
    assert score["official"]["runs"] == [10.0, 10.0]
    assert score["judge"] == {"runs": 2, "models": {"judge-2026-01-01": 6}, "failed": {}}
    # Recorded replies are scored again without anybody to ask.
    replies = tmp_path / "run" / "mmvet" / "replies.jsonl"
    command = [
        "evaluate",
        "score",
        "mmvet",
        tmp_path / "run" / "mmvet" / "answers.jsonl",
        "--replies",
        replies,
        "--json",
    ]
    assert json.loads(silkie(*command)[1])["official"] == score["official"]
