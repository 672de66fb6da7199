"""The configurations of the related systems load, and say what they are meant to."""

from pathlib import Path

import pytest

from silkie_jax.training.config_file import load_config
from silkie_jax.yaml_files import read_yaml

SYSTEMS = Path(__file__).resolve().parents[2] / "configs" / "systems"
TRAINED = sorted(path.stem for path in SYSTEMS.glob("*.yaml") if "rounds" not in read_yaml(path))


@pytest.mark.parametrize("name", TRAINED)
def test_they_load(name):
    assert load_config(SYSTEMS / f"{name}.yaml").run_dir != load_config(SYSTEMS.parent / "silkie.yaml").run_dir
