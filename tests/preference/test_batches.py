"""From a corpus to the arrays of a step: order, padding, what is left out and what is said about it."""

import dataclasses
import itertools

import numpy as np
import pytest

from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.errors import UserError
from silkie_jax.preference.batches import BatchSource, RowOptions, bucket, collate, decode_images, usable_records
from silkie_jax.preference.rows import make_row
from silkie_jax.qwen_vl.image import read_image
from silkie_jax.qwen_vl.tokenizer import Tokenizer
from tests.training.support import SIDE, given_record, image_bytes, record, record_row, write_corpus

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
RATED = RowOptions("mean_rating")
USABLE = [0, 1, *range(3, 11)]  # of the corpus below


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eleven instructions: 0 has two images, 1 none, 2 no pair, 3 a response without ratings."""
    records = [record(n, images={0: 2, 1: 0}.get(n, 1)) for n in range(11)]
    records[2] = record(2, ratings=(4, 4, 4, 4))
    records[3] = record(3, ratings=(5, float("nan"), 3, 3))
    return CorpusReader(write_corpus(tmp_path_factory.mktemp("corpus") / "c", records))


def source(corpus, indices=None, options=RATED, **arguments):
    indices = range(len(corpus)) if indices is None else indices
    return BatchSource(corpus, indices, TOKENIZER, options, **({"image_size": SIDE, "rows": 2} | arguments))


# Order


@pytest.mark.parametrize(("rows", "accumulate"), [(1, 1), (2, 1), (2, 2), (4, 3), (16, 1)])
def test_an_epoch_has_every_row_once(corpus, rows, accumulate):
    batches = source(corpus, rows=rows, accumulate=accumulate)
    size = rows * accumulate
    assert batches.steps_per_epoch == -(-11 // size)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        drawn = [batches.record_indices(step).tolist() for step in steps]
        assert [len(d) for d in drawn[:-1]] == [size] * (len(drawn) - 1)
        assert len(drawn[-1]) == (11 % size or size)
        epochs.append(list(itertools.chain(*drawn)))
        assert sorted(epochs[-1]) == list(range(11))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_step_alone(corpus):
    def order(steps, **arguments):
        batches = source(corpus, rows=3, **arguments)
        return [batches.record_indices(step).tolist() for step in steps]

    forward = order(range(8), seed=5)
    assert order(range(8), seed=5) == forward
    assert order(reversed(range(8)), seed=5) == forward[::-1]
    assert order(range(6, 8), seed=5) == forward[6:]
    assert order(range(8), seed=6) != forward
    assert order(range(4), seed=None) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


@pytest.mark.parametrize("workers", [1, 4])
def test_iterating_is_taking_batch_after_batch(corpus, workers):
    batches = source(corpus, rows=2)
    found = list(batches.iterate(2, 7, workers))
    assert [b.ids for b in found] == [batches.batch(step).ids for step in range(2, 7)]
    for name, array in batches.batch(3).arrays.items():
        np.testing.assert_array_equal(found[1].arrays[name], array)
    assert list(batches.iterate(4, 4)) == []


# What is in a batch


def test_rows_of_a_step_stand_in_order(corpus):
    batch = source(corpus, USABLE, seed=None, rows=2, accumulate=2).batch(0)
    assert batch.ids == ["row-0", "row-1", "row-3", "row-4"]
    assert {name: array.shape[:2] for name, array in batch.arrays.items()} == dict.fromkeys(batch.arrays, (2, 2))
    for place, number in enumerate([0, 1, 3, 4]):
        row, at = record_like(corpus[number]), divmod(place, 2)
        length, labels = len(row.tokens), len(row.labels)
        for name in ("tokens", "positions", "branches"):
            np.testing.assert_array_equal(batch.arrays[name][at][:length], getattr(row, name))
        assert (batch.arrays["branches"][at][length:] == -1).all()
        assert (batch.arrays["tokens"][at][length:] == TOKENIZER.end_of_text).all()
        for name in ("predecessors", "labels", "label_branches"):
            np.testing.assert_array_equal(batch.arrays[name][at][:labels], getattr(row, name))
        assert (batch.arrays["label_branches"][at][labels:] == 0).all()
        assert batch.arrays["pair_mask"][at].sum() == len(row.pairs)
        np.testing.assert_array_equal(batch.arrays["pairs"][at][: len(row.pairs)], row.pairs)


def record_like(made):
    return make_row(TOKENIZER, made, RATED.choose(made)[0])


def test_pixels_are_each_rows_own(corpus):
    images = source(corpus, USABLE, seed=None, rows=4).batch(0).arrays["images"][0]
    assert images.shape == (4, 2, SIDE, SIDE, 3)
    np.testing.assert_array_equal(images[0], [read_image(data, SIDE) for data in corpus[0].images])
    assert not images[1].any()
    np.testing.assert_array_equal(images[2][0], read_image(corpus[3].images[0], SIDE))
    assert not images[2][1].any()


def test_no_images_array_where_no_row_has_one(corpus):
    assert "images" not in source(corpus, indices=[1]).batch(0).arrays


def test_other_hosts_rows_get_no_pixels(corpus):
    mine = np.array([True, False, False, True])
    batch = source(corpus, seed=None, rows=4, local=mine).batch(1)
    everything = source(corpus, seed=None, rows=4).batch(1)
    assert everything.arrays["images"].any(axis=(2, 3, 4, 5)).all()
    assert batch.arrays["images"].any(axis=(2, 3, 4, 5)).tolist() == [mine.tolist()]
    for name in set(batch.arrays) - {"images"}:
        np.testing.assert_array_equal(batch.arrays[name], everything.arrays[name])


def test_a_batch_is_filled_up_with_rows_that_count_nowhere(corpus):
    batch = source(corpus, seed=None, rows=3, padded_rows=8, accumulate=2).batch(1)
    assert batch.ids == [f"row-{n}" for n in range(6, 11)]
    assert batch.arrays["tokens"].shape[:2] == (2, 8)
    counted = batch.arrays["pair_mask"].any(axis=2)
    np.testing.assert_array_equal(counted, batch.arrays["label_branches"].any(axis=2))
    np.testing.assert_array_equal(counted, (batch.arrays["branches"] >= 0).any(axis=2))
    assert counted.sum(axis=1).tolist() == [3, 2]


def test_lengths_come_in_few_sizes():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(n <= size < n + 128 for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 30
    assert [bucket(n) for n in (1, 64, 65, 256, 257, 384, 385)] == [64, 64, 128, 256, 384, 384, 512]


def test_more_than_six_pairs_fit(corpus):
    many = dataclasses.replace(corpus[5], responses=tuple(Response("x" * n) for n in range(1, 6)))
    arrays = collate([record_row(TOKENIZER, many), None], TOKENIZER.end_of_text)
    assert arrays["pairs"].shape == (2, 12, 2)
    assert arrays["pair_mask"].sum(axis=1).tolist() == [10, 0]
    assert arrays["label_branches"].max() == 5


# What is chosen


def test_usable_records_have_a_pair(corpus):
    assert usable_records(corpus, range(11), RATED).tolist() == USABLE
    assert usable_records(corpus, [2], RATED).tolist() == []
    assert usable_records(corpus, range(11), RowOptions("given")).tolist() == []
    assert usable_records(corpus, range(11), RowOptions("longest_as_best")).tolist() == list(range(11))


def test_pairs_follow_the_rule(corpus):
    assert RATED.choose(corpus[3]) == ([(0, 2), (0, 3)], None)
    best = RowOptions({"name": "model_as_best", "model": "model-2"})
    assert best.choose(corpus[3]) == ([(2, 0), (2, 1), (2, 3)], None)
    assert RowOptions("given").choose(given_record(0)) == ([(0, 1)], None)


def test_sft_takes_responses_that_nothing_beats(corpus):
    assert RowOptions("mean_rating", "sft").choose(corpus[4]) == ([], [0])
    tied = record(0, ratings=(2, 5, 5, 1))
    assert RowOptions("mean_rating", "sft").choose(tied) == ([], [1, 2])
    assert not RowOptions("mean_rating", "sft").usable(corpus[2])
    batch = source(corpus, indices=[4], options=RowOptions("mean_rating", "sft")).batch(0)
    assert batch.arrays["label_branches"].max() == 1
    assert not batch.arrays["pair_mask"].any()


# What does not fit


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    records = [record(0), record(1, images=3), record(2, words=40), record(3)]
    return CorpusReader(write_corpus(tmp_path_factory.mktemp("long") / "c", records))


def test_rows_beyond_max_length_are_cut_or_left_out_and_named(long_corpus):
    batch = source(long_corpus, seed=None, rows=4, options=RowOptions("mean_rating", "dpo", 600, 400)).batch(0)
    assert batch.ids == ["row-0", "row-1", "row-2", "row-3"]
    assert list(batch.dropped) == ["row-1"]
    assert "3 images" in batch.dropped["row-1"]
    assert "max_length = 600" in batch.dropped["row-1"]
    assert list(batch.truncated) == ["row-2"]
    assert batch.truncated["row-2"].startswith("left out ")
    tokens, used = batch.arrays["tokens"][0], batch.arrays["pair_mask"][0].any(axis=1)
    assert used.tolist() == [True, False, True, True]
    # No picture is cut: every <img> is followed by 256 rows and </img>.
    for row in tokens[used]:
        (start,) = np.flatnonzero(row == TOKENIZER.img)
        assert row[start + 257] == TOKENIZER.img_end
    assert batch.arrays["images"].shape[2] == 1  # the row with three pictures is not there


def test_a_batch_may_be_left_out_whole(long_corpus):
    batch = source(long_corpus, seed=None, rows=4, options=RowOptions("mean_rating", "dpo", 200)).batch(0)
    assert len(batch.dropped) == 4
    assert not batch.arrays["pair_mask"].any()
    assert "images" not in batch.arrays


def test_an_image_that_cannot_be_read_names_its_record():
    broken = Record("row-7", (image_bytes(1), b"no image"), "What?", (Response("a"), Response("b")))
    row = make_row(TOKENIZER, broken, [(0, 1)])
    with pytest.raises(UserError, match=r"record 'row-7', image 2: .*import the corpus anew"):
        decode_images([None, row], SIDE)
