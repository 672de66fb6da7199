"""Responses with views of their own: segments of one row, and what the rows of a corpus without any stay."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import ROW
from silkie_jax.preference.batches import BatchSource, RowOptions, collate, decode_images
from silkie_jax.preference.counts import response_lengths
from silkie_jax.preference.grid import Grid, make_shape
from silkie_jax.preference.layout import SIZES, lay_out, row_sizes
from silkie_jax.preference.plan import Plan
from silkie_jax.preference.rows import RowTooLong, make_row, pack_row, packed_length, unpack_row
from tests.training.support import SIDE, image_bytes, record, write_corpus

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
FIELDS = ("tokens", "positions", "branches", "predecessors", "labels", "label_branches")


def shown(*views, images=2, texts="abcdefgh", history=()):
    """A record whose responses have these views."""
    responses = tuple(
        Response(text * (n + 1), images=view) for n, (text, view) in enumerate(zip(texts, views, strict=False))
    )
    return Record("r", tuple(b"image %d" % n for n in range(images)), "Q?", responses, tuple(history))


def alone(made, index):
    """The record with one response, and with the images that it shows."""
    images = tuple(made.images[n] for n in made.view(index))
    return Record("r", images, made.prompt, (Response(made.responses[index].text),), made.history)


def branch(row, number):
    """What branch `number` (from 1) stands for: tokens of its sequence, where its labels are, and its images."""
    counted = row.label_branches == number
    own = row.branches[row.predecessors[counted][-1]]  # of the last label but one, which the branch holds itself
    prompt, answer = (np.flatnonzero(row.branches == at) for at in (own & -ROW, own))
    sequence = row.tokens[[*prompt, *answer]]
    assert row.positions[[*prompt, *answer]].tolist() == list(range(len(sequence)))
    at = row.positions[row.predecessors[counted]] + 1
    assert row.predecessors[counted][0] == prompt[-1]
    assert (sequence[at] == row.labels[counted]).all()
    spans = zip(np.flatnonzero(row.tokens == BYTES.img), row.spans, strict=True)
    images = [row.images[image] for place, image in spans if row.branches[place] == own & -ROW]
    return sequence.tolist(), at.tolist(), images


def check_separate(made, row, **lengths):
    """Every branch is what the response with its own images would be in a row of its own."""
    for place, index in enumerate(row.responses):
        single = make_row(BYTES, alone(made, index), responses=[0], **lengths)
        assert branch(row, place + 1) == branch(single, 1)


def test_the_layout_of_an_image_pair():
    made = shown((0,), (1,))
    row = make_row(BYTES, made, [(0, 1)])
    assert row.images == made.images
    assert row.spans == (0, 1)
    assert (row.segments, row.pairs.tolist(), row.responses) == (2, [[0, 1]], (0, 1))
    assert np.unique(row.branches).tolist() == [0, 1, ROW, ROW + 1]
    assert (np.diff(row.branches) >= 0).all()
    assert row.tokens.tolist().count(BYTES.img) == 2
    check_separate(made, row)
    assert response_lengths(row.branches) == [tuple(lengths) for lengths in _lengths(row)]


def _lengths(row):
    for segment in range(row.segments):
        counts = np.bincount(row.branches[row.branches // ROW == segment] - segment * ROW).tolist()
        yield counts[0], counts[1:]


def test_an_image_that_several_segments_show_is_there_once():
    made = shown((0, 2), (2,), (2, 0), (), (0, 2), images=4)
    row = make_row(BYTES, made, [(0, 1), (2, 4), (3, 0)])
    assert row.images == (made.images[0], made.images[2])
    assert row.spans == (0, 1, 1, 1, 0)
    assert row.views.segments == (0, 1, 2, 3, 0)  # the first and the last stand together
    assert np.unique(row.branches).tolist() == [0, 1, 2, ROW, ROW + 1, 2 * ROW, 2 * ROW + 1, 3 * ROW, 3 * ROW + 1]
    assert row.pairs.tolist() == [[0, 1], [2, 4], [3, 0]]
    check_separate(made, row)


def test_a_response_that_names_all_images_has_no_view():
    plain, named = (make_row(BYTES, shown(view, None), [(0, 1)]) for view in (None, (0, 1)))
    assert plain.views is named.views is None
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(plain, name), getattr(named, name))
    assert row_sizes(plain) == row_sizes(named)
    np.testing.assert_array_equal(pack_row(plain), pack_row(named))


def test_a_condition_follows_the_question_of_its_own_responses():
    made = shown(None, None, None)
    conditions = {0: "Good:1", 2: "Good:1"}
    row = make_row(BYTES, made, responses=range(3), conditions=conditions)
    assert row.views.segments == (0, 1, 0)
    assert row.spans == (0, 1, 0, 1)
    for place, condition in enumerate(("\nGood:1", "", "\nGood:1")):
        asked = Record("r", made.images, f"Q?{condition}", made.responses)
        assert branch(row, place + 1) == branch(make_row(BYTES, asked, responses=[place]), 1)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_branches_of_views_are_the_separate_sequences(data):
    """Also where truncation is at work, and through the form in which rows are kept."""
    images = data.draw(st.integers(0, 2))
    orders = [list(order) for count in range(images + 1) for order in itertools.permutations(range(images), count)]
    views = data.draw(st.lists(st.none() | st.sampled_from(orders).map(tuple), min_size=1, max_size=4))
    made = shown(*views, images=images, history=data.draw(st.sampled_from([(), (("Hello", "Hi"),)])))
    conditions = {n: f"A:{n % 2}" for n in range(len(views)) if data.draw(st.booleans())}
    lengths = {"max_length": data.draw(st.integers(60, 900)), "max_prompt_length": 50}
    chosen = data.draw(st.permutations(range(len(views))))
    try:
        row = make_row(BYTES, made, responses=chosen, conditions=conditions, **lengths)
    except RowTooLong:
        return
    for place, index in enumerate(chosen):
        one = make_row(BYTES, made, responses=[index], conditions=conditions, **lengths)
        assert branch(row, place + 1) == branch(one, 1)
        assert branch(row, place + 1)[2] == [made.images[n] for n in made.view(index)]
    packed = pack_row(row)
    assert len(packed) == packed_length(*(np.array(row_sizes(row))[i] for i in (0, 4, 2, 3, 6, 7)))
    again = unpack_row(packed, row.id, made.images)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(row, name))
        assert getattr(again, name).dtype == np.int32
    for name in ("id", "responses", "images", "views", "dropped_prompt", "dropped_responses"):
        assert getattr(again, name) == getattr(row, name)
    np.testing.assert_array_equal(again.tokens, unpack_row(packed, row.id, ()).tokens)


# In a batch


def test_packed_rows_number_segments_and_images():
    """Two rows with views and one without in a sequence: as many segments, each with its own images."""
    rows = [
        make_row(BYTES, made, [(0, 1)])
        for made in (shown((0,), (1,)), shown(None, None), shown((1,), (1, 0), texts="xyz"))
    ]
    sizes = np.array([row_sizes(row) for row in rows])
    shape = make_shape(1, 1, sizes.sum(0, keepdims=True))
    arrays = collate([rows], shape, BYTES.end_of_text)
    used = arrays["branches"][0] >= 0
    assert np.unique(arrays["branches"][0][used]).tolist() == [
        n + ROW * segment for segment, count in enumerate([1, 1, 2, 1, 1]) for n in range(count + 1)
    ]
    assert arrays["spans"][0].tolist() == [0, 1, 2, 3, 5, 5, 4]
    assert (shape.spans, shape.images) == (7, 6)
    tokens, predecessors = arrays["tokens"][0], arrays["predecessors"][0]
    counted = arrays["label_branches"][0] > 0
    assert (arrays["branches"][0][predecessors[counted]] // ROW).tolist() == [
        first + row.branches[place] // ROW
        for first, row in zip((0, 2, 3), rows, strict=True)
        for place in row.predecessors
    ]
    assert (tokens[used] == np.concatenate([row.tokens for row in rows])).all()
    assert arrays["pairs"][0][arrays["pair_mask"][0]].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_no_spans_where_no_row_has_a_view():
    rows = [make_row(BYTES, shown(None, None), [(0, 1)])] * 2
    shape = make_shape(1, 2, [np.array(row_sizes(row)) for row in rows])
    assert shape.spans == 0
    assert "spans" not in collate([[row] for row in rows], shape, BYTES.end_of_text)
    text = make_row(BYTES, shown(None, None, images=0), responses=[0, 1], conditions={0: "A:1"})
    assert text.segments == 2
    assert make_shape(1, 1, [np.array(row_sizes(text))]).spans == 0


# In a corpus


def image_pair(number):
    """One text under two images, the first its own."""
    pictures = (image_bytes(number), image_bytes(1000 + number))
    texts = (Response("A red circle.", images=(0,)), Response("A red circle.", images=(1,)))
    return Record(f"pair-{number}", pictures, "What is it?", texts, pairs=((0, 1),))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Without views, and with some."""
    folder = tmp_path_factory.mktemp("views")
    plain = [record(n) for n in range(3)]
    return [
        CorpusReader(write_corpus(folder / name, records))
        for name, records in (("plain", plain), ("views", [*plain, image_pair(3), image_pair(4)]))
    ]


