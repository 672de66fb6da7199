"""How processes find each other, without any."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from silkie_jax.errors import UserError
from silkie_jax.hardware.distributed import StopRequest, start, together

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "4"}


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, []),  # one task a node has all of the node's GPUs
        (SLURM | {"SLURM_NTASKS": "32", "SLURM_STEP_NUM_TASKS": "32"}, None),  # eight a node: JAX gives each one
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
    ],
)
def test_one_process_a_host_has_all_devices_of_the_host(monkeypatch, variables, devices):
    seen = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *places, **named: seen.update(named))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start()
    assert seen["local_device_ids"] == devices


def test_a_process_alone_joins_nobody(monkeypatch):
    def never(*places, **named):
        raise AssertionError("joined")

    monkeypatch.setattr(jax.distributed, "initialize", never)
    start()


# Failing together (with real processes: tests/training/test_hosts.py)


@pytest.fixture
def two(monkeypatch):
    """This is host 0 of two: what it tells the other, and what the other tells it."""
    said = {"own": [], "other": ""}

    def gather(own):
        said["own"].append(own.tobytes().rstrip(b"\0").decode())
        return np.stack([own, np.frombuffer(said["other"].encode().ljust(len(own), b"\0"), np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    return said


def test_hosts_that_do_not_fail_go_on(two):
    with together():
        pass
    assert two["own"] == [""]


@pytest.mark.parametrize("error", [UserError("no such corpus"), KeyError(), KeyboardInterrupt("enough")])
def test_a_host_that_fails_tells_the_others_first(two, error):
    with pytest.raises(type(error)) as caught, together():
        raise error
    assert caught.value is error
    assert two["own"] == [str(error) or type(error).__name__]


def test_a_host_stops_where_another_fails(two):
    two["other"] = "/data/corpus: no such folder ü"
    with pytest.raises(UserError, match=r"^host 1 stopped: /data/corpus: no such folder ü$"), together():
        pass


def test_long_words_are_cut(two):
    with pytest.raises(UserError), together():
        raise UserError("ü" * 2000)
    assert 400 < len(two["own"][0]) <= 1000


def test_a_stop_that_is_met_once_is_remembered(monkeypatch):
    """The service says it at one place alone; an evaluation that meets it with its last batch goes on to its step."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda place: place == 3)
    stop = StopRequest()
    assert [stop.asked() for _ in range(5)] == [False, False, True, True, True]
