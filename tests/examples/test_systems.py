"""The related systems on the small world: their files load, and in small they come to their table."""

import base64
import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path
from statistics import mean

import pytest

from data_prep.judging.kinds import load_judge
from data_prep.judging.ratings import parse
from data_prep.judging.rubric import load_rubric
from data_prep.respond import load_pool
from examples.systems.stages import RUNS
from examples.systems.table import FIGURES, TOOK
from examples.world import judge, questions, server
from examples.world.drawing import encode
from examples.world.habits import HABITS
from examples.world.judge import Temper
from examples.world.likeness import likeness
from examples.world.pool import Likeness
from silkie_jax.iteration.config import load_iterate
from silkie_jax.training.config_file import load_config
from tests.examples.test_pool import DESCRIBE, SCENES, lots

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ("vdpo", "spa-train", "sima", "csr-train", "rejection", "steerlm")
HERE = ROOT / "examples" / "systems"


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_load(name):
    config = load_config(HERE / f"{name}.yaml", ["model=m", "corpus=c", "run_dir=r"])
    assert config.lora.rank == 16


def test_pools_judges_and_rounds_load():
    for path in [*HERE.glob("*-pool.yaml"), *HERE.glob("*-judge.yaml")]:
        load = load_pool if path.stem.endswith("pool") else load_judge
        assert load(path)
    for name in ("spa", "csr"):
        rounds = load_iterate(HERE / f"{name}.yaml", ["run_dir=r", "instructions=i"])
        assert rounds.rounds == 2
        assert all((ROOT / path).is_file() for path in (rounds.respond, *rounds.rate, rounds.train))


def described(scene, habit, key=0):
    return HABITS[habit](scene, questions.read(scene, DESCRIBE), lots(key))


def test_the_critic_knows_the_better_one_and_prefers_the_first_of_equals():
    rubric = load_rubric("self_critic")
    right, first = [], []
    for number, scene in enumerate(SCENES):
        true, false = (described(scene, habit, number) for habit in ("faithful", "lost"))
        for texts, best in (((true, false), 0), ((false, true), 1)):
            prompt = rubric.prompt(DESCRIBE, texts, reference=true)
            reply = parse(judge.reply(scene, {}, prompt, lots(number, best)), rubric, texts=2)
            assert reply.kind == "complete"
            right.append(reply.ratings["Preferred"][best] == 1)
        prompt = rubric.prompt(DESCRIBE, (true, true), reference=true)
        first.append(parse(judge.reply(scene, {}, prompt, lots(number)), rubric, texts=2).ratings["Preferred"][0])
    assert 0.75 < mean(right) < 0.95
    assert mean(first) > 0.6


def test_five_attributes_are_rated_from_0_to_4():
    rubric, calm = load_rubric("five_attributes"), Temper(noise=0, length=0, first=0)
    texts = [described(SCENES[0], habit) for habit in ("faithful", "refuser", "dreamer")]
    reply = parse(judge.reply(SCENES[0], {}, rubric.prompt(DESCRIBE, texts), lots(0), calm), rubric, texts=3)
    assert reply.kind == "complete"
    assert set(reply.ratings) == {"Helpfulness", "Correctness", "Coherence", "Complexity", "Verbosity"}
    assert reply.ratings["Correctness"][0] == reply.ratings["Helpfulness"][0] == 4
    assert reply.ratings["Correctness"][2] < 4
    assert reply.ratings["Verbosity"][2] > reply.ratings["Verbosity"][1]


def test_likeness_sees_what_is_there_and_not_where():
    there, elsewhere, invented = [], [], []
    for number, scene in enumerate(SCENES):
        thing = scene.things[0]
        lot = random.Random(number)
        there.append(likeness(scene, questions.sentence(thing), lot))
        elsewhere.append(likeness(scene, f"There is a {thing.size} {thing.name} at the top left.", lot))
        invented.append(likeness(scene, f"There is a {questions.absent(scene)[0]}.", lot))
    assert mean(there) > mean(elsewhere) > mean(invented) + 2
    assert any(a < b for a, b in zip(there, invented, strict=True)), "it errs"


def test_the_server_compares_pictures_and_texts():
    scene, data = SCENES[0], encode(SCENES[0])
    known = Likeness({server.digest(data): scene})
    url = "data:image/png;base64," + base64.b64encode(data).decode()

    def ask(running, pictures):
        body = {"model": "clip", "images": [{"url": one} for one in pictures], "texts": ["A cat.", "A dog."]}
        request = urllib.request.Request(f"{running.url}/similarity", json.dumps(body).encode())
        with urllib.request.urlopen(request) as reply:
            return [one["similarity"] for one in json.load(reply)["data"]]

    with server.Server(server.Script(similarity=known)) as running:
        assert ask(running, [url]) == ask(running, [url])
        assert len(set(ask(running, [url]))) == 2
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(running, [])
    with server.Server(server.Script()) as running, pytest.raises(urllib.error.HTTPError, match="404"):
        ask(running, [url])


def run(folder, environment):
    command = [sys.executable, "-m", "examples.systems", str(folder), "--fast"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.quickstart
def test_in_small_all_come_to_the_table(tmp_path, compiled):
    """It takes the quickstart to its end first; and what is done is not done again."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = compiled
    said = run(tmp_path / "run", environment)
    assert "the quickstart comes first" in said
    table = (tmp_path / "run" / "systems" / "table.md").read_text()
    assert table in said
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    names = ["before", "DPO", "V-DPO", "SPA", "SIMA", "CSR", "rejection sampling", "SteerLM"]
    assert [line[0] for line in lines[2:]] == names
    assert lines[0][1:] == [about for *_, about in FIGURES] + list(TOOK)
    for line in lines[3:]:
        assert all(cell.endswith(")") or cell == "–" for cell in line[1 : 1 + len(FIGURES)]), line
        assert all(float(cell.replace(",", "")) > 0 for cell in line[-2:]), line
    again = run(tmp_path / "run", environment)
    assert "the quickstart comes first" not in again
    assert again.count("(done before)") == 1 + 7 + len(RUNS)
    assert table in again
