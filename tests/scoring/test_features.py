"""Stored features of images: the curve of a run that encodes them, and refused where they are of something else."""

import dataclasses
import hashlib
from functools import partial

import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model, save_model
from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.scoring.features import FeatureStore, compute_features, find_features
from silkie_jax.scoring.fingerprints import tower_checksums, weights_fingerprint
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.training import loop
from silkie_jax.training.loop import train
from silkie_jax.training.trainer import load_policy
from tests.training.support import SIDE, make_tiny, read_lines, record, run_config, write_corpus


@pytest.fixture(scope="module", autouse=True)
def parts_of_two():
    """Of a store that one test made the next reads the parts: all tests of this file mean the same by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "part", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_tiny(folder / "model")
    make_tiny(folder / "other", seed=1)
    # Rows with two images, with one, and with none; the last record shows what the first one does.
    records = [record(n, images=(2, 1, 0, 1)[n]) for n in range(4)]
    write_corpus(folder / "corpus", [*records, dataclasses.replace(record(0, images=2), id="again")])
    return folder


def config(folder, run, **others):
    return run_config(folder, run, **({"batch_rows": 2, "steps": 3, "checkpoint_every": 1} | others))


STORED = {"features": "precomputed"}
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "logps/chosen")


@pytest.fixture(scope="module")
def stored(folder):
    """The features of the corpus's images in float32."""
    return compute_features(config(folder, "none", **STORED))


def curve(run, *others):
    return [[line[name] for name in (*NAMES, *others)] for line in read_lines(run / "metrics.jsonl")]


def towers(folder, name="model"):
    return tower_checksums(folder / name, "float32", "float32").computed


# The curve


@pytest.mark.slow
def test_in_bfloat16_the_curve_is_that_of_live_features_bit_for_bit(folder):
    options = {"dtype": "bfloat16"}
    live = curve(train(config(folder, "live16", **options)))
    compute_features(config(folder, "none", **options, **STORED))
    ours = curve(train(config(folder, "stored16", **options, **STORED)))
    assert live[-1][3] > 0.01  # something was learned
    assert ours == live


@pytest.mark.slow
def test_on_a_mesh_with_a_stored_reference_the_curve_is_that_of_a_live_run(folder, stored):
    live = curve(train(config(folder, "live")))
    both = {"reference": "precomputed", **STORED}
    compute_reference(config(folder, "none", **both))
    mesh = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "batch_rows": 4}
    whole = curve(train(config(folder, "live4", batch_rows=4)))
    np.testing.assert_allclose(curve(train(config(folder, "both", **both))), live, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(curve(train(config(folder, "meshed", **both, **mesh))), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_began_with_its_tower_goes_on_without(folder, stored, monkeypatch):
    alone = curve(train(config(folder, "alone", **STORED)))
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(KeyboardInterrupt, match="after step 2 of 3"):
            train(config(folder, "stopped"))
    np.testing.assert_allclose(curve(train(config(folder, "stopped", **STORED))), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_null_image_is_stored_with_them(folder):
    """A loss that asks what the policy says with an image that shows nothing: no tower makes that image's features."""
    options = {"dtype": "bfloat16", "loss": {"name": "vdpo", "guide": "policy"}, "steps": 2}
    seen = ("images/chosen", "images/rejected")  # against the image that shows nothing
    live = curve(train(config(folder, "live_null", **options)), *seen)
    stored = compute_features(config(folder, "none", **options, **STORED))
    assert (stored / "null-mean.bin").stat().st_size == 256 * 128 * 2
    assert live[-1][3] != 0  # something was learned
    assert curve(train(config(folder, "stored_null", **options, **STORED)), *seen) == live
    (stored / "null-mean.bin").unlink()
    with pytest.raises(UserError, match=r"null-mean\.bin is missing, which the loss needs; run `silkie reference`"):
        train(config(folder, "refused", **options, **STORED))


# What is loaded


def test_the_tower_is_not_loaded_and_the_weights_are_known_as_before(folder):
    mesh = make_mesh(data=1)
    policy = load_policy(config(folder, "none", **STORED), mesh)
    assert policy.visual is None
    tower = towers(folder)
    assert weights_fingerprint(policy, tower=tower) == weights_fingerprint(load_model(folder / "model"))
    sharded = tower_checksums(folder / "model", "bfloat16", "float32", partial(sharding_of, make_mesh(2, 2, 2)))
    assert sharded.kept == tower
    assert sharded.computed == tower_checksums(folder / "model", "bfloat16", "bfloat16").kept != tower


def test_a_decoder_alone_is_saved_with_the_tower_that_it_began_with(folder, tmp_path):
    decoder = load_model(folder / "model", parts=("language",))
    decoder.language.ln_f.weight[...] = decoder.language.ln_f.weight[...] + 1
    save_model(decoder, tmp_path / "saved", like=folder / "model")
    saved, before = load_model(tmp_path / "saved"), load_model(folder / "model")
    assert weights_fingerprint(saved) != weights_fingerprint(before)
    saved.language.ln_f.weight[...] = before.language.ln_f.weight[...]
    assert weights_fingerprint(saved) == weights_fingerprint(before)


# The files


def test_features_are_those_of_the_tower_and_an_image_is_there_once(folder, stored):
    corpus = CorpusReader(folder / "corpus")
    features = find_features(config(folder, "none"), corpus, towers(folder))
    images = list(dict.fromkeys(image for found in corpus for image in found.images))
    assert sum(path.stat().st_size for path in stored.glob("*.bin")) == len(images) * 256 * 128 * 4
    assert (stored / "images.txt").read_text().split() == [hashlib.sha256(image).hexdigest() for image in images]
    expected = load_model(folder / "model").encode_images(np.stack([read_image(image, SIDE) for image in images]))
    np.testing.assert_allclose([features(image) for image in images], expected, rtol=1e-5, atol=1e-5)


def test_only_what_is_missing_is_computed(folder, stored):
    again = stored / "part-00001.bin"
    kept = again.read_bytes()
    before = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert len(before) == 4
    again.unlink()
    with pytest.raises(UserError, match="1 of 2 parts are missing; run `silkie reference`"):
        train(config(folder, "refused", **STORED))
    assert compute_features(config(folder, "none", **STORED)) == stored
    assert again.read_bytes() == kept
    changed = [path.name for path in stored.iterdir() if path.stat().st_mtime_ns != before[path.name]]
    assert changed == ["part-00001.bin"]


def test_a_part_that_was_cut_is_named(folder, stored):
    part = stored / "part-00000.bin"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"part-00000\.bin: damaged"):
        train(config(folder, "refused", **STORED))
    part.write_bytes(whole)


# What is refused


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "other"}, "made with other tower;"),
        ({"corpus": "fewer"}, "has no image features; run `silkie reference`"),
    ],
)
def test_features_of_something_else_are_refused_by_name(folder, stored, changed, said):
    if "corpus" in changed and not (folder / "fewer").exists():
        write_corpus(folder / "fewer", [record(1)])
    with pytest.raises(UserError, match=said):
        train(config(folder, "refused", **STORED, **{k: str(folder / v) for k, v in changed.items()}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train_vision", "resampler", "needs a frozen vision tower"),
        ("evaluate_with", [{"benchmark": "mme", "data": "mme"}], "leaves the vision tower out, which evaluate_with"),
        ("features", "cached", "choose one of live, precomputed"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, key, value, said):
    with pytest.raises(UserError, match=said):
        config(folder, "none", **(STORED | {key: value}))
