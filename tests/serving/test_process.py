"""`silkie serve` as a process: how it starts, ends, is killed and started again, and what memory it holds."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import openai
import pytest

from silkie_jax import cli
from tests.serving.conftest import user

REQUESTS = int(os.environ.get("SILKIE_SERVE_REQUESTS", 400))  # of the test of memory; 5,000 take a few minutes


class Process:
    """`silkie serve MODEL ...`: its standard error goes to a file, since nobody reads it while it serves."""

    def __init__(self, folder, checkpoint, *arguments, environment=None):
        self.errors = folder / f"errors-{len(list(folder.iterdir()))}"
        command = [sys.executable, "-m", "silkie_jax.cli", "serve", str(checkpoint), "--dtype", "float32"]
        command += ["--context", "128", "--slots", "4", "--mesh", "data=1", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ready(self):
        """The URL, once requests are answered."""
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, self.errors.read_text()
        return found[1]

    def memory(self):
        """Bytes that are resident."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait(30)


@pytest.fixture
def start(tmp_path, checkpoint):
    with contextlib.ExitStack() as stack:

        def begin(*arguments, **options):
            made = Process(tmp_path, checkpoint, *arguments, **options)
            stack.callback(made.end)
            return made

        yield begin


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(url, text="Hi", **body):
    body = {"messages": [user(text)], "model": "", "max_tokens": 8, "temperature": 0, **body}
    return client(url).chat.completions.create(**body).choices[0].message.content


@pytest.mark.slow
def test_it_is_killed_and_started_again(start):
    """A kill is one clear error for each client; the next server answers as the first one did."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    first = start("--port", port)
    url = first.ready()
    expected = ask(url)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, url, max_tokens=90, n=4) for _ in range(8)]
        while httpx2.get(f"{url}/health").json()["replies"] < 16:
            time.sleep(0.01)
        first.process.kill()
        errors = [answer.exception(30) for answer in asked]
        assert sum(error is not None for error in errors) >= 4
        assert {type(error) for error in errors} <= {type(None), openai.APIConnectionError}
    second = start("--port", port)
    url = second.ready()
    assert ask(url) == expected
    # And it ends when it is told to, when those who are inside have their replies.
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        last = threads.submit(ask, url, max_tokens=40)
        while not httpx2.get(f"{url}/health").json()["replies"]:
            time.sleep(0.005)
        second.process.send_signal(signal.SIGTERM)
        assert last.result(30)
    assert second.process.wait(30) == 0
    assert "Traceback" not in second.errors.read_text()


@pytest.mark.slow
def test_ctrl_c_and_the_end_of_stdin_end_it(start):
    quick = start("--port", "0")
    quick.ready()
    quick.process.send_signal(signal.SIGINT)
    assert quick.process.wait(30) == 0
    orphan = start("--port", "0", "--end-with-stdin")
    while "loaded" not in orphan.errors.read_text():  # it need not be ready
        time.sleep(0.05)
        assert orphan.process.poll() is None
    orphan.process.stdin.close()
    assert orphan.process.wait(30) == 0
    for server in (quick, orphan):
        assert not re.search("Traceback|Error", server.errors.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_requests_leave_nothing_behind(start):
    """Whole, streamed, sampled, scored, refused and abandoned: after the first ones memory stays as it is."""
    server = start("--port", "0", "--max-pixels", "1000")
    url = server.ready()
    api = client(url)

    def one(number):
        body = {"messages": [user(f"Question {number}?")], "model": "", "max_tokens": 6}
        match number % 8:
            case 0 | 1:
                api.chat.completions.create(**body, temperature=0, n=1 + number % 2)
            case 2 | 3:
                list(api.chat.completions.create(**body, stream=True, logprobs=True, top_logprobs=2))
            case 4:
                texts = {"prompt": f"Question {number}?", "texts": ["Yes.", "No."]}
                assert httpx2.post(f"{url}/v1/logprobs", json=texts, timeout=60).status_code == 200
            case 5:
                with api.chat.completions.create(**{**body, "max_tokens": 80}, stream=True) as stream:
                    next(iter(stream))
            case 6:
                with pytest.raises(openai.BadRequestError):  # an image that is too large
                    api.chat.completions.create(**{**body, "messages": [user("What?", number % 5)]})
            case 7:
                content = b"{" + os.urandom(50_000)
                header = {"content-type": "application/json"}
                assert httpx2.post(f"{url}/v1/chat/completions", content=content, headers=header).status_code == 400

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(160)))
        before = server.memory()
        list(threads.map(one, range(160, 160 + REQUESTS)))
        after = server.memory()
    print(f"memory after 160 requests {before / 2**20:.1f} MiB, after {REQUESTS} more {after / 2**20:.1f} MiB")
    health = httpx2.get(f"{url}/health").json()
    assert health["replies"] == 0
    assert after - before < 24 * 2**20
    assert "Traceback" not in server.errors.read_text()


def test_what_is_missing_can_be_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "silkie_jax.serving.serve")
    assert cli.main(["serve", "model"]) == 1
    assert capsys.readouterr().err == "silkie: serving a model needs uvicorn: pip install 'silkie-jax[serve]'\n"


def test_mistakes_are_one_line(capsys, checkpoint, tmp_path, monkeypatch):
    def said(*arguments):
        assert cli.main(["serve", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}" in said(checkpoint, "--port", port)
    monkeypatch.delenv("SERVE_KEY", raising=False)
    assert "SERVE_KEY is not set" in said(checkpoint, "--api-key-env", "SERVE_KEY", "--port", 0)
    assert "--mesh: 'model=2' is not like fsdp=4" in said(checkpoint, "--mesh", "model=2")
    assert "--queue must be at least 0" in said(checkpoint, "--queue", -1)
    for line in said(tmp_path, "--port", 0).splitlines():
        assert line.startswith("silkie: ")
        assert "qwen.tiktoken" in line
