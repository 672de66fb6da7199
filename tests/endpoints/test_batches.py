"""The Batch API over a real connection: split files, lines in any order, expiry, a kill after every step."""

import time

import openai
import pytest

from data_prep.judging.rate import rate
from data_prep.respond import respond
from data_prep.run import Instruction, Run
from silkie_jax.cli import main
from silkie_jax.endpoints.batches import BatchLane
from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from tests.data_prep.runs import MODELS, QUIET, cents, everything, make_run, picture, start, write_judge, write_pool
from tests.endpoints.server import Script, Server

BATCH = Options(batch=True, poll=0.02, progress=False)
ONE = {"models_per_instruction": 1}


def live(tmp_path, count):
    with Server() as server:
        make_run(tmp_path / "live", count)
        respond(tmp_path / "live", write_pool(tmp_path / "live.pool", server.url), QUIET)
        rate(tmp_path / "live", [write_judge(tmp_path / "live.judge", server.url)], QUIET)
    return everything(tmp_path / "live")


def test_batches_give_what_live_requests_give_at_half_the_price(tmp_path):
    expected = live(tmp_path, 15)
    with Server() as server:
        make_run(tmp_path / "run", 15)
        respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url, batch_lines=4), BATCH)
        outcome = rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url, batch_lines=4)], BATCH)
        assert not [seen for seen in server.log if seen.batch is None]
        assert max(len(server.files[b["input_file_id"]].splitlines()) for b in server.batches.values()) == 4
    assert everything(tmp_path / "run") == expected
    assert outcome.spent == pytest.approx(cents(server) / 2)
    assert set(server.paid().values()) == {1}
    assert not list((tmp_path / "run" / "batches").iterdir())


def test_looks_at_a_batch_lie_apart(tmp_path, capsys):
    make_run(tmp_path / "run", 1)
    pool = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1")
    assert main(["corpus", "respond", str(tmp_path / "run"), "--pool", str(pool), "--batch", "--poll", "0"]) == 1
    assert "--poll: 0 is not a positive number of seconds" in capsys.readouterr().err


def test_files_are_split_by_size(tmp_path):
    with Server() as server:
        make_run(tmp_path / "run", 20)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE, batch_bytes=2000)
        respond(tmp_path / "run", pool, BATCH)
        sizes = [len(server.files[b["input_file_id"]]) for b in server.batches.values()]
    assert len(sizes) > 3
    assert max(sizes) <= 2000


def test_faults_of_batches(tmp_path):
    """Lines that failed or are missing, and a batch that expired half done: all are asked again, none twice."""
    expected = live(tmp_path, 15)
    with Server(Script(batch_faults={"error-line": 0.2, "no-line": 0.2, "expired": (1, 3)})) as server:
        make_run(tmp_path / "run", 15)
        responded = respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url), BATCH)
        rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], BATCH)
    assert everything(tmp_path / "run") == expected
    assert {"server_error", "expired"} <= responded.attempts.keys()
    assert set(server.paid().values()) == {1}


def test_a_refused_batch_stops_and_costs_nothing(tmp_path):
    with Server(Script(batch_faults={"failed": (0,)})) as server:
        make_run(tmp_path / "run", 5)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE)
        with pytest.raises(UserError, match=r"batch batch_0 was refused \(the file has an error\)"):
            respond(tmp_path / "run", pool, BATCH)
        with Run.open(tmp_path / "run") as run:
            assert run.spent() == 0
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 5}


def test_an_endpoint_without_a_batch_api(tmp_path, monkeypatch):
    route = Server._route

    async def chat_alone(self, method, path, headers, body):
        return await route(self, method, path if "chat" in path else "/elsewhere", headers, body)

    monkeypatch.setattr(Server, "_route", chat_alone)
    with Server() as server:
        make_run(tmp_path / "run", 3)
        with pytest.raises(UserError, match=r"m0: its endpoint has no Batch API \(set batch: false for it\)"):
            respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url, ("m0",), ONE), BATCH)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE, batch=False)
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 3}
    assert set(server.paid().values()) == {1}
    assert not list((tmp_path / "run" / "batches").iterdir())


