"""A model named by its name on the hub: fetched through the hub client, from a real server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.checkpoints.sources import open_source

pytest.importorskip("huggingface_hub", reason="comes with transformers")
ROOT = Path(__file__).resolve().parents[2]
NAME, COMMIT = "Qwen/Qwen-VL-Chat", "0123456789" * 4


@pytest.fixture
def hub(tmp_path):
    """Serves a folder as the hub serves a model; yields (address, folder, names of the files that were fetched)."""
    folder = make_checkpoint(tmp_path / "hub", shards=2)
    (folder / "SimSun.ttf").write_bytes(b"not needed")
    fetched = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            files = sorted(folder.iterdir())
            head = {"Content-Type": "application/json"}
            if path.startswith(f"/api/models/{NAME}/tree/"):
                entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                data = json.dumps(entries).encode()
            elif path.startswith(f"/api/models/{NAME}"):
                names = [{"rfilename": f.name} for f in files]
                data = json.dumps({"id": NAME, "sha": COMMIT, "siblings": names}).encode()
            elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
                data = (folder / path.rsplit("/", 1)[1]).read_bytes()
                head |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                fetched.add(path.rsplit("/", 1)[1])
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), **head}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, fetched
    server.shutdown()
    thread.join()
    server.server_close()


def convert(name, dst, **environment):
    """In a process of its own: the hub client reads its settings when it is imported."""
    code = "import sys; from silkie_jax.checkpoints.convert import convert; convert(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, name, dst]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def test_a_model_is_fetched_and_then_found_without_a_network(hub, tmp_path):
    address, folder, fetched = hub
    done = convert(NAME, tmp_path / "out", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert open_source(tmp_path / "out").config == open_source(folder).config
    assert fetched == {f.name for f in folder.iterdir()} - {"SimSun.ttf"}
    fetched.clear()
    done = convert(NAME, tmp_path / "again", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert open_source(tmp_path / "again").config == open_source(folder).config
    assert not fetched


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    done = convert("Qwen/Other", tmp_path / "out", HF_ENDPOINT=hub[0], HF_HOME=str(tmp_path / "cache"))
    assert "UserError: Qwen/Other: no such folder, and the hub does not give it (" in done.stderr.splitlines()[-1]


def test_no_network(tmp_path):
    done = convert(NAME, tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"))
    assert f"UserError: {NAME}: no such folder, and the hub does not give it (" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
