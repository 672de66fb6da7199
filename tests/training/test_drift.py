"""The warning that chosen and rejected responses differ in length: once, before the first step."""

import shutil

import pytest

from silkie_jax.training.config_file import make_config
from silkie_jax.training.loop import train
from tests.training.support import make_tiny, read_lines, record, write_corpus

WARNING = "warning: chosen responses are "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """36 instructions under a rule that always chooses the longest response."""
    folder = tmp_path_factory.mktemp("drift")
    return {
        "model": str(make_tiny(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus", [record(n, images=0) for n in range(36)])),
        "pair_rule": "longest_as_best",
        "lora": {"rank": 2},
        "batch_rows": 2,
        "steps": 2,
        "dtype": "float32",
        "remat": "none",
        "mesh": {"data": 1},
        "evaluation_fraction": 0,
        "checkpoint_every": 1,
        "log_every": 1,
    }


def test_it_is_said_and_logged_once_a_run(base, tmp_path, capfd):
    config = make_config(base | {"run_dir": str(tmp_path / "run")})
    train(config)
    said = "".join(capfd.readouterr())
    assert said.count(WARNING) == 1
    assert said.index(WARNING) < said.index("step 1  loss")
    assert "see Lengths of responses in docs/train.md" in said
    first, *rest = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert set(first) == {"step", "lengths/ratio"}
    assert first["step"] == 0
    assert first["lengths/ratio"] > 1.2
    assert [line["step"] for line in rest] == [1, 2]
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    train(config)  # what it continues has been warned of
    assert WARNING not in "".join(capfd.readouterr())
    again = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in again] == [0, 1, 2]
    assert again[0] == first


@pytest.mark.parametrize("values", [{"pair_rule": "mean_rating"}, {"objective": "sft"}], ids=["balanced", "sft"])
def test_nothing_is_said_without_it(base, tmp_path, capfd, values):
    """Lengths of these responses go round, so that no rating has the longer ones."""
    run = train(make_config(base | values | {"run_dir": str(tmp_path / "run")}))
    assert "longer" not in "".join(capfd.readouterr())
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]


def test_a_corpus_whose_rows_cannot_be_kept_is_measured_alike(base, tmp_path, capfd, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    train(make_config(base | {"run_dir": str(tmp_path / "a")}))
    monkeypatch.setattr("silkie_jax.preference.layout.published", refuses)
    shutil.copytree(base["corpus"], tmp_path / "corpus", ignore=shutil.ignore_patterns("rows"))
    train(make_config(base | {"run_dir": str(tmp_path / "b"), "corpus": str(tmp_path / "corpus")}))
    ratios = [read_lines(tmp_path / name / "metrics.jsonl")[0]["lengths/ratio"] for name in "ab"]
    assert ratios[0] == ratios[1]
