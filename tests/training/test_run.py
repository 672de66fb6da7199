"""`train(config)` in one process: the run's folder, its metrics, resuming, and what is said about what went wrong."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from flax import nnx
from omegaconf import OmegaConf

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader, split
from silkie_jax.errors import UserError
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.training.config_file import load_config, make_config, save_config
from silkie_jax.training.loop import train
from silkie_jax.training.result import export_run
from tests.training.support import by_path, given_record, make_tiny, read_lines, record, write_corpus

TRL = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
RATES = ("step_seconds", "tokens_per_second", "instructions_per_second", "pairs_per_second", "input_wait")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Fourteen instructions over text alone, which are quick; two of them without a pair."""
    records = [record(n, images=0) for n in range(14)]
    records[3] = record(3, (4, 4, 4), images=0)
    records[8] = record(8, (float("nan"), 4), images=0)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", records)


@pytest.fixture(scope="module")
def base(folder, corpus):
    """What all runs here share; three rows a step do not divide eight devices."""
    return {
        "model": str(folder),
        "corpus": str(corpus),
        "lora": {"rank": 2, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3},
        "batch_rows": 3,
        "steps": 6,
        "dtype": "float32",
        "remat": "none",
        "mesh": {"data": 1},
        "log_every": 1,
        "checkpoint_every": 2,
        "evaluate_every": 3,
        "evaluation_fraction": 0.2,
    }


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run."""
    return train(make_config(base | {"run_dir": str(tmp_path_factory.mktemp("runs") / "run")}))


def metrics(folder, *without):
    """The lines of metrics.jsonl without rates of time."""
    return [
        {name: value for name, value in line.items() if name not in (*RATES, *without)}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def assert_close(ours, expected):
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, other in zip(ours, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


# The folder of a run


def test_what_is_in_the_folder(run, base):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "adapter",
        "skipped.jsonl",
    }
    assert (run / "skipped.jsonl").read_text() == ""
    # On a CPU `attention: auto` is the plain path: what was taken is written down.
    assert load_config(run / "config.yaml") == make_config(base | {"run_dir": str(run), "attention": "plain"})
    assert OmegaConf.load(run / "config.yaml").reference == "adapter_off"  # as it was resolved
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert list((run / "tensorboard").iterdir())


def test_metrics_of_every_step(run, base):
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    always = {"step", "loss", "grad_norm", "skipped", "learning_rate", "epoch", *TRL, *RATES}
    evaluated = {f"eval_{name}" for name in ("loss", *TRL)}
    for line in lines:
        assert set(line) == always | (evaluated if line["step"] % 3 == 0 else set())
        assert all(line[name] > 0 for name in RATES)
        assert line["skipped"] == 0
    # Cosine with one step of warm-up: the first update is at rate 0, as in transformers.
    rates = [0, 1, *((1 + np.cos(np.pi * k / 5)) / 2 for k in range(1, 5))]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * r for r in rates], abs=1e-9)
    assert lines[0]["loss"] == lines[1]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert lines[-1]["epoch"] == pytest.approx(2)  # 14 less 3 held out and 2 without a pair, in steps of three


def test_checkpoints_are_few_and_small(run, folder):
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert kept == [4, 6]
    model = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    adapter = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    for step in kept:
        size = sum(file.stat().st_size for file in (run / "checkpoints" / str(step)).rglob("*") if file.is_file())
        # Factors and two moments of each; no frozen weights.
        assert adapter < size < 3 * adapter + 200_000 < model


def test_the_adapter_loads_and_the_base_has_not_moved(run, folder):
    before, after = (
        by_path(nnx.state(load_model(folder))),
        by_path(nnx.state(load_model(folder, adapter=run / "adapter"))),
    )
    assert all(np.array_equal(before[name], after[name]) for name in before)
    factors = {name: x for name, x in after.items() if "lora_" in name}
    assert len(factors) == 8
    assert all(x.any() for x in factors.values())


def test_evaluation_is_the_mean_over_the_held_out_pairs(run, base, corpus, tmp_path):
    """Equal to a step of training on just those rows, which reports the metrics before its update."""
    index = CorpusReader(corpus).index
    _, held = split(index, base["evaluation_fraction"], seed=0)
    assert len(held) == 3
    records = [CorpusReader(corpus)[int(i)] for i in held]
    same = write_corpus(tmp_path / "held", records)
    values = {"corpus": str(same), "evaluation_fraction": 0, "steps": 1, "batch_rows": 1, "accumulate": 3}
    values |= {"adapter": str(run / "adapter"), "lora": {"rank": 2, "alpha": 4}, "reference": "adapter_off"}
    (line,) = metrics(train(make_config(base | values | {"run_dir": str(tmp_path / "run")})))
    evaluated = {k.removeprefix("eval_"): v for k, v in metrics(run)[-1].items() if k.startswith("eval_")}
    assert {name: line[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-4, abs=1e-5)


# The same run in other words


@pytest.mark.parametrize(
    "values",
    [
        {"batch_rows": 1, "accumulate": 3},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "remat": "full", "workers": 1},
        {"batch_tokens": 512},
    ],
    ids=["accumulated", "on eight devices", "two rows at once"],
)
def test_the_same_metrics(run, base, tmp_path, values):
    again = train(make_config(base | values | {"run_dir": str(tmp_path / "run")}))
    assert_close(metrics(again), metrics(run))
    # Evaluation goes in batches of its own size and must not depend on it either.
    ours, expected = (by_path(nnx.state(load_model(base["model"], adapter=r / "adapter"))) for r in (again, run))
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def likely(base, tmp_path_factory):
    """A run whose loss has the likelihood of chosen responses, too."""
    return train(make_config(base | {"run_dir": str(tmp_path_factory.mktemp("runs") / "run"), **LIKELY}))


LIKELY = {"sft_weight": 0.5, "steps": 3}


def test_likelihood_is_logged_and_falls(run, likely):
    first, *_, last = metrics(likely)
    before = metrics(run)[0]
    assert first["loss"] == pytest.approx(before["loss"] + 0.5 * first["sft_loss"], rel=1e-6)
    assert first["loss"] > before["loss"]
    assert last["eval_sft_loss"] > 0
    assert {name: first[name] for name in TRL} == pytest.approx({name: before[name] for name in TRL}, rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_rows": 1, "accumulate": 3},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
        {"pack": 600},
        {"reference": "copy"},
        {"reference": "precomputed"},
    ],
    ids=lambda values: "-".join(values),
)
def test_likelihood_is_the_same_however_it_is_computed(base, likely, tmp_path, values):
    config = make_config(base | LIKELY | values | {"run_dir": str(tmp_path / "run")})
    if config.reference == "precomputed":
        compute_reference(config)
    assert_close(metrics(train(config)), metrics(likely))


def test_the_seed_changes_the_order_and_the_first_factors(run, base, tmp_path):
    again = train(make_config(base | {"run_dir": str(tmp_path / "run"), "seed": 1, "steps": 2}))
    assert metrics(again)[0]["logps/chosen"] != metrics(run)[0]["logps/chosen"]


# Resuming (killing a process is in test_resume.py)


@pytest.mark.parametrize("lost", [1, 2], ids=["from step 4", "from the start"])
def test_a_run_that_lost_its_last_checkpoints_repeats_the_rest_exactly(run, tmp_path, lost):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "adapter")
    for step in sorted((again / "checkpoints").iterdir(), key=lambda path: -int(path.name))[:lost]:
        shutil.rmtree(step)
    train(dataclasses.replace(load_config(run / "config.yaml"), run_dir=str(again)))
    assert metrics(again) == metrics(run)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_a_finished_run_stays_as_it_is_and_says_so(run, capfd):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(load_config(run / "config.yaml")) == run
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert capfd.readouterr().out == "all 6 steps of this run were done before; nothing is left to do\n"


def test_a_finished_run_that_lost_its_result_writes_it_again(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "adapter")
    train(dataclasses.replace(load_config(run / "config.yaml"), run_dir=str(again)))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors", "the end of it"])
def test_half_a_result_is_not_taken_for_one(run, tmp_path, lost):
    """Its folder is there, as an earlier version left it that was killed while it removed one."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    if lost == "the end of it":
        file = again / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (again / "adapter" / lost).unlink()
    assert export_run(again, tmp_path / "exported", adapter=True) == 6  # the last checkpoint is meant
    train(dataclasses.replace(load_config(run / "config.yaml"), run_dir=str(again)))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_a_run_with_two_results_is_finished_with_both(run, tmp_path):
    """Its adapter belongs to the tower that was trained with it."""
    config = dataclasses.replace(load_config(run / "config.yaml"), train_vision="all", reference="copy")
    save_config(config, tmp_path / "config.yaml")
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"checkpoints/6: does not fit this run \(0\.visual"):
        export_run(tmp_path, tmp_path / "exported")


