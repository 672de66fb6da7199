"""Losses that need more than two passes, in whole runs and steps: the same numbers however they are computed."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.null_image import NullImage, null_features
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.models.qwen_vl.vision import patches
from silkie_jax.preference.losses import LossOptions
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.training.config_file import load_config, make_config
from silkie_jax.training.data import open_data
from silkie_jax.training.loop import train
from silkie_jax.training.step import Objective
from tests.training.support import (
    SIDE,
    SMALL_RUN,
    Steps,
    assert_same_arrays,
    make_tiny,
    read_lines,
    record,
    record_row,
    rows_arrays,
    write_corpus,
)

BOTH = [
    {"name": "vdpo", "guide": "policy", "weight": 0.5},
    {"name": "spa", "weight": 0.5, "window": 7, "percentile": 0.5, "begin": 0.0, "extrapolation": 0.5},
]
"""One program for both: V-DPO's null pass, SPA's scores of two models, its window and its share of the run."""
CLOCK = ("_per_second", "_seconds", "input_wait", "memory_gib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """With and without a picture."""
    made = [record(0, (3, 1)), record(3, (4, 2, 1), images=0), record(5, (2, 1)), record(6, (1, 2), images=0)]
    return [record_row(tokenizer, one) for one in made]


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """What all runs here share."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "c", [record(n, images=n % 2) for n in range(8)])
    return SMALL_RUN | {
        "model": str(folder),
        "corpus": str(corpus),
        "lora": {"rank": 2, "alpha": 4},
        "batch_rows": 4,
        "steps": 4,
        "checkpoint_every": 1,
        "keep_checkpoints": 4,
    }


def metrics(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(CLOCK) and k != "lengths/ratio"} for line in lines][-4:]


def assert_close(ours, expected):
    for line, other in zip(ours, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-4, abs=2e-5)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of both losses."""
    return train(make_config(base | {"loss": BOTH, "run_dir": str(tmp_path_factory.mktemp("runs") / "run")}))


def test_the_window_fills_and_moves_its_threshold(run):
    """A step's 24 pairs fill it; those of the first one have no margin, but for rounding."""
    lines = metrics(run)
    thresholds = [line["spa/threshold"] for line in lines]
    assert thresholds[0] == 0
    assert abs(thresholds[1]) < 1e-4
    assert min(map(abs, thresholds[2:])) > 1e-3
    assert thresholds[2] != thresholds[3]
    assert all(0 <= line["spa/trusted"] <= 1 for line in lines)
    assert 0 < lines[-1]["spa/trusted"] < 1
    assert any(line["images/chosen"] for line in lines)  # 0 in a step without pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"batch_rows": 1, "accumulate": 4},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "remat": "full"},
        {"pack": 900},
        {"reference": "copy"},
    ],
    ids=lambda values: "-".join(values),
)
def test_the_same_run_however_it_is_computed(run, base, tmp_path, values):
    """Thresholds, too: they do not know how rows are accumulated, packed or spread over a mesh."""
    config = make_config(base | {"loss": BOTH, "run_dir": str(tmp_path / "run")} | values)
    assert_close(metrics(train(config)), metrics(run))


def test_a_run_that_goes_on_in_the_middle_of_a_window_ends_as_if_nothing_had_happened(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "adapter")
    for step in (3, 4):
        shutil.rmtree(again / "checkpoints" / str(step))
    train(dataclasses.replace(load_config(run / "config.yaml"), run_dir=str(again)))
    assert metrics(again) == metrics(run)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (run / name).read_bytes()


def test_pairs_are_numbered_as_the_plan_has_them_whatever_the_grid(base, tmp_path):
    """By number, a step's pairs are the same ones under accumulation and packing; what is no pair has no number."""

    def numbered(**values):
        config = make_config(base | {"run_dir": str(tmp_path / "run")} | values)
        corpus, tokenizer = CorpusReader(config.corpus), Tokenizer.from_folder(config.model)
        data = open_data(config, make_mesh(data=1), corpus, tokenizer)
        data.number_pairs(True)
        arrays = data.train.batch(1).arrays
        order, mask = arrays["pair_order"], arrays["pair_mask"]
        assert (order[~mask] == -1).all()
        assert sorted(order[mask]) == list(range(mask.sum()))
        labels = np.zeros(mask.sum(), int)
        for a, b, p in np.argwhere(mask):  # the labels of the chosen response tell pairs apart
            chosen = arrays["label_branches"][a, b] == arrays["pairs"][a, b, p, 0] + 1
            labels[order[a, b, p]] = arrays["labels"][a, b][chosen].sum()
        return labels.tolist()

    one = numbered()
    assert len(set(one)) > 2
    assert numbered(batch_rows=1, accumulate=4) == numbered(pack=900) == one


