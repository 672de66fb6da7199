"""Every command that README and docs print runs as it is printed, page by page, on a small model and small data.

The names that pages use ("Qwen/Qwen-VL-Chat", "vlfeedback_80k.jsonl", ...) are small things in the folder where the
commands run. SMALLER is appended to some, so that training takes three steps and a reply eight tokens.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from examples import quickstart
from examples.road import Road
from examples.tiny_qwen_vl import make_checkpoint
from examples.tiny_vlfeedback import make_rows
from examples.world import server
from examples.world.make import make_world
from examples.world.pool import Pool, read_truth, write_configs
from silkie_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
TASKS = "tasks=existence,count,position,color,OCR"
SMALLER = {
    "train": "steps=4 epochs=null batch_rows=8 accumulate=1 batch_pairs=null dtype=float32 remat=none log_every=1 "
    "checkpoint_every=2 max_length=480 max_prompt_length=400 evaluate_every=0 evaluation_fraction=0 workers=1",
    "reference": "max_length=480 max_prompt_length=400 dtype=float32",
    "score": "--max-length 480",
    "chat": "--max-new-tokens 8",
    "evaluate run": f"--max-new-tokens 8 --limit 4 --set {TASKS}",
    "evaluate answer": f"--max-new-tokens 8 --limit 4 --set {TASKS}",
}
HERE = {
    "/data/benchmarks": "benchmarks",
    "--step 200": "--step 2",
    "--count 2000 --skip 2000": "--count 1 --skip 1",
    "--count 2000": "--count 1",
    "rows.jsonl runs/mine": "rows.jsonl runs/other",  # pages show other ways beside the first, for which room is made
    "corpora/mine --evaluation": "corpora/other --evaluation",
}
"""What a page says -> what it is here."""
ELSEWHERE = {
    "silkie compile": "make test-compile",
    "--coordinator": "make test-hosts",
    "--runner beam": "needs extra packages; tests/data_prep/corpora",
    "configs/sources/vlfeedback.yaml": "reads nine data sets; tests/data_prep/instructions",
    "mmhal": "tests/evaluation/test_mmhal.py: its data are not ours to make",
    "mmvet": "tests/evaluation/test_mmvet.py",
    "/data/others": "tests/evaluation/test_mme.py",
    "--endpoint": "tests/evaluation/test_endpoint.py",
    "silkie iterate": "tests/iteration",
    "configs/systems": "tests/training/test_systems.py",
    "steerlm": "tests/training/test_systems.py",
    "allava": "tests/data_prep/test_synthesize.py",
    "--image-pairs": "tests/data_prep/tables: a pair of images has a form of its own",
    "runs/quickstart": "the quickstart itself; test_the_quickstarts_page_shows_what_it_runs",
    "runs/world": "the quickstart itself; tests/examples",
}
"""What is run somewhere else, and where."""
PAGES = ["README.md", "docs/convert.md", "docs/corpus.md", "docs/train.md", "docs/scale.md"]
PAGES += ["docs/score-and-chat.md", "docs/serve.md", "docs/data-prep.md", "docs/evaluation.md"]


def commands(page: str) -> list[str]:
    """Indented lines that begin with `silkie`, but for those that give a command's form."""
    lines = [line.strip() for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    shown = [line for line in lines if line.startswith("silkie ")]
    return [line for line in shown if not re.search(r"\[|\b(SRC|MODEL|CORPUS|CONFIG|RUN|DIR)\b", line)]


def elsewhere(command: str) -> bool:
    return any(part in command for part in ELSEWHERE)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which everything that the pages name lies, in small."""
    folder = tmp_path_factory.mktemp("desk")
    make_checkpoint(folder / "Qwen" / "Qwen-VL-Chat", seq_length=480)
    rows = make_rows(folder / "vlfeedback", 16)
    shutil.copy(rows, folder / "vlfeedback_80k.jsonl")
    pictures = sorted((folder / "vlfeedback" / "merged_images").iterdir())
    with zipfile.ZipFile(folder / "merged_images.zip", "w") as archive:
        for picture in pictures:
            archive.write(picture, f"merged_images/{picture.name}")
    (folder / "images").mkdir()
    for name in ("photo.jpg", "a.png", "b.png", "images/one.png"):
        shutil.copy(next(p for p in pictures if p.suffix == Path(name).suffix), folder / name)
    pair = {"image": "one.png", "prompt": "What is this?", "chosen": "A shape.", "rejected": "A dog."}
    for name in ("pairs.jsonl", "rlhfv.jsonl"):
        lines = [json.dumps(pair | {"id": str(n), "prompt": f"What is this, {n}?"}) for n in range(8)]
        (folder / name).write_text("\n".join(lines))
    world = make_world(folder / "world", 8, held_out=3)
    shutil.copytree(world / "evaluation", folder / "benchmarks")
    (folder / "photos").mkdir()
    shown = sorted((world / "images").iterdir())
    for number, picture in enumerate(shown[:4]):
        shutil.copy(picture, folder / "photos" / f"{number or 'beach'}{picture.suffix}")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for picture in shown:
            archive.write(picture, f"images/{picture.name}")
    shutil.copy(world / "instructions.jsonl", folder / "rows.jsonl")
    shutil.copytree(ROOT / "configs", folder / "configs")
    script = server.Script(reply=Pool(read_truth(world)))
    with server.Server(script, 0) as served:
        pool, judge = write_configs(folder / "served", served.url)
        shutil.copy(pool, folder / "configs" / "pools" / "vlfeedback.yaml")
        shutil.copy(judge, folder / "configs" / "judges" / "gpt4v.yaml")
        yield folder


def smaller(command: str) -> list[str]:
    """The words of a command, with what makes it small."""
    for said, here in HERE.items():
        command = command.replace(said, here)
    words = shlex.split(command)[1:]
    verb = next((verb for verb in SMALLER if words[: len(verb.split())] == verb.split()), None)
    return words + (shlex.split(SMALLER[verb]) if verb else [])


def serve(folder: Path, command: str) -> None:
    """A server that comes up, names its model and ends when it is interrupted."""
    words = [*shlex.split(command)[1:], "--dtype", "float32"]
    words += ["--port", "0"] if "--port" not in words else []
    words[words.index("--port") + 1] = "0"
    process = subprocess.Popen(
        [sys.executable, "-m", "silkie_jax.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    try:
        for line in process.stdout:
            said += line
            if url := re.search(r"http://\S+", line):
                with urllib.request.urlopen(f"{url[0].rstrip('/').removesuffix('/v1')}/v1/models", timeout=60) as reply:
                    assert json.load(reply)["data"]
                break
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode in (0, 130), said


@pytest.mark.slow(200)
def test_commands_run_as_they_are_printed(desk, monkeypatch):
    """In the order of PAGES: later ones use what earlier ones made. What was run once is not run again."""
    monkeypatch.chdir(desk)
    done = set()
    for page in PAGES:
        for command in commands(page):
            if command in done or elsewhere(command):
                continue
            done.add(command)
            if command.startswith("silkie serve"):
                serve(desk, command)
            else:
                status = main(smaller(command))
                assert status == 0, f"{page}: {command}"
    assert len(done) > 30


def test_no_page_is_forgotten():
    """Every command of the others is one of theirs, or is run elsewhere."""
    known = {command for page in PAGES for command in commands(page)}
    for path in sorted((ROOT / "docs").glob("*.md")):
        forgotten = [one for one in commands(f"docs/{path.name}") if one not in known and not elsewhere(one)]
        assert not forgotten, path.name


class Recorder(Road[quickstart.Sizes]):
    """Shows commands and runs none."""

    def __init__(self, folder: Path):
        super().__init__("quickstart", folder, 0, quickstart.Sizes())
        self.shown: list[str] = []

    def stage(self, name, about, work):
        work()

    def show_and_run(self, shown, program, arguments):
        self.shown.append(shlex.join([*shown.split(), *map(str, arguments)]))


def test_the_quickstarts_page_shows_what_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    road = Recorder(tmp_path / "runs" / "quickstart")
    monkeypatch.setattr(quickstart, "table", lambda folder: "")
    monkeypatch.setattr(quickstart, "chat", lambda road: None)
    monkeypatch.setattr(quickstart, "pool_of", lambda world, seed: nullcontext("http://127.0.0.1/v1"))
    monkeypatch.setattr(quickstart, "write_configs", lambda folder, url: (folder / "pool.yaml", folder / "judge.yaml"))
    quickstart.take(road)
    ran = [set(shlex.split(line)) for line in road.shown]
    for command in commands("docs/quickstart.md"):
        words = {word.replace("runs/quickstart", str(road.folder)) for word in shlex.split(command)}
        assert any(words <= line for line in ran), command
