"""Several processes train as one, each with its own devices; real processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.training.support import make_tiny, read_lines, record, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.hosts]

STEPS = 4
QUICK = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint and a corpus of six instructions, two with an image."""
    folder = tmp_path_factory.mktemp("hosts")
    make_tiny(folder / "model")
    write_corpus(folder / "corpus", [record(n, images=int(n < 2)) for n in range(6)])
    return folder


def overrides(folder: Path, run: str, **others) -> list[str]:
    given = {
        "model": folder / "model",
        "corpus": folder / "corpus",
        "run_dir": folder / run,
        "dtype": "float32",
        "batch_rows": 4,
        "steps": STEPS,
        "optimizer.learning_rate": 1e-3,
        "lora.rank": 4,
        "evaluation_fraction": 0,
        "checkpoint_every": 1,
        "log_every": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    return [f"{key}={value}" for key, value in (given | others).items()]


def start(folder: Path, run: str, devices: int, hosts: list[str] = (), **others) -> subprocess.Popen:
    config = folder / "empty.yaml"
    config.write_text("{}")
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "silkie_jax.cli", "train", config, *overrides(folder, run, **others), *hosts]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(folder: Path, run: str, **others) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--coordinator", address, "--processes", "2", "--process"]
    return [start(folder, run, 4, [*hosts, str(k)], **others) for k in range(2)]


def finish(*processes: subprocess.Popen, status: int = 0) -> list[str]:
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(printed)
    return printed


def metrics(folder: Path, run: str) -> list[dict[str, float]]:
    rates = ("_per_second", "step_seconds", "input_wait", "memory_gib")
    lines = read_lines(folder / run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(rates)} for line in lines]


def assert_same_run(folder: Path, run: str, other: str) -> None:
    ours, expected = metrics(folder, run), metrics(folder, other)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, same in zip(ours, expected, strict=True):
        assert line == pytest.approx(same, rel=1e-4, abs=1e-5)
    adapters = [load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in (run, other)]
    for name, array in adapters[0].items():
        assert array == pytest.approx(adapters[1][name], rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def one(folder):
    """The run of one process with eight devices."""
    finish(start(folder, "one", 8))
    return "one"


def test_two_processes_of_four_devices_train_as_one_of_eight(folder, one):
    finish(*start_two(folder, "two"))
    assert_same_run(folder, "two", one)


def test_a_killed_host_stops_the_others_and_the_run_continues_on_one(folder, one):
    processes = start_two(folder, "killed")
    log, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    printed, _ = processes[0].communicate(timeout=200)
    if processes[0].returncode == 0:  # it had finished before it could notice
        pytest.skip("the run ended before the host was killed; nothing to see on so fast a machine")
    assert time.monotonic() - began < 150
    assert printed.strip()
    processes[1].communicate()
    finish(start(folder, "killed", 8))
    assert_same_run(folder, "killed", one)


def test_hosts_need_their_numbers(folder):
    wrong = start(folder, "wrong", 1, ["--coordinator", "127.0.0.1:1"])
    (printed,) = finish(wrong, status=1)
    assert printed.strip().splitlines()[-1] == (
        "silkie: --coordinator needs --processes N and --process K with 0 <= K < N"
    )