def lay(corpus, options):
    return lay_out(corpus, lambda made: options.row(BYTES, made), options.key(corpus, BYTES))


def test_rows_with_views_are_kept_and_those_without_are_kept_as_before(corpora):
    options = RowOptions("longest_as_best")
    widths = [lay(corpus, options).sizes.shape[1] for corpus in corpora]
    assert widths == [len(SIZES), len(SIZES)]  # equal texts are no pair of this rule
    given = RowOptions(None, "sft", imitate="all")
    plain, views = (lay(corpus, given) for corpus in corpora)
    assert plain.sizes.shape == (3, len(SIZES))
    assert views.sizes.shape == (5, len(SIZES) + 2)
    np.testing.assert_array_equal(views.sizes[:3, : len(SIZES)], plain.sizes)
    again = lay(corpora[1], given)
    assert again.has_rows
    for number, made in enumerate(corpora[1]):
        kept, row = again.row(number, made.id, made.images), given.row(BYTES, made)
        assert kept.views == row.views
        assert kept.images == row.images
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(kept, name), getattr(row, name))
    files = [corpus.path / "rows" for corpus in corpora]
    assert all(len(list(folder.glob("*.tokens"))) == 2 for folder in files)


@pytest.mark.parametrize("pack", [None, 3000])
def test_batches_hold_views_beside_rows_without(corpora, pack):
    options = RowOptions(None, "sft", imitate="all")
    sizes = lay(corpora[1], options).sizes
    plan = Plan(sizes, 5, seed=None)
    grid = Grid(plan, rows=5, pack=pack)
    batch = BatchSource(corpora[1], np.arange(5), grid, BYTES, options, image_size=SIDE).batch(0)
    spans, images = batch.arrays["spans"][0], batch.arrays["images"][0]
    assert batch.work.images == 7  # each of an instruction's once
    assert batch.arrays["tokens"].shape[1:] == (batch.shape.sequences, batch.shape.tokens)
    assert grid.shape(0) == batch.shape
    rows = [options.row(BYTES, made) for made in corpora[1]]
    if pack is None:
        expected = decode_images([[row] for row in rows], 2, SIDE)["images"]
        np.testing.assert_array_equal(images, expected)
        assert spans.tolist() == [[0, 0]] * 3 + [[0, 1]] * 2
    assert batch.work.tokens == sum(len(row.tokens) for row in rows)
    assert batch.work.visible == sum(
        length * (length + 1) // 2 + sum(length * n + n * (n + 1) // 2 for n in more)
        for row in rows
        for length, more in _lengths(row)
    )