# V-DPO


def test_gamma_one_is_dpo_bit_for_bit(model, rows):
    arrays = rows_arrays_of(rows)
    found = [
        Steps(model, Objective(loss, LossOptions(0.05, 0.1), "copy"), reference=model)(arrays)
        for loss in ("sigmoid", {"name": "vdpo", "gamma": 1.0})
    ]
    assert found[0][0] == found[1][0]
    for name, array in found[0][1].items():
        np.testing.assert_array_equal(array, found[1][1][name])


def rows_arrays_of(rows, **options):
    class NoTokenizer:
        end_of_text = 0

    return rows_arrays(NoTokenizer, rows, **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["product", "normalised"])
def test_mesh_gives_the_same_loss_and_gradient(folder, model, rows, form, tmp_path):
    """vdpo and spa together, with a trained head; the reference is another model."""
    loss = [BOTH[0] | {"form": form}, BOTH[1]]
    mesh = make_mesh(2, 2, 2)
    other, where = make_tiny(tmp_path, seed=1), partial(sharding_of, mesh)
    one, many = (
        Steps(policy, Objective(loss, LossOptions(0.05), "copy"), reference=reference, mesh=on)
        for policy, reference, on in (
            (model, load_model(other), None),
            (load_model(folder, sharding_of=where), load_model(other, sharding_of=where), mesh),
        )
    )
    (metrics_one, gradient), (metrics_many, sharded) = (steps(rows_arrays_of(rows * 2)) for steps in (one, many))
    assert metrics_many == pytest.approx(metrics_one, rel=1e-4, abs=1e-5)
    assert_same_arrays(sharded, gradient, 1e-4)
    for kept, other in zip(jax.tree.leaves(many.memory), jax.tree.leaves(one.memory), strict=True):
        np.testing.assert_allclose(kept, other, rtol=1e-4, atol=1e-5)


def test_floats_are_pixels_that_are_normalised_already():
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    normal = patches(jnp.asarray(images), 14)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    floats = jnp.asarray((images / 255 - mean) / std, jnp.float32)
    np.testing.assert_allclose(patches(floats, 14), normal, rtol=1e-5, atol=1e-5)


def test_null_images(model):
    """The mean colour is zero behind the normalisation; noise has that many draws, always the same."""
    mean, noise = (null_features(model, NullImage(*kind)) for kind in (("mean",), ("noise", 2)))
    assert mean.shape[0] == 1
    assert noise.shape[0] == 2
    assert not np.allclose(noise[0], noise[1])
    np.testing.assert_array_equal(noise, null_features(model, NullImage("noise", 2)))
    assert not null_features(model, NullImage("tokens")).any()
    np.testing.assert_allclose(mean[0], model.encode_images(jnp.zeros((SIDE, SIDE, 3))), rtol=1e-6)


@pytest.mark.slow
def test_a_stored_guide_gives_the_curve_of_the_computed_one(base, tmp_path):
    """The reference's log-probabilities with the null image lie beside those with the responses' own."""
    changed = {"loss": {"name": "vdpo", "gamma": 0.5}, "steps": 2}
    stored = make_config(base | changed | {"reference": "precomputed", "run_dir": str(tmp_path / "stored")})
    compute_reference(make_config(base | {"reference": "precomputed", "run_dir": str(tmp_path / "stored")}))
    with pytest.raises(UserError, match="there were made with other image; run `silkie reference`"):
        train(stored)
    compute_reference(stored)
    ours = metrics(train(stored))
    assert_close(ours, metrics(train(make_config(base | changed | {"run_dir": str(tmp_path / "live")}))))
    assert max(abs(line["loss"] - np.log(2)) for line in ours) > 0.02  # guided where there are pictures


def test_scores_with_a_null_image_are_those_without_the_picture(model, tokenizer):
    """A record without a picture has the same ones; pictures do not matter."""

    def scores(null, *records):
        scorer = Scorer(model, tokenizer, make_mesh(data=1), batch_rows=2, max_length=2048, null=null)
        return [scored.logps for scored in scorer(records)]

    one, other = record(0, (3, 1)), dataclasses.replace(record(0, (3, 1)), images=record(1, (3, 1)).images)
    seen, blind = scores(None, one, other), scores(NullImage(), one, other)
    assert not np.allclose(seen[0], seen[1])
    np.testing.assert_allclose(blind[0], blind[1], rtol=1e-6)
    assert not np.allclose(blind[0], seen[0])
