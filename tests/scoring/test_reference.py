"""The stored reference: the curve of the live one, and refused where it is of something else."""

import numpy as np
import pytest

from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.loading import load
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.scoring.store import PART, ReferenceStore, find_reference
from silkie_jax.training.loop import train
from tests.training.support import make_tiny, read_lines, record, run_config, write_corpus

IDENTITY = {"weights": "a", "dtype": "float32", "tokenizer": "t", "rows": "r", "corpus": "c"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    make_tiny(folder / "model")
    make_tiny(folder / "other", seed=1)
    write_corpus(folder / "corpus", [record(n, images=int(n == 1)) for n in range(5)])
    return folder


def config(folder, run, **others):
    return run_config(folder, run, **({"batch_rows": 4, "steps": 4} | others))


@pytest.fixture(scope="module")
def stored(folder):
    """The log-probabilities of the model, computed."""
    return compute_reference(config(folder, "none", reference="precomputed"))


@pytest.mark.slow
def test_the_stored_reference_gives_the_curve_of_the_live_one(folder, stored):
    live = read_lines(train(config(folder, "live")) / "metrics.jsonl")
    ours = read_lines(train(config(folder, "stored", reference="precomputed")) / "metrics.jsonl")
    assert live[-1]["rewards/margins"] > 0.01  # something was learned
    for line, expected in zip(ours, live, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "logps/chosen"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (line["step"], name)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "other"}, "weights"),
        ({"max_length": 1000}, "rows"),
        ({"dtype": "bfloat16"}, "weights and dtype"),
    ],
)
def test_a_reference_of_something_else_is_refused_by_name(folder, stored, changed, named):
    if "model" in changed:
        changed = {"model": str(folder / changed["model"])}
    with pytest.raises(UserError, match=rf"made with other {named}; run `silkie reference`"):
        train(config(folder, "refused", reference="precomputed", **changed))


def test_nothing_stored_is_one_line(folder, tmp_path):
    write_corpus(tmp_path / "corpus", [record(0)])
    with pytest.raises(UserError, match="has no reference log-probabilities; run `silkie reference`"):
        train(config(folder, "nothing", reference="precomputed", corpus=str(tmp_path / "corpus")))


def test_what_is_computed_is_not_computed_again(folder, stored):
    before = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert compute_reference(config(folder, "none", reference="precomputed", pair_rule="best_vs_worst")) == stored
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == before


def test_every_response_has_its_place(folder, stored):
    corpus = CorpusReader(folder / "corpus")
    (part,) = stored.glob("part-*.npz")
    arrays = np.load(part)
    assert arrays["counts"].tolist() == [len(r.responses) for r in corpus]
    assert (arrays["logps"] < 0).all()


# The files


def filled(path, records):
    store = ReferenceStore(path, IDENTITY, records)
    for part in range(store.parts):
        store.write(part, [np.array([i, i + 0.5], np.float32) for i in store.range(part)])
    return store


def test_parts_come_back_as_one(tmp_path):
    store = filled(tmp_path, 2 * PART + 3)
    assert store.missing() == []
    found = find_reference(tmp_path, IDENTITY, 2 * PART + 3)
    for record_number in (0, PART - 1, PART, 2 * PART + 2):
        assert found(record_number, [1, 0]).tolist() == [record_number + 0.5, record_number]


def test_an_unfinished_store_says_so(tmp_path):
    store = filled(tmp_path, PART + 1)
    (store.folder / "part-00001.npz").unlink()
    assert store.missing() == [1]
    with pytest.raises(UserError, match="1 of 2 parts are missing; run `silkie reference`"):
        find_reference(tmp_path, IDENTITY, PART + 1)


def test_a_damaged_part_is_named(tmp_path):
    store = filled(tmp_path, 4)
    part = store.folder / "part-00000.npz"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(UserError, match=r"part-00000\.npz: damaged"):
        find_reference(tmp_path, IDENTITY, 4)


def test_the_nearest_identity_is_compared(tmp_path):
    filled(tmp_path, 4)
    with pytest.raises(UserError, match="made with other tokenizer and corpus;"):
        find_reference(tmp_path, IDENTITY | {"tokenizer": "x", "corpus": "y"}, 4)


# The scorer


def test_a_limit_on_tokens_makes_more_passes_and_changes_nothing(folder):
    model, tokenizer = load(folder / "model")
    records, mesh = list(CorpusReader(folder / "corpus")), make_mesh(data=1)

    def scored(tokens):
        """Log-probabilities, and the shapes [1, B, T] of the passes that gave them."""
        scorer = Scorer(model, tokenizer, mesh, batch_rows=4, batch_tokens=tokens, max_length=2048)
        forward, shapes = scorer._forward, []

        def noted(state, arrays, branches):
            shapes.append(arrays["tokens"].shape)
            return forward(state, arrays, branches=branches)

        scorer._forward = noted
        return scorer(records), shapes

    (expected, whole), (ours, parts) = scored(None), scored(700)
    assert [shape[1] for shape in whole] == [4, 4]
    assert all(rows * length <= 700 or rows == 1 for _, rows, length in parts)
    assert len(parts) > 2
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-4)