def test_what_a_batch_holds_is_not_sent_in_another_way(tmp_path):
    script = Script(polls=10**9)
    with Server(script) as server:
        make_run(tmp_path / "run", 3)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE)
        process = start("respond", tmp_path / "run", "--pool", pool, "--batch", "--poll", "0.05")
        while sum(batch["looks"] for batch in server.batches.values()) < 2:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        write_pool(pool, server.url, ("m0",), ONE, batch=False)
        with pytest.raises(UserError, match="wait in batches: leave out batch: false"):
            respond(tmp_path / "run", pool, BATCH)
        assert not server.paid()


def test_too_much_at_once_is_sent_in_smaller_files(tmp_path, monkeypatch):
    finish = Server._finish

    def at_most_five_lines(self, batch):
        finish(self, batch)
        if batch["status"] == "failed":
            batch["errors"]["data"][0]["code"] = "token_limit_exceeded"

    monkeypatch.setattr(Server, "_finish", at_most_five_lines)
    with Server(Script(most_lines=5)) as server:
        make_run(tmp_path / "run", 12)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE, batch_lines=12)
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 12}
    assert set(server.paid().values()) == {1}


def test_another_process_collects(tmp_path):
    """Interrupted while batches are at work; live requests leave those lines alone; a later command collects them."""
    script = Script(polls=10**9)
    with Server(script) as server:
        make_run(tmp_path / "run", 10)
        pool = write_pool(tmp_path / "pool", server.url)
        process = start("respond", tmp_path / "run", "--pool", pool, "--batch", "--poll", "0.05")
        while sum(batch["looks"] for batch in server.batches.values()) < 8:
            time.sleep(0.02)
        process.kill()
        process.wait()
        with pytest.raises(UserError, match="wait in batches: add --batch"):
            respond(tmp_path / "run", pool, QUIET)
        with Run.open(tmp_path / "run") as run:
            assert run.spent() > 0  # what is at work counts at its bound
        script.polls = 0
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 40}
        assert len(server.batches) == 6
        assert set(server.paid().values()) == {1}
        with Run.open(tmp_path / "run") as run:
            assert run.spent() == pytest.approx(cents(server) / 2)


class Killed(BaseException):
    """Stands for a kill at one place within this process."""


@pytest.mark.parametrize("place", ["upload", "submitted", "collecting"])
def test_every_step_can_be_the_last(tmp_path, monkeypatch, place):
    """A kill after the upload, after the submission before its id is stored, and halfway through the replies."""
    with Server() as server:
        make_run(tmp_path / "run", 10)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE)
        with monkeypatch.context() as patch:
            if place == "collecting":
                settle, calls = BatchLane._settle, []

                def fifth(self, *args):
                    calls.append(1)
                    if len(calls) == 5:
                        raise Killed
                    return settle(self, *args)

                patch.setattr(BatchLane, "_settle", fifth)
                patch.setattr("silkie_jax.endpoints.batches._LINES_AT_ONCE", 2)
            else:
                resource = openai.resources.files.AsyncFiles if place == "upload" else openai.resources.AsyncBatches
                create = resource.create

                async def then_die(self, **options):
                    await create(self, **options)
                    raise Killed

                patch.setattr(resource, "create", then_die)
            with pytest.raises(Killed):
                respond(tmp_path / "run", pool, BATCH)
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 10}
        assert len(server.batches) == 1
        assert set(server.paid().values()) == {1}
        assert len(server.files) == (3 if place == "upload" else 2)


def test_a_budget_holds_for_batches(tmp_path):
    with Server() as server:
        make_run(tmp_path / "run", 60)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE, batch_lines=10)
        limit = 0.04
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, Options(limit, batch=True, poll=0.02, progress=False))
        assert limit * 0.8 < cents(server) / 2 <= limit
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 60}
        assert set(server.paid().values()) == {1}


def test_agents_without_a_batch_api_are_asked_live(tmp_path):
    with Server() as server:
        make_run(tmp_path / "run", 6)
        assert respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url, batch=False), BATCH).states == {
            "ok": 24
        }
        assert not server.batches


@pytest.mark.parametrize("models", [1, 6])
def test_a_budget_holds_where_images_cost_more_than_estimated(tmp_path, models):
    """85 tokens each where the pool says 1: all bounds of the input are a third of the bill."""
    with Server() as server:
        make_run(tmp_path / "run", 120 // models)
        price = {"input": 10.0, "output": 0.0}
        names = MODELS[:models]
        pool = write_pool(
            tmp_path / "pool", server.url, names, {"models_per_instruction": models}, image_tokens=1, price=price
        )
        limit = 0.03  # half of what all of it will cost, and more than all bounds together
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, Options(limit, batch=True, poll=0.02, progress=False))
        assert limit * 0.8 < cents(server, (10.0, 0.0)) / 2 <= limit
        assert len(server.batches) <= 4 * models
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 120}
    assert set(server.paid().values()) == {1}


