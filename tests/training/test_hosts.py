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


def start_two(folder: Path, run: str, devices: int = 4, **others) -> list[subprocess.Popen]:
    """Two processes of so many devices each; `second` holds values that the second one has instead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--coordinator", address, "--processes", "2", "--process"]
    second = others.pop("second", {})
    each = [others, others | second]
    return [start(folder, run, devices, [*hosts, str(k)], **values) for k, values in enumerate(each)]


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


# One host alone finds something: all of them end, and at once


ALONE = 45  # seconds in which all must end: JAX takes a host for dead after a minute of silence
ONE_EACH = {"mesh.data": 2, "mesh.fsdp": 1, "mesh.tensor": 1}  # a device each


def last_words(*processes: subprocess.Popen, status: int) -> list[str]:
    """What each said last of its own (Gloo writes late); all must end soon after the first one."""
    began = None
    while any(process.poll() is None for process in processes):
        if began is None and any(process.poll() is not None for process in processes):
            began = time.monotonic()
        assert began is None or time.monotonic() - began < ALONE
        time.sleep(0.1)
    said = [printed.splitlines() for printed in finish(*processes, status=status)]
    return [next(line for line in reversed(lines) if line.startswith("silkie: ")) for lines in said]


def test_a_host_that_does_not_find_its_corpus_stops_all(folder):
    first, second = last_words(
        *start_two(folder, "lost", 1, **ONE_EACH, second={"corpus": folder / "nowhere"}), status=1
    )
    assert second.startswith("silkie: ")
    assert str(folder / "nowhere") in second
    assert first == f"silkie: host 1 stopped: {second.removeprefix('silkie: ')}"


def test_a_host_that_cannot_read_its_configuration_stops_all(folder):
    first, second = last_words(*start_two(folder, "unread", 1, **ONE_EACH, second={"batch_rows": 0}), status=1)
    assert "batch_rows must be at least 1, not 0" in second
    assert first == f"silkie: host 1 stopped: {second.removeprefix('silkie: ')}"


def test_all_hosts_leave_a_run_that_the_first_finds_finished(folder, one):
    printed = finish(*start_two(folder, one, 1, **ONE_EACH, second={"run_dir": folder / "of its own"}))
    assert f"all {STEPS} steps of this run were done before" in printed[0]
    assert not (folder / "of its own" / "adapter").exists()


def test_a_first_host_that_cannot_write_the_result_stops_all(folder):
    """All weights are trained: the others gather what it would have written."""
    (folder / "blocked").mkdir()
    (folder / "blocked" / "model").write_text("in the way")
    values = ONE_EACH | {"lora": "null", "steps": 1}
    first, second = last_words(*start_two(folder, "blocked", 1, **values), status=1)
    assert str(folder / "blocked" / "model") in first
    assert second == f"silkie: host 0 stopped: {first.removeprefix('silkie: ')}"


def test_a_stop_of_one_host_stops_all_at_the_same_place(folder):
    """Most often in an evaluation: they take most of the time, three batches after every step."""
    values = {"steps": 5000, "evaluate_every": 1, "evaluation_fraction": 0.5, "checkpoint_every": 1000}
    processes = start_two(folder, "stopped", 1, **ONE_EACH, **values, batch_rows=1)
    log, deadline = folder / "stopped" / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, second = last_words(*processes, status=130)
    assert first == second
    step = int(first.removeprefix("silkie: stopped after step ").split()[0])
    assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == [str(step)]


def test_hosts_need_their_numbers(folder):
    wrong = start(folder, "wrong", 1, ["--coordinator", "127.0.0.1:1"])
    (printed,) = finish(wrong, status=1)
    assert printed.strip().splitlines()[-1] == (
        "silkie: --coordinator needs --processes N and --process K with 0 <= K < N"
    )
