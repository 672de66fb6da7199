"""The configurations of the related systems load, and say what they are meant to."""

from pathlib import Path

import pytest

from data_prep.judging.kinds import load_judge
from data_prep.respond import load_pool
from silkie_jax.iteration.config import load_iterate
from silkie_jax.training.config_file import load_config
from silkie_jax.yaml_files import read_yaml

SYSTEMS = Path(__file__).resolve().parents[2] / "configs" / "systems"
ROOT = SYSTEMS.parents[1]
ITERATED = sorted(path.stem for path in SYSTEMS.glob("*.yaml") if "rounds" in read_yaml(path))
TRAINED = sorted(path.stem for path in SYSTEMS.glob("*.yaml") if "rounds" not in read_yaml(path))


@pytest.mark.parametrize("name", TRAINED)
def test_training_loads(name):
    config, silkie = load_config(SYSTEMS / f"{name}.yaml"), load_config(SYSTEMS.parent / "silkie.yaml")
    assert config != silkie


@pytest.mark.parametrize("name", ITERATED)
def test_rounds_and_all_that_they_name_load(name):
    rounds = load_iterate(SYSTEMS / f"{name}.yaml")
    assert load_config(ROOT / rounds.train)
    assert load_pool(ROOT / rounds.respond).models
    assert all(load_judge(ROOT / judge).name for judge in rounds.rate)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "judges").glob("*.yaml")), ids=lambda path: path.stem)
def test_judges_of_responses_load(path):
    if path.stem != "evaluation":  # of benchmarks
        assert load_judge(path).agents


def test_the_ones_named_here_are_what_their_papers_say():
    sima, csr = (load_config(SYSTEMS / f"{name}.yaml") for name in ("sima", "csr-train"))
    assert sima.pair_rule == {"name": "aspect", "aspect": "Preferred"}
    assert (csr.pair_rule, csr.epochs, sima.epochs) == ("best_vs_worst", 1, 3)
    for config in (sima, csr):
        assert (config.beta, config.lora.rank, config.lora.alpha) == (0.1, 128, 256)
        assert (config.optimizer.learning_rate, config.optimizer.warmup_ratio) == (1e-7, 0.03)
    assert load_config(SYSTEMS / "red-team.yaml").pair_rule["name"] == "by_source"
    allava = load_config(SYSTEMS / "allava.yaml")
    assert (allava.objective, allava.imitate) == ("sft", "all")