def test_the_first_file_stands_for_all_requests(tmp_path):
    """The last quarter of the instructions shows four images each, all of which cost more than estimated."""
    with Server() as server:
        with Run.create(tmp_path / "run") as run:
            with run.transaction():
                shown = [[run.add_image(picture(4 * n + k)) for k in range(1 if n < 90 else 4)] for n in range(120)]
            asked = [Instruction(f"i{n}", f"What is in picture {n}?", tuple(shown[n])) for n in range(120)]
            run.write_instructions(asked, {"of": "a test"})
        price = {"input": 10.0, "output": 0.0}
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE, image_tokens=1, price=price)
        limit = 0.08
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, Options(limit, batch=True, poll=0.02, progress=False))
        assert cents(server, (10.0, 0.0)) / 2 <= limit


def test_agents_that_compose_at_once_share_the_budget(tmp_path, monkeypatch):
    """Files of hundreds of lines are composed turn by turn; each counts what the others have taken."""
    monkeypatch.setattr("silkie_jax.endpoints.batches._CONFIRMED", 0)
    with Server() as server:
        make_run(tmp_path / "run", 250)
        price = {"input": 10.0, "output": 0.0}
        pool = write_pool(tmp_path / "pool", server.url, ("m0", "m1"), {"models_per_instruction": 2}, price=price)
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, Options(0.12, batch=True, poll=0.02, progress=False))
        assert 0.12 * 0.8 < cents(server, (10.0, 0.0)) / 2 <= 0.12


def test_known_bills_need_no_small_file(tmp_path):
    with Server() as server:
        make_run(tmp_path / "run", 40)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), ONE)
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, Options(0.02, batch=True, poll=0.02, progress=False))
        before = len(server.batches)
        respond(tmp_path / "run", pool, Options(1.0, batch=True, poll=0.02, progress=False))
        assert len(server.batches) - before == 1


def leave_in_a_batch(folder, server):
    """A run whose five requests wait in a batch, after a kill; returns its pool."""
    make_run(folder / "run", 5)
    pool = write_pool(folder / "pool", server.url, ("m0",), ONE)
    process = start("respond", folder / "run", "--pool", pool, "--batch", "--poll", "0.05")
    while not any(batch["looks"] for batch in server.batches.values()):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return pool


@pytest.mark.parametrize("deleted", ["batch", "replies"])
def test_what_the_server_has_deleted_is_sent_again_after_a_word(tmp_path, capfd, deleted):
    script = Script(polls=10**9)
    with Server(script) as server:
        pool = leave_in_a_batch(tmp_path, server)
        script.polls = 0
        if deleted == "batch":
            server.batches.clear()
        else:
            server._look_at("batch_0")
            del server.files[server.batches["batch_0"]["output_file_id"]]
        with pytest.raises(UserError, match=r"does not know batch batch_0, or has deleted .* its 5 requests are sent"):
            respond(tmp_path / "run", pool, BATCH)
        with Run.open(tmp_path / "run") as run:
            bound = run.spent()
        assert bound > 0
        assert len(server.batches) == (0 if deleted == "batch" else 1)  # nothing is sent before the user has heard
        assert respond(tmp_path / "run", pool, BATCH).states == {"ok": 5}
        assert "batch batch_0 is still not there: its 5 requests are open again" in capfd.readouterr().err
        with Run.open(tmp_path / "run") as run:
            assert run.spent() == pytest.approx(bound + run.spending()[0].cost)  # it may have been paid


def test_a_batch_that_was_missing_under_another_key_is_collected(tmp_path):
    script = Script(polls=10**9)
    with Server(script) as server:
        pool = leave_in_a_batch(tmp_path, server)
        with Server() as elsewhere, pytest.raises(UserError, match="check that key and base_url"):
            respond(tmp_path / "run", write_pool(pool, elsewhere.url, ("m0",), ONE), BATCH)
        script.polls = 2
        assert respond(tmp_path / "run", write_pool(pool, server.url, ("m0",), ONE), BATCH).states == {"ok": 5}
    assert set(server.paid().values()) == {1}
    assert len(server.batches) == 1
