"""A corpus by commands alone, against a real server with faults; and again with SIGKILL at twenty random moments."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.run import Run
from silkie_jax.cli import main
from silkie_jax.corpus.reader import CorpusReader
from silkie_jax.endpoints.messages import Wire
from tests.data_prep.runs import start, write_judge, write_pool
from tests.endpoints.server import Script, Server, digest

FAULTS = {"429": 0.03, "429-retry-after": 0.02, "500": 0.02, "reset": 0.02, "malformed": 0.02, "empty": 0.02,
          "refusal": 0.02, "truncated": 0.02, "content_filter": 0.01, "400": 0.01, "unparsable": 0.02}  # fmt: skip


def write_rows(folder: Path, count: int) -> Path:
    """Rows with pictures that no hash takes for each other."""
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for n in range(count):
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.NEAREST).save(folder / "images" / f"{n}.jpg", quality=80)
    rows = [
        {"id": f"row{n}", "image": f"images/{n}.jpg", "prompt": f"What is in picture {n}, and where?"}
        for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def silkie(*arguments: object) -> None:
    assert main(["corpus", *map(str, arguments)]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_hundred_instructions_by_commands_alone(tmp_path, capsys):
    rows = write_rows(tmp_path / "data", 200)
    with Server(Script(faults=FAULTS, batch_faults={"error-line": 0.05, "no-line": 0.05, "expired": (1,)})) as server:
        pool = write_pool(tmp_path / "pool.yaml", server.url)
        judge = write_judge(tmp_path / "judge.yaml", server.url)
        run, corpus = tmp_path / "run", tmp_path / "corpus"
        silkie("instructions", rows, run)
        silkie("respond", run, "--pool", pool, "--dry-run")
        silkie("respond", run, "--pool", pool, "--budget", "5USD")
        silkie("rate", run, "--judge", judge, "--batch", "--poll", "0.05", "--budget", "5USD")
        silkie("build", run, corpus)
        silkie("report", corpus, "--run", run)
    records = list(CorpusReader(corpus))
    assert len(records) == 200
    assert sum(len(record.responses) == 4 for record in records) > 170
    rated = [all(r.ratings["Helpfulness"] >= 1 for r in record.responses) for record in records]
    assert sum(rated) > 180
    assert (corpus / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path):
    """The same corpus byte by byte, and nothing is paid twice but what was in flight at a kill."""
    lots = random.Random(0)
    rows = write_rows(tmp_path / "data", 60)
    with Server(Script(delay=0.02, faults={"429-retry-after": 0.02, "500": 0.02}, polls=2)) as server:
        pool = write_pool(tmp_path / "pool", server.url, concurrency=3)
        live, batched = (
            write_judge(
                tmp_path / name,
                server.url,
                {"name": name},
                batch_lines=20,
                concurrency=6,
                sampling={"user": name},  # their requests are never the same
            )
            for name in ("live", "batched")
        )

        def commands(run: Path, corpus: Path) -> list[tuple[int, list[object]]]:
            """Each with the number of kills that it is to survive."""
            return [
                (0, ["instructions", rows, run]),
                (6, ["respond", run, "--pool", pool]),
                (4, ["rate", run, "--judge", live]),
                (5, ["rate", run, "--judge", batched, "--batch", "--poll", "0.1"]),
                (5, ["build", run, corpus, "--shards", 20, "--workers", 2]),
            ]

        for _, command in commands(tmp_path / "whole", tmp_path / "expected"):
            silkie(*command)
        undisturbed = server.paid()
        assert set(undisturbed.values()) == {1}
        server.forget()

        killed = 0
        for kills, command in commands(tmp_path / "run", tmp_path / "corpus"):
            building = "build" in command
            if building:  # also in place of those that came too late before
                kills = 20 - killed
            while kills:
                process = start(*command)
                aim, hits = lots.randint(1, 40 if "respond" in command else 8), server.hits
                last = time.monotonic()
                while process.poll() is None and server.hits < hits + aim:
                    if building and list((tmp_path / "corpus").glob(".building/*")):
                        break
                    assert time.monotonic() < last + 60
                    time.sleep(0.002)
                time.sleep(lots.uniform(0, 0.05))
                if process.poll() is not None:  # it was done before
                    process.communicate()
                    if not building:
                        break
                    shutil.rmtree(tmp_path / "corpus")  # a build costs nothing: once more
                    continue
                process.kill()
                process.communicate()
                killed, kills = killed + 1, kills - 1
            process = start(*command)
            _, told = process.communicate()
            assert process.returncode == 0, told
        assert killed == 20

    assert contents(tmp_path / "corpus") == contents(tmp_path / "expected")
    with Run.open(tmp_path / "run") as run:
        wire = Wire(run)
        lost = {
            digest(wire.body(body))
            for (body,) in run.db.execute(
                "SELECT body FROM requests r JOIN attempts a ON a.request = r.id WHERE a.outcome = 'lost'"
            )
        }
    paid = server.paid()
    assert paid.keys() == undisturbed.keys()
    repeated = {key for key, count in paid.items() if count > 1}
    assert repeated <= lost
    assert not [seen for seen in server.log if seen.batch and paid[seen.key] > 1]
