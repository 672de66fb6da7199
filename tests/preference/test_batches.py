"""From a corpus to the arrays of a step: order, padding, what is left out and what is said about it."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference import layout as layouts
from silkie_jax.preference.batches import BatchSource, RowOptions, decode_images
from silkie_jax.preference.grid import Grid, bucket, first_fit
from silkie_jax.preference.layout import TOO_LONG, UNUSABLE, lay_out, published
from silkie_jax.preference.plan import Plan
from silkie_jax.preference.rows import Row, make_row
from tests.training.support import SIDE, collated, given_record, image_bytes, record, record_row, write_corpus

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


def laid_out(corpus, options=RATED):
    return lay_out(corpus, lambda record: options.row(TOKENIZER, record), options.key(corpus, TOKENIZER))


def measured(corpus, options=RATED):
    return laid_out(corpus, options).sizes


def source(
    corpus,
    indices=None,
    options=RATED,
    *,
    rows=2,
    accumulate=1,
    seed=0,
    pairs=None,
    shards=1,
    pack=None,
    tokens=None,
    **arguments,
):
    """Batches of all usable records, or of `indices`."""
    sizes = measured(corpus, options)
    indices = np.flatnonzero(sizes[:, 0] > TOO_LONG) if indices is None else np.asarray(indices)
    plan = Plan(sizes[indices], rows * accumulate, pairs, seed)
    grid = Grid(plan, rows=rows, accumulate=accumulate, shards=shards, pack=pack, tokens=tokens)
    return BatchSource(corpus, indices, grid, TOKENIZER, options, **{"image_size": SIDE} | arguments)


def drawn(batches, step):
    return batches.indices[batches.grid.plan.records(step)].tolist()


# Order


@pytest.mark.parametrize(("rows", "accumulate"), [(1, 1), (2, 1), (2, 2), (4, 3), (16, 1)])
def test_an_epoch_has_every_row_once(corpus, rows, accumulate):
    batches = source(corpus, rows=rows, accumulate=accumulate)
    size = rows * accumulate
    assert batches.steps_per_epoch == -(-10 // size)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        found = [drawn(batches, step) for step in steps]
        assert sorted(map(len, found), reverse=True) == [size] * (10 // size) + [10 % size] * bool(10 % size)
        epochs.append(list(itertools.chain(*found)))
        assert sorted(epochs[-1]) == USABLE
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_step_alone(corpus):
    def order(steps, **arguments):
        batches = source(corpus, rows=3, **arguments)
        return [drawn(batches, step) for step in steps]

    forward = order(range(8), seed=5)
    assert order(reversed(range(8)), seed=5) == forward[::-1]
    assert order(range(6, 8), seed=5) == forward[6:]
    assert order(range(8), seed=6) != forward
    assert order(range(4), seed=None) == [[0, 1, 3], [4, 5, 6], [7, 8, 9], [10]]


def test_rows_of_a_step_are_of_like_length():
    lengths = np.random.default_rng(0).integers(100, 1000, 500)
    sizes = np.stack([lengths, *[np.ones_like(lengths)] * 5], axis=1)
    plan = Plan(sizes, rows=8)
    widths = [np.ptp(lengths[plan.records(step)]) for step in range(plan.steps_per_epoch)]
    assert np.median(widths) < 30
    middles = [lengths[plan.records(step)].mean() for step in range(plan.steps_per_epoch)]
    assert abs(np.corrcoef(np.arange(len(middles)), middles)[0, 1]) < 0.3  # lengths do not grow through an epoch


def test_a_limit_on_pairs_keeps_rows_whole():
    pairs = np.random.default_rng(0).integers(1, 7, 200)
    sizes = np.stack([np.full(200, 10), np.ones(200, int), pairs, *[np.ones(200, int)] * 3], axis=1)
    plan = Plan(sizes, rows=10, pairs=16)
    for epoch in range(2):
        steps = plan.epoch(epoch)
        assert sorted(np.concatenate(steps)) == list(range(200))
        assert all(pairs[step].sum() <= 16 and len(step) <= 10 for step in steps)
    last = len(plan.epoch(0)) + len(plan.epoch(1)) - 1
    np.testing.assert_array_equal(plan.records(last), plan.epoch(1)[-1])
    assert plan.steps_of(2) == last + 1


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
    return RATED.row(TOKENIZER, made)


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
    batch = source(corpus, seed=None, rows=4, local=lambda count: mine).batch(1)
    everything = source(corpus, seed=None, rows=4).batch(1)
    assert everything.arrays["images"].any(axis=(2, 3, 4, 5)).all()
    assert batch.arrays["images"].any(axis=(2, 3, 4, 5)).tolist() == [mine.tolist()]
    for name in set(batch.arrays) - {"images"}:
        np.testing.assert_array_equal(batch.arrays[name], everything.arrays[name])


def test_a_batch_is_filled_up_with_rows_that_count_nowhere(corpus):
    batch = source(corpus, seed=None, rows=3, shards=8, accumulate=2).batch(1)
    assert batch.ids == [f"row-{n}" for n in range(7, 11)]
    assert batch.arrays["tokens"].shape[:2] == (2, 8)
    counted = batch.arrays["pair_mask"].any(axis=2)
    np.testing.assert_array_equal(counted, batch.arrays["label_branches"].any(axis=2))
    np.testing.assert_array_equal(counted, (batch.arrays["branches"] >= 0).any(axis=2))
    assert counted.sum(axis=1).tolist() == [3, 1]
    assert batch.work.rows == 4


def test_lengths_come_in_few_sizes():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(n <= size < n + 128 for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 30
    assert [bucket(n) for n in (1, 64, 65, 256, 257, 384, 385)] == [64, 64, 128, 256, 384, 384, 512]
    fine = {1: 64, 65: 128, 256: 256, 257: 288, 930: 960, 1024: 1024, 1025: 1088, 2048: 2048, 2049: 2176}
    assert {n: bucket(n, fine=True) for n in fine} == fine


def test_more_than_six_pairs_fit(corpus):
    many = dataclasses.replace(corpus[5], responses=tuple(Response("x" * n) for n in range(1, 6)))
    arrays = collated([record_row(TOKENIZER, many), None], TOKENIZER.end_of_text)
    assert arrays["pairs"].shape == (2, 12, 2)
    assert arrays["pair_mask"].sum(axis=1).tolist() == [10, 0]
    assert arrays["label_branches"].max() == 5


# What is chosen


def test_short_rows_are_packed_into_one_sequence(corpus):
    plain = source(corpus, seed=None, rows=5).batch(0)
    packed = source(corpus, seed=None, rows=5, pack=1500).batch(0)
    assert packed.arrays["tokens"].shape[1] < plain.arrays["tokens"].shape[1]
    assert packed.arrays["tokens"].shape[2] <= bucket(1500)
    assert sorted(packed.ids) == sorted(plain.ids)
    assert packed.work == plain.work
    assert packed.arrays["pair_mask"].sum() == plain.arrays["pair_mask"].sum()
    # Branches of the second row of a sequence are numbered from 64, its labels point into its own tokens.
    tokens, branches = packed.arrays["tokens"][0, 0], packed.arrays["branches"][0, 0]
    assert 64 in branches
    first = packed.arrays["predecessors"][0, 0][packed.arrays["label_branches"][0, 0] > 4]
    assert (branches[first] >= 64).all()
    assert (tokens[first[first > 0]] != TOKENIZER.end_of_text).all()


def long_rows(count=300):
    """Sizes of rows up to 3,000 tokens, few of them long."""
    tokens = np.minimum(np.random.default_rng(0).lognormal(6, 0.7, count).astype(int) + 60, 3000)
    return np.stack([tokens, tokens // 2, *[np.ones(count, int)] * 4], axis=1)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("pack", [None, 1200])
@pytest.mark.parametrize(("rows", "accumulate", "pairs"), [(16, 1, None), (32, 2, None), (24, 1, 20)])
def test_a_limit_on_tokens_makes_more_batches_of_the_same_steps(rows, accumulate, pairs, pack, shards):
    """Each record once an epoch, in the step that it would be in anyway, and no batch beyond the limit."""
    plan = Plan(long_rows(), rows * accumulate, pairs)
    limited = Grid(plan, rows=rows, accumulate=accumulate, shards=shards, pack=pack, tokens=13000)
    free = Grid(plan, rows=rows, accumulate=accumulate, shards=shards, pack=pack)
    seen, more = [], 0
    for step in range(plan.steps_per_epoch):
        shape, batches = limited.shape(step), limited.batches(step)
        assert shape.sequences * shape.tokens <= 13000
        assert shape.sequences % shards == 0
        assert {len(groups) for groups in batches} == {shape.sequences}
        assert len(batches) == shape.batches
        inside = [record for groups in batches for group in groups for record in group]
        assert sorted(inside) == sorted(plan.records(step))
        seen += inside
        if free.shape(step).sequences * shape.tokens <= 13000:
            assert batches == free.batches(step)
        more += shape.batches > free.shape(step).batches == accumulate
    assert sorted(seen) == list(range(300))
    assert more
    shapes = limited.shapes(range(plan.steps_per_epoch))
    assert len({shape.key for shape in shapes}) == len(shapes)


def test_a_row_that_is_longer_than_the_limit_on_tokens_is_refused():
    sizes = long_rows()
    sizes[7, 0] = 3000
    Grid(Plan(sizes, 8), rows=8, shards=4, tokens=4 * 3072)
    with pytest.raises(UserError) as caught:
        Grid(Plan(sizes, 8), rows=8, shards=4, tokens=4 * 3072 - 1)
    assert str(caught.value) == (
        "batch_tokens 12287: rows are up to 3072 tokens long and 4 go at once (mesh data x fsdp), which makes 12288; "
        "set batch_tokens to that or more, or max_length to less"
    )


def test_batches_under_a_limit_on_tokens_hold_the_same_rows(corpus):
    plain, limited = (source(corpus, rows=4, seed=None, tokens=tokens).batch(0) for tokens in (None, 2100))
    assert plain.arrays["tokens"].shape[:2] == (1, 4)
    assert limited.arrays["tokens"].shape[:2] == (2, 2)
    assert (limited.ids, limited.work) == (plain.ids, plain.work)
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(limited.arrays[name].reshape(array.shape), array, err_msg=name)


@pytest.mark.parametrize("capacity", [10, 17, 100])
def test_first_fit_keeps_everything_and_the_capacity(capacity):
    lengths = np.random.default_rng(1).integers(1, 11, 60).tolist()
    groups = first_fit(lengths, capacity)
    assert sorted(itertools.chain(*groups)) == list(range(60))
    totals = [sum(lengths[i] for i in group) for group in groups]
    assert max(totals) <= capacity
    assert len(groups) <= -(-sum(lengths) // capacity) * 1.3 + 1


def test_one_shape_a_length(corpus):
    batches = source(corpus, rows=2)
    steps = range(3 * batches.steps_per_epoch)
    shapes = batches.grid.shapes(steps)
    assert len({shape.key for shape in shapes}) == len(shapes)
    for step in steps:
        batch = batches.batch(step)
        assert batch.shape in shapes
        assert batch.arrays["labels"].shape == (1, batch.shape.sequences, batch.shape.labels)


def test_stored_log_probabilities_go_to_their_branches(corpus):
    def stored(record, responses):
        return np.array([100 * record + i for i in responses], np.float32)

    batch = source(corpus, seed=None, rows=4, reference=stored).batch(0)
    np.testing.assert_array_equal(
        batch.arrays["reference_logps"][0],
        [[0, 1, 2, 3], [100, 101, 102, 103], [300, 302, 303, 0], [400, 401, 402, 403]],
    )


def test_usable_records_have_a_pair(corpus):
    def usable(options):
        return np.flatnonzero(measured(corpus, options)[:, 0] != UNUSABLE).tolist()

    assert usable(RATED) == USABLE
    assert usable(RowOptions("given")) == []
    assert usable(RowOptions("longest_as_best")) == list(range(11))


def test_pairs_follow_the_rule(corpus):
    row = RATED.row(TOKENIZER, corpus[3])  # response 1 has no rating and is not laid out
    assert row.responses == (0, 2, 3)
    assert row.pairs.tolist() == [[0, 1], [0, 2]]
    best = RowOptions({"name": "model_as_best", "model": "model-2"}).row(TOKENIZER, corpus[3])
    assert best.pairs.tolist() == [[2, 0], [2, 1], [2, 3]]
    assert RowOptions("given").row(TOKENIZER, given_record(0)).pairs.tolist() == [[0, 1]]


def test_sft_takes_responses_that_nothing_beats(corpus):
    sft = RowOptions("mean_rating", "sft")
    assert sft.row(TOKENIZER, corpus[4]).responses == (0,)
    assert sft.row(TOKENIZER, record(0, ratings=(2, 5, 5, 1))).responses == (1, 2)
    assert sft.row(TOKENIZER, corpus[2]) is None
    batch = source(corpus, indices=[4], options=sft).batch(0)
    assert batch.arrays["label_branches"].max() == 1
    assert not batch.arrays["pair_mask"].any()


def test_sft_takes_all_responses_or_the_best_one_whatever_their_pairs(corpus):
    everything, best = RowOptions(None, "sft", imitate="all"), RowOptions(None, "sft", imitate="best")
    tied, unrated = corpus[2], given_record(0)
    assert everything.row(TOKENIZER, tied).responses == (0, 1, 2, 3)
    assert everything.row(TOKENIZER, corpus[3]).responses == (0, 1, 2, 3)  # one of them has no rating
    assert everything.row(TOKENIZER, unrated).responses == (0, 1)
    assert everything.row(TOKENIZER, dataclasses.replace(tied, responses=())) is None
    assert best.row(TOKENIZER, tied).responses == (0,)
    assert best.row(TOKENIZER, record(0, ratings=(2, 5, 5, 1))).responses == (1,)
    assert best.row(TOKENIZER, record(0, ratings=(3,))).responses == (0,)
    assert best.row(TOKENIZER, unrated) is None
    batch = source(corpus, indices=[2], options=everything, rows=1).batch(0)
    assert set(batch.arrays["label_branches"].ravel()) == {0, 1, 2, 3, 4}
    assert not batch.arrays["pair_mask"].any()
    assert (batch.work.rows, batch.work.responses, batch.work.pairs) == (1, 4, 0)


def test_sft_takes_the_best_response_where_it_is_good_enough(corpus):
    rule = {"name": "best", "weights": {"Helpfulness": 1, "Visual Faithfulness": 1}, "at_least": 9}
    good = RowOptions(None, "sft", imitate=rule)
    assert good.row(TOKENIZER, corpus[4]).responses == (0,)  # 10
    assert good.row(TOKENIZER, corpus[2]) is None  # 8, all of them
    sizes = measured(corpus, good)
    assert (sizes[:, 4] == [1, 1, 0, *[1] * 8]).all()
    assert good.key(corpus, TOKENIZER)["imitate"] == rule


def test_rows_of_one_choice_are_not_taken_for_those_of_another(corpus):
    branches = {}
    for imitate, rule in (("chosen", "mean_rating"), ("all", None), ("best", None)):
        branches[imitate] = measured(corpus, RowOptions(rule, "sft", imitate=imitate))[:, 4].tolist()
    # What nothing beats: both of two equals; nobody where all are equal; a rated one.
    assert branches["chosen"] == [1, 1, 0, *[1] * 8]
    assert branches["all"] == [4] * 11
    assert branches["best"] == [1] * 11
    sft = RowOptions("mean_rating", "sft").key(corpus, TOKENIZER)
    assert "imitate" not in sft  # as rows were kept before there was a choice


# What does not fit


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    records = [record(0), record(1, images=3), record(2, words=40), record(3)]
    return CorpusReader(write_corpus(tmp_path_factory.mktemp("long") / "c", records))


def test_rows_beyond_max_length_are_cut_or_known_to_be_too_long(long_corpus):
    options = RowOptions("mean_rating", "dpo", 600, 400)
    sizes = measured(long_corpus, options)
    assert (sizes[:, 0] == TOO_LONG).tolist() == [False, True, False, False]
    assert (sizes[:, -1] > 0).tolist() == [False, False, True, False]
    batch = source(long_corpus, seed=None, rows=4, options=options).batch(0)
    assert batch.ids == ["row-0", "row-2", "row-3"]
    tokens, used = batch.arrays["tokens"][0], batch.arrays["pair_mask"][0].any(axis=1)
    assert used.tolist() == [True, True, True, False]
    # No picture is cut: every <img> is followed by 256 rows and </img>.
    for row in tokens[used]:
        (start,) = np.flatnonzero(row == TOKENIZER.img)
        assert row[start + 257] == TOKENIZER.img_end
    assert batch.arrays["images"].shape[2] == 1  # the row with three pictures is not there


def never(record):
    raise AssertionError("laid out again")


def test_rows_are_kept_beside_the_corpus_under_what_they_depend_on(corpus):
    laid_out(corpus)
    kept = set((corpus.path / "rows").glob("*.npy"))
    assert kept
    again = lay_out(corpus, never, RATED.key(corpus, TOKENIZER))
    assert again.has_rows
    assert (again.sizes == measured(corpus)).all()
    measured(corpus, RowOptions("mean_rating", max_length=500))
    assert len(set((corpus.path / "rows").glob("*.npy")) - kept) == 1


@pytest.mark.parametrize(
    "options", [RATED, RowOptions("mean_rating", "sft"), RowOptions("longest_as_best", "dpo", 600, 400)]
)
def test_kept_rows_are_the_rows(long_corpus, options):
    """Cut ones, too, and what is unusable has none."""
    layout = laid_out(long_corpus, options)
    for number in np.flatnonzero(layout.sizes[:, 0] > TOO_LONG):
        whole = long_corpus[number]
        kept, row = layout.row(number, whole.id, whole.images), options.row(TOKENIZER, whole)
        for field in dataclasses.fields(Row):
            ours, expected = getattr(kept, field.name), getattr(row, field.name)
            assert np.array_equal(ours, expected), field.name
            assert type(ours) is type(expected), field.name
            assert getattr(ours, "dtype", None) == getattr(expected, "dtype", None), field.name


@pytest.mark.parametrize("pack", [None, 1500])
def test_batches_of_kept_rows_are_the_batches(corpus, pack):
    layout = laid_out(corpus)
    for step in range(3):
        kept, fresh = (source(corpus, pack=pack, layout=given).batch(step) for given in (layout, None))
        assert (kept.ids, kept.work, kept.shape) == (fresh.ids, fresh.work, fresh.shape)
        assert kept.arrays.keys() == fresh.arrays.keys()
        for name, array in fresh.arrays.items():
            np.testing.assert_array_equal(kept.arrays[name], array, err_msg=name)


def test_rows_that_were_cut_short_on_disk_are_laid_out_again(corpus):
    layout = laid_out(corpus)
    for file in (corpus.path / "rows").glob("*.tokens"):
        file.write_bytes(file.read_bytes()[:-4])
    again = laid_out(corpus)
    assert again.has_rows
    np.testing.assert_array_equal(again.sizes, layout.sizes)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_hosts_that_lay_out_at_once_the_first_ones_file_stays(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "rows.tokens"
    with published(path) as ours:
        with published(path) as theirs:
            theirs.write(b"the rows")
        first = path.stat().st_ino
        ours.write(b"the rows")
    assert path.stat().st_ino == first
    assert path.read_bytes() == b"the rows"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.tokens"]


def test_a_damaged_file_gives_way(tmp_path):
    (tmp_path / "rows.tokens").write_bytes(b"the ro")
    with published(tmp_path / "rows.tokens") as file:
        file.write(b"the rows")
    assert (tmp_path / "rows.tokens").read_bytes() == b"the rows"


def test_a_second_host_takes_nothing_away_from_the_first(corpus, monkeypatch):
    """It looked before the first one had published. What the first has opened must stay where it is."""
    shutil.rmtree(corpus.path / "rows", ignore_errors=True)
    look, first = layouts._load, {}

    def look_too_early(file, records):
        monkeypatch.setattr(layouts, "_load", look)
        first["layout"] = laid_out(corpus)
        first["files"] = {path: path.stat().st_ino for path in file.parent.iterdir()}

    monkeypatch.setattr(layouts, "_load", look_too_early)
    assert laid_out(corpus).has_rows
    assert first["layout"].has_rows
    assert len(first["files"]) == 2
    assert {path: path.stat().st_ino for path in (corpus.path / "rows").iterdir()} == first["files"]


def test_an_empty_table_is_made_again(corpus):
    layout = laid_out(corpus)
    for file in (corpus.path / "rows").glob("*.npy"):
        file.write_bytes(b"")
    np.testing.assert_array_equal(laid_out(corpus).sizes, layout.sizes)


def test_a_corpus_that_cannot_be_written_to_keeps_nothing(corpus, monkeypatch):
    """Its rows are laid out anew for every batch."""
    expected = source(corpus).batch(0)

    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    layout = lay_out(corpus, lambda record: RATED.row(TOKENIZER, record), {"another": "key"})
    assert not layout.has_rows
    batch = source(corpus, layout=layout).batch(0)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(batch.arrays[name], array, err_msg=name)


def test_an_image_that_cannot_be_read_names_its_record():
    broken = Record("row-7", (image_bytes(1), b"no image"), "What?", (Response("a"), Response("b")))
    row = make_row(TOKENIZER, broken, [(0, 1)])
    with pytest.raises(UserError, match=r"record 'row-7', image 2: not an image"):
        decode_images([[], [row]], 2, SIDE)
