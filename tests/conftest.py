"""Shared fixtures. Reference data lies beside the checkout, in ../shared; what reads it skips where it is absent."""

import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

# Threads of a matrix product that wait for each other cost more than they bring in small tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One process plays eight devices, so that every mesh shape can be tested on any machine. XLA starts as many threads as
# there are processors or devices; programs whose collectives wait for each other can need more, or wait for ever.
os.environ.setdefault("NPROC", "64")
# Compiling is most of what these tests do: without LLVM's optimisation and the newer fusion emitters it is seven times
# quicker, and the programs' results stay the same to float32's last digits.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # Later versions have no such choice, and abort at a flag that they do not know.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    )
).strip()

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"reference data not present: ../shared/{name} does not exist beside this checkout")
    return path


def pytest_collection_modifyitems(items):
    """Files whose slow tests take longest first: several processes share the suite by files, and end together."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if marker := item.get_closest_marker("slow"):
            seconds[item.path] += marker.args[0] if marker.args else 20
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is kept in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """Arrays made by the official PyTorch code (see its README)."""
    return _folder("golden")


@pytest.fixture(scope="session")
def photos() -> Path:
    """Nine real photographs."""
    return _folder("photos")


# Models that several files test, loaded once.


@pytest.fixture(scope="session")
def reference_data(golden):
    from tests.reference.golden import Golden

    return Golden(golden)


@pytest.fixture(scope="session")
def golden_model(reference_data):
    from silkie_jax.checkpoints.weights import load_model

    return load_model(reference_data.checkpoint)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Long enough for two images below seq_length."""
    from tests.pairs import make_pair

    return make_pair(tmp_path_factory.mktemp("pair"), seq_length=640)


@pytest.fixture(scope="session")
def short_pair(tmp_path_factory):
    """The same weights with a seq_length that a few words exceed."""
    from tests.pairs import make_pair

    return make_pair(tmp_path_factory.mktemp("short_pair"), seq_length=24)
