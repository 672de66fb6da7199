"""A corpus made by commands alone is what training and anybody's TFDS take."""

import json
import subprocess
import sys

import pytest

from silkie_jax.cli import main
from tests.data_prep.runs import write_judge, write_pool
from tests.data_prep.test_whole_road import FAULTS, silkie, write_rows
from tests.endpoints.server import Script, Server

COUNT = 24

TRAINING = """
objective: dpo
train_vision: none
lora: {rank: 4, alpha: 8, targets: [c_attn]}
optimizer: {learning_rate: 1.0e-3, schedule: constant}
batch_rows: 2
steps: 2
max_length: 512
dtype: float32
remat: none
evaluation_fraction: 0.2
log_every: 1
"""

# Opens argv[1] where TensorFlow cannot be imported, whether it is installed or not.
OPEN = '''
import sys

class Without:
    """A finder that finds everything but TensorFlow."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] == "tensorflow" else self._finder.find_spec(name, *more)

sys.meta_path[:] = map(Without, sys.meta_path)
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
record = source[len(source) - 1]
print(len(source), record["images"][0].shape, len(record["responses"]["text"]), record["id"].decode())
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trains")
    with Server(Script(faults=FAULTS)) as server:
        silkie("instructions", write_rows(folder / "data", COUNT), folder / "run", "--licence", "CC-BY-4.0")
        silkie("respond", folder / "run", "--pool", write_pool(folder / "pool", server.url), "--budget", "1USD")
        silkie("rate", folder / "run", "--judge", write_judge(folder / "judge", server.url), "--budget", "2USD")
    silkie("build", folder / "run", folder / "corpus")
    return folder / "corpus"


def test_it_opens_where_there_is_no_tensorflow(corpus):
    done = subprocess.run([sys.executable, "-c", OPEN, str(corpus)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{COUNT} (64, 64, 3) 4 rows-row{COUNT - 1}\n"


@pytest.mark.slow
def test_it_trains(corpus, tmp_path):
    from tests.training.support import make_tiny

    make_tiny(tmp_path / "model")
    (tmp_path / "train.yaml").write_text(TRAINING)
    keys = {"model": tmp_path / "model", "corpus": corpus, "run_dir": tmp_path / "run"}
    assert main(["train", str(tmp_path / "train.yaml"), *(f"{key}={value}" for key, value in keys.items())]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference yet
    assert len(losses) == 2
    assert losses[1] != losses[0]
    assert [row for row in logged if "eval_loss" in row]
