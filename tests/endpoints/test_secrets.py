"""Keys never appear in the database, in logs, errors or what is printed; nothing from the data reaches another file."""

import json
import logging

import pytest

from data_prep.judging.kinds import load_judge
from data_prep.judging.rate import rate
from data_prep.respond import load_pool, respond
from silkie_jax.cli import main
from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from tests.data_prep.runs import agent, make_run, start, write_judge, write_pool
from tests.endpoints.server import Script, Server

KEY = "sk-live-Zq81_opaque/and+long"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SILKIE_TEST_KEY", KEY)


def assert_absent(folder):
    """Neither the key nor a part of it that would do, in any file."""
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert KEY.encode() not in data, path
            assert b"Zq81_opaque" not in data, path


class Echo(Server):
    """Repeats the key wherever a server can: in replies, errors and headers."""

    async def _chat(self, body):
        status, reply, headers = await super()._chat(body)
        if isinstance(reply, dict) and "choices" in reply:
            reply["choices"][0]["message"]["content"] += f" (your key is {KEY})"
            reply["model"] += KEY
            reply["echo"] = KEY
        elif isinstance(reply, dict):
            reply["error"]["message"] += f" Bearer {KEY}"
            reply["error"]["param"] = KEY
        return status, reply, {**headers, "x-key": KEY}

    def _finish(self, batch):
        super()._finish(batch)
        for id, data in self.files.items():
            self.files[id] = data.replace(b"quality", b"quality of " + KEY.encode())


def test_replies_and_errors_that_hold_the_key(tmp_path, key, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    faults = {"400": 0.2, "500": 0.2, "malformed": 0.1}
    with Echo(Script(key=KEY, faults=faults)) as server:
        make_run(tmp_path / "run", 8)
        pool = write_pool(tmp_path / "pool", server.url, api_key_env="SILKIE_TEST_KEY")
        print(respond(tmp_path / "run", pool, Options(1.0)).table())
        print(
            rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url, api_key_env="SILKIE_TEST_KEY")]).table()
        )
        assert any(KEY in headers["authorization"] for headers in server.headers)
    assert_absent(tmp_path)
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())


def test_batches_that_hold_the_key(tmp_path, key):
    with Echo(Script(key=KEY, polls=0)) as server:
        make_run(tmp_path / "run", 4)
        pool = write_pool(tmp_path / "pool", server.url, api_key_env="SILKIE_TEST_KEY")
        respond(tmp_path / "run", pool, Options(batch=True, poll=0.01, progress=False))
    assert_absent(tmp_path)


@pytest.mark.parametrize("batch", [[], ["--batch"]])
def test_a_wrong_key_is_not_repeated(tmp_path, key, batch):
    """OpenAI's own error quotes the key that it was given."""
    with Server(Script(key="another-key-0123456789")) as server:
        make_run(tmp_path / "run", 4)
        pool = write_pool(tmp_path / "pool", server.url, api_key_env="SILKIE_TEST_KEY")
        process = start("respond", tmp_path / "run", "--pool", pool, *batch, stdout=-1)
        out, err = process.communicate()
    assert process.returncode == 1
    assert "check SILKIE_TEST_KEY (HTTP 401: Incorrect API key provided: [key]" in err
    assert KEY not in out + err
    assert_absent(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"api_key": KEY}, "unknown key models.m.api_key; did you mean models.m.api_key_env"),
        ({"api_key_env": KEY}, "models.m.api_key_env must be the name of an environment variable"),
        ({"base_url": f"https://user:{KEY}@example.com/v1"}, "base_url must hold no key"),
        ({"base_url": f"https://example.com/v1?key={KEY}"}, "base_url must hold no key"),
        ({"sampling": {"n": 3}}, "sampling.n is set by models_per_instruction"),
        ({"prompt": "Look!"}, "prompt must hold {prompt} once"),
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"model": ""}, "model must be set"),
        ({"price": {"input": 1}}, "price.output must be set"),
        ({"api_key_env": [KEY]}, "models.m.api_key_env must be a text, not a list"),
        ({"sampling": KEY}, "models.m.sampling must be keys and values, not a text"),
        ({"concurency": 3}, "did you mean models.m.concurrency"),
    ],
)
def test_configurations_are_checked_without_repeating_a_key(tmp_path, changes, words, capsys):
    path = tmp_path / "pool.yaml"
    path.write_text(
        json.dumps({"models_per_instruction": 1, "models": {"m": {**agent("http://127.0.0.1:9/v1", "m"), **changes}}})
    )
    make_run(tmp_path / "run", 1)
    assert main(["corpus", "respond", str(tmp_path / "run"), "--pool", str(path)]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert KEY not in told
    assert "Traceback" not in told


@pytest.mark.parametrize("system", ["${oc.env:SILKIE_TEST_KEY}", "a \\${oc.env:SILKIE_TEST_KEY}", "${model}"])
def test_a_key_does_not_come_in_by_interpolation(tmp_path, key, system):
    path = tmp_path / "pool.yaml"
    models = {"m": agent("http://127.0.0.1:9/v1", "m", system=system)}
    path.write_text(json.dumps({"models_per_instruction": 1, "models": models}))
    with pytest.raises(UserError, match=r"models\.m\.system: interpolation .* is not supported"):
        load_pool(path)


def test_the_configurations_that_come_with_the_project_load(monkeypatch):
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    pool = load_pool(root / "configs/pools/vlfeedback.yaml")
    judge = load_judge(root / "configs/judges/gpt4v.yaml")
    assert pool.models_per_instruction == 4
    assert {judge.agents["gpt-4v"].api_key_env, pool.models["gpt-4v"].api_key_env} == {"OPENAI_API_KEY"}
