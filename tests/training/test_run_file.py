"""A run is known by what it was made of, not by where that lies."""

import dataclasses
import json
import shutil
import sys

import pytest
from flax import nnx

from silkie_jax.checkpoints.peft import save_adapter
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.nn.lora import add_lora, linears
from silkie_jax.training.config_file import load_config, make_config
from silkie_jax.training.loop import train
from silkie_jax.training.metrics import MetricsWriter
from silkie_jax.training.run_file import save_contents
from tests.training.support import make_tiny, read_lines, record, write_corpus

CLOCK = ("_per_second", "_seconds", "input_wait")


def records(first=0):
    return [record(n, (2, 1), images=0) for n in range(first, first + 6)]


def write_adapter(folder, seed):
    """One that has learned something."""
    model = load_model(folder / "model")
    add_lora(model, 2, 4.0, ["c_attn"], rngs=nnx.Rngs(seed))
    for _, linear in linears(model.language.layers):
        if linear.lora_b is not None:
            linear.lora_b[...] = linear.lora_b[...] + 0.01
    save_adapter(model, folder / "adapter", base_model="base")


def settings(folder):
    return {
        **{name: str(folder / name) for name in ("model", "corpus")},
        "run_dir": str(folder / "run"),
        "lora": {"rank": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0},
        "batch_rows": 3,
        "steps": 4,
        "dtype": "float32",
        "remat": "none",
        "mesh": {"data": 1},
        "evaluation_fraction": 0,
        "log_every": 1,
        "checkpoint_every": 2,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that starts from an adapter, with all that it reads."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny(folder / "model")
    write_corpus(folder / "corpus", records())
    write_adapter(folder, seed=0)
    train(make_config(settings(folder) | {"adapter": str(folder / "adapter")}))
    return folder


@pytest.fixture
def moved(world, tmp_path):
    """The same in another place, and the run as it was after two steps."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    return tmp_path


def config(folder):
    return dataclasses.replace(
        load_config(folder / "run" / "config.yaml"),
        **{name: str(folder / name) for name in ("model", "corpus", "adapter")},
        run_dir=str(folder / "run"),
    )


def metrics(folder):
    lines = read_lines(folder / "run" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(CLOCK)} for line in lines]


def test_what_is_in_the_file(world):
    said = json.loads((world / "run" / "run.json").read_text())
    assert list(said) == ["id", "corpus", "tokenizer", "weights", "adapter"]
    assert len(set(said.values())) == 5


def test_a_run_goes_on_where_everything_was_moved_to(world, moved):
    train(config(moved))
    assert metrics(moved) == metrics(world)
    name = "adapter/adapter_model.safetensors"
    assert (moved / "run" / name).read_bytes() == (world / "run" / name).read_bytes()
    assert load_config(moved / "run" / "config.yaml").model == str(moved / "model")
    assert (moved / "run" / "run.json").read_bytes() == (world / "run" / "run.json").read_bytes()


def change(folder, what):
    """Puts something else at the same path."""
    if what == "tokenizer":
        lines = (folder / "model" / "qwen.tiktoken").read_text().splitlines()
        words = [line.split() for line in lines]
        words[-1][0], words[-2][0] = words[-2][0], words[-1][0]
        (folder / "model" / "qwen.tiktoken").write_text("".join(f"{a} {b}\n" for a, b in words))
        return
    shutil.rmtree(folder / {"weights": "model"}.get(what, what))
    if what == "corpus":
        write_corpus(folder / "corpus", records(1))
    elif what == "weights":
        make_tiny(folder / "model", seed=1)
    else:
        write_adapter(folder, seed=1)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("corpus", "the corpus at {}/corpus has changed since this run began; put it back, or use a new run_dir"),
        ("tokenizer", "the tokenizer of {}/model has changed"),
        ("weights", "the weights of {}/model have changed"),
        ("adapter", "the adapter at {}/adapter has changed"),
    ],
)
def test_other_contents_at_the_same_path_are_refused_by_name(moved, what, named):
    change(moved, what)
    before = {path: path.read_bytes() for path in (moved / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train(config(moved))
    assert str(caught.value).startswith(f"{moved / 'run'}: {named.format(moved)}")
    assert {path: path.read_bytes() for path in (moved / "run").rglob("*") if path.is_file()} == before


def test_an_adapter_that_is_no_longer_named_is_another_run(moved):
    with pytest.raises(UserError, match=r"holds another run: adapter was '.*' and is None"):
        train(dataclasses.replace(config(moved), adapter=None))


def test_a_run_that_an_earlier_version_began_goes_on_and_gets_one(world, moved):
    """It knows where its contents lay, and nothing else of them."""
    (moved / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds another run: model was '.*' and is '.*', corpus was"):
        train(config(moved))
    place = moved / "run" / "config.yaml"
    place.write_text(place.read_text().replace(str(world), str(moved)))
    train(config(moved))
    assert metrics(moved) == metrics(world)
    ours, theirs = (json.loads((folder / "run" / "run.json").read_text()) for folder in (moved, world))
    assert ours.pop("id") != theirs.pop("id")
    assert ours == theirs


def test_a_damaged_file_is_one_line(moved):
    (moved / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: damaged .*; remove it to continue"):
        train(config(moved))


# wandb

FAKE = """
import json, pathlib
LOG = pathlib.Path(__file__).with_name("log")

def init(**given):
    pathlib.Path(given["dir"], "wandb").mkdir(exist_ok=True)
    LOG.open("a").write(json.dumps(given) + "\\n")
    return Run()

class Run:
    def log(self, values, step):
        pass

    def finish(self):
        pass
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A wandb that writes down how it is started; what it was told, for each start."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: read_lines(tmp_path / "site" / "log")
    sys.modules.pop("wandb", None)


def log_once(run):
    save_contents(run, {})
    with MetricsWriter(run, 0, 1, wandb="project") as metrics:
        metrics.write(1, {"loss": 1.0})


def test_runs_of_one_name_are_two_to_wandb_and_a_run_that_goes_on_is_one(tmp_path, wandb):
    for place in ("a", "b", "a"):
        (tmp_path / place / "run").mkdir(parents=True, exist_ok=True)
        log_once(tmp_path / place / "run")
    first, other, again = wandb()
    assert first == again
    assert first["id"] != other["id"]
    assert first["name"] == other["name"] == "run"
    assert first["resume"] == "allow"


def test_a_run_that_an_earlier_version_began_keeps_its_id(tmp_path, wandb):
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    log_once(tmp_path / "run")
    assert [line["id"] for line in wandb()] == ["run"]
