"""Rounds by the command alone: killed at many moments they end with the same bytes; and a policy that judges itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data_prep.run import Run
from silkie_jax.corpus import CorpusReader
from silkie_jax.endpoints.messages import Wire
from tests.data_prep.runs import make_run, write_judge, write_pool
from tests.endpoints.server import Script, Server, digest
from tests.training.support import make_tiny, record, write_corpus

TRAIN = {
    "pair_rule": "best_vs_worst",
    "lora": {"rank": 2, "alpha": 4, "targets": ["c_attn"]},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "batch_rows": 2,
    "steps": 3,
    "max_length": 512,
    "dtype": "float32",
    "remat": "none",
    "evaluation_fraction": 0,
    "evaluate_every": 0,
    "checkpoint_every": 1,
    "log_every": 1,
}
KILLED = Path(__file__).parent / "killed"
"""On the PYTHONPATH of what is to be killed: see `sitecustomize.py` there."""
KILLS = (
    *(("round-01", *moment) for moment in (
        ("iterate", 2), ("take", 1), ("take", 4), ("respond", 1), ("respond", 3), ("respond", 2), ("rate", 1),
        ("rate", 2), ("build", 1), ("build", 5), ("train", 2), ("train", 12),
    )),
    *(("round-02", *moment) for moment in (
        ("take", 2), ("respond", 3), ("respond", 1), ("rate", 2), ("build", 3), ("train", 1), ("train", 6),
        ("train", 20),
    )),
)  # fmt: skip
"""Round, command, and at its how manieth reply (respond, rate) or change of a file it is killed."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=1, vision_layers=1)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """One device; programs that were compiled once are there for all processes."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache}


def write_config(folder: Path, tiny: Path, judge: Path, **changes) -> Path:
    (folder / "train.yaml").write_text(json.dumps(TRAIN))
    config = {
        "start": {"model": str(tiny)},
        "instructions": str(folder / "prompts"),
        "respond": str(folder / "pool"),
        "rate": [str(judge)],
        "train": str(folder / "train.yaml"),
        **changes,
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder / "config.yaml"


def start(config: Path, root: Path, environment, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "silkie_jax.cli", "iterate", str(config), f"run_dir={root}", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(config: Path, root: Path, environment, *options: str) -> str:
    process = start(config, root, environment, *options)
    said, errors = process.communicate()
    assert process.returncode == 0, errors + said
    return said


def results(root: Path) -> dict[str, bytes]:
    """Corpora and adapters, byte by byte, and the table."""
    folders = [*root.glob("round-*/corpus"), *root.glob("round-*/train/adapter")]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in [*files, root / "table.md"]}


class Killer:
    """In the place of what the server says: the same, but where a reply is the one, the asking processes are killed."""

    def __init__(self, reply):
        self.reply, self.left, self.kill = reply, 0, None

    def __call__(self, request):
        said = self.reply(request)
        if self.left and ("<text 1>" in json.dumps(request)) == self.rating:
            self.left -= 1
            if not self.left:
                self.kill()
        return said


@pytest.mark.slow(190)
def test_killed_at_twenty_moments_two_rounds_end_with_the_same_bytes(tmp_path, tiny, environment):
    """Whole groups of processes are killed, as a machine that goes down does, and once the driver alone."""
    make_run(tmp_path / "prompts", 8)
    script = Script(delay=0.1)
    killer = script.reply = Killer(script.reply)
    with Server(script) as server:
        write_pool(tmp_path / "pool", server.url, ("a", "b"), {"models_per_instruction": 2}, concurrency=1, timeout=30)
        judge = write_judge(tmp_path / "judge.yaml", server.url, concurrency=1, timeout=30)
        config = write_config(tmp_path, tiny, judge, rounds=2, take=4)
        finish(config, tmp_path / "expected", environment)
        undisturbed = server.paid()
        assert set(undisturbed.values()) == {1}
        server.forget()

        root = tmp_path / "root"
        assert len(KILLS) == 20
        for number, (part, word, nth) in enumerate(KILLS):
            watched = environment | {"PYTHONPATH": f"{KILLED}{os.pathsep}{environment.get('PYTHONPATH', '')}"}
            if word in ("respond", "rate"):
                killer.left, killer.rating = nth, word == "rate"
            else:
                watched["KILL_AT"] = json.dumps({"word": word, "path": part, "nth": nth})
            process = start(config, root, watched)
            alone = (part, word, nth) == ("round-02", "respond", 1)
            killer.kill = process.kill if alone else partial(os.killpg, process.pid, signal.SIGKILL)
            if alone:  # its command goes on for a while, and holds the lock
                process.wait()
                other = start(config, root, environment, "--plan")
                _, said = other.communicate()
                assert other.returncode == 0 or "or a command that it left, is working on" in said
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, f"{number}: the rounds were done before {part}, {word}"
            if word != "iterate":
                last = said.rpartition("== ")[2]
                assert last.startswith(f"{part.replace('-0', ' ')}, {word}"), f"{number}: {said}"
        finish(config, root, environment)
        paid = server.paid()

    assert results(root) == results(tmp_path / "expected")
    assert paid.keys() == undisturbed.keys()
    lost = set()
    for run in root.glob("round-*/run"):
        with Run.open(run) as opened:
            rows = opened.db.execute(
                "SELECT body FROM requests r JOIN attempts a ON a.request = r.id WHERE a.outcome = 'lost'"
            )
            lost |= {digest(Wire(opened).body(body)) for (body,) in rows}
    assert {key for key, count in paid.items() if count > 1} <= lost, "nothing is asked twice but what was in flight"


@pytest.mark.slow(70)
def test_a_policy_answers_and_judges_itself(tmp_path, tiny, environment):
    """SPA's form: a round on given pairs, then the policy's own answers by its implicit reward against the start."""
    make_run(tmp_path / "prompts", 6)
    write_corpus(tmp_path / "seed", [record(number) for number in range(6)])
    own = {"local": "policy", "dtype": "float32", "samples": 2, "max_tokens": 6, "sampling": {"temperature": 1.0}}
    (tmp_path / "pool").write_text(json.dumps({"models_per_instruction": 1, "models": {"own": own}}))
    judge = {"kind": "implicit", **{side: {"local": side, "dtype": "float32"} for side in ("policy", "start")}}
    (tmp_path / "implicit.yaml").write_text(json.dumps(judge))
    first = {"corpus": str(tmp_path / "seed"), "train": {"steps": 2, "pair_rule": "mean_rating"}}
    config = write_config(tmp_path, tiny, tmp_path / "implicit.yaml", first=first, keep="last")
    root = tmp_path / "root"
    assert "as --until asks" in finish(config, root, environment, "--until", "build")
    assert not (root / "round-01/train").exists()
    said = finish(config, root, environment)
    assert "take" not in said.split("== ", 1)[1].splitlines()[0], "what is done is not done again"
    records = list(CorpusReader(root / "round-01/corpus"))
    rewards = [response.ratings["Implicit reward"] for one in records for response in one.responses]
    assert len(rewards) == 12
    assert any(abs(reward) > 1e-4 for reward in rewards), "round 0 has changed the policy"
    with Run.open(root / "round-01/run") as run:
        (kept,) = {json.dumps(run.settings("pool")["models"]["own"]["adapter"])}
    assert json.loads(kept) == str(root / "round-00/train/adapter")
    assert (root / "round-01/train/adapter").is_dir()
    assert not (root / "round-00/train/adapter").exists(), "keep: last"
    assert len((root / "table.md").read_text().splitlines()) >= 4
    assert "nothing" not in finish(config, root, environment)