def test_another_configuration_does_not_continue_a_run(run):
    config = load_config(run / "config.yaml")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds another run: beta was 0.1 and is 0.2; use a new run_dir"):
        train(dataclasses.replace(config, beta=0.2))
    assert (run / "metrics.jsonl").read_bytes() == before


# Corpora


def test_pairs_that_were_given_are_trained_on_as_they_are(base, tmp_path):
    corpus = write_corpus(tmp_path / "pairs", [given_record(n, images=0) for n in range(4)])
    values = {"corpus": str(corpus), "evaluation_fraction": 0, "steps": 2, "batch_rows": 4, "log_every": 2}
    (line,) = metrics(train(make_config(base | values | {"run_dir": str(tmp_path / "run")})))
    assert line["step"] == 2
    assert line["logps/chosen"] < line["logps/rejected"]  # the chosen ones are longer


@pytest.mark.parametrize(("imitate", "count"), [("chosen", 12), ("all", 14), ("best", 14)])
def test_sft(base, tmp_path, imitate, count, capfd):
    """Of the fourteen instructions one has equal ratings and one a single rated response: two have no pair."""
    values = {"objective": "sft", "imitate": imitate, "steps": 4, "evaluation_fraction": 0.2}
    values |= {"optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0}}
    run = train(make_config(base | values | {"run_dir": str(tmp_path / "run")}))
    lines = metrics(run, "responses_per_second")
    said = "".join(capfd.readouterr())
    trained, held = (int(word) for word in re.search(r"(\d+) instructions to train on, (\d+) held out", said).groups())
    assert trained + held == count
    assert ("without a pair" in said) == (imitate == "chosen")
    names = {"step", "loss", "mean_token_accuracy", "grad_norm", "skipped", "learning_rate", "epoch"}
    assert set(lines[0]) == names
    assert set(lines[2]) == {*names, "eval_loss", "eval_mean_token_accuracy"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    least, most = {"chosen": (1, 2), "all": (3, 4), "best": (1, 1)}[imitate]
    for line in read_lines(run / "metrics.jsonl"):
        assert 0 <= line["mean_token_accuracy"] <= 1
        assert least - 1e-6 <= line["responses_per_second"] / line["instructions_per_second"] <= most + 1e-6
        assert "pairs_per_second" not in line
    assert "mean_token_accuracy" in said
    assert "pairs per second" not in said


def test_all_responses_are_imitated_without_ratings_or_pairs(base, tmp_path):
    """And the best one cannot be found there."""
    records = [dataclasses.replace(given_record(n, images=0), pairs=()) for n in range(4)]
    corpus = write_corpus(tmp_path / "plain", records)
    values = {"corpus": str(corpus), "objective": "sft", "evaluation_fraction": 0, "steps": 2}
    values |= {"run_dir": str(tmp_path / "run")}
    for imitate, message in (
        ("chosen", "no record to train on under pair_rule 'given' (4 without a pair)"),
        ("best", "imitate best: this corpus has no ratings; use imitate: all or chosen"),
    ):
        with pytest.raises(UserError) as caught:
            train(make_config(base | values | {"imitate": imitate}))
        assert message in str(caught.value)
    assert len(metrics(train(make_config(base | values | {"imitate": "all"})))) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pair_rule": "given"}, "no record to train on under pair_rule 'given' (14 without a pair)"),
        ({"pair_rule": "best"}, "pair_rule: there is no rule 'best'; choose one of mean_rating"),
        ({"pair_rule": {"name": "aspect", "aspect": "Beauty"}}, "this corpus has no aspect 'Beauty'"),
        ({"pair_rule": {"name": "model_as_best", "model": "nobody"}}, "(14 without a pair)"),
        ({"model": "nowhere"}, "nowhere"),
        ({"corpus": "nowhere"}, "nowhere"),
        ({"adapter": "nowhere"}, "nowhere/adapter_config.json: not found"),
        ({"lora": {"targets": ["q_proj"]}}, "lora.targets: 'q_proj' matches no decoder layer"),
        ({"mesh": {"data": 3}}, "mesh data 3 x fsdp 1 x tensor 1 does not divide the 8 devices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained(base, tmp_path, values, message):
    with pytest.raises(UserError) as caught:
        train(make_config(base | values | {"run_dir": str(tmp_path / "run")}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "adapter").exists()


def test_images_that_leave_no_room_in_any_row(base, tmp_path):
    corpus = write_corpus(tmp_path / "images", [record(n) for n in range(4)])
    values = {"corpus": str(corpus), "max_length": 200, "run_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"no record to train on .*4 too long"):
        train(make_config(base | values))


def test_rows_beyond_max_length_are_counted_and_listed(base, tmp_path, capfd):
    records = [record(n, (2, 1), images=0) for n in range(4)]
    records += [record(4, images=2), record(5, (2, 1), images=0, words=40)]
    corpus = write_corpus(tmp_path / "long", records)
    values = {"corpus": str(corpus), "max_length": 300, "evaluation_fraction": 0, "batch_rows": 6, "steps": 3}
    run = train(make_config(base | values | {"run_dir": str(tmp_path / "run")}))
    listed = {line["id"]: line for line in read_lines(run / "skipped.jsonl")}
    assert {i: line["what"].split(":")[0] for i, line in listed.items()} == {"row-4": "left out", "row-5": "cut"}
    assert "max_length" in listed["row-4"]["what"]
    said = "".join(capfd.readouterr())
    assert "5 instructions to train on, 0 held out; 1 too long, 1 cut to max_length (listed in skipped.jsonl)" in said
