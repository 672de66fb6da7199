"""How processes find each other, without any."""

import jax
import pytest

from silkie_jax.hardware.distributed import start

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
