"""A record survives the disk exactly, and TFDS reads what we write."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie_jax.corpus.schema import Record, Response, features, from_example, to_example

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(allow_infinity=False, allow_nan=False) | st.just(math.nan)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
responses = st.builds(
    Response, texts, texts, st.dictionaries(texts, numbers, max_size=3), st.dictionaries(texts, texts, max_size=3)
)
records = st.builds(
    Record,
    id=texts,
    images=st.lists(st.binary(max_size=50), max_size=3).map(tuple),
    prompt=texts,
    responses=st.lists(responses, min_size=2, max_size=4).map(tuple),
    history=st.lists(st.tuples(texts, texts), max_size=3).map(tuple),
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=3).map(tuple),
    source=texts,
    extra=st.dictionaries(texts, json_values, max_size=3),
)


@st.composite
def viewed(draw):
    """Records with responses that name their images."""
    record = draw(records)
    of = st.none() | st.permutations(range(len(record.images))).flatmap(
        lambda order: st.integers(0, len(order)).map(lambda count: tuple(order[:count]))
    )
    return replace(record, responses=tuple(replace(response, images=draw(of)) for response in record.responses))


@settings(deadline=None, max_examples=60)
@given(records | viewed())
def test_round_trip_is_exact(record):
    data = to_example(record)
    assert from_example(data) == record
    assert to_example(from_example(data)) == data
    assert list(from_example(data).responses[0].ratings) == list(record.responses[0].ratings)  # the order too


@settings(deadline=None, max_examples=20)
@given(records | viewed())
def test_the_layout_is_that_of_tfds(record):
    """TFDS, given the same content, writes the same message (but for the order of its fields)."""
    from tensorflow_datasets.proto import tf_example_pb2

    ours = tf_example_pb2.Example.FromString(to_example(record))
    stored = {key: list(value.bytes_list.value) for key, value in ours.features.feature.items()}
    example = {
        "id": record.id,
        "images": list(record.images),
        "prompt": record.prompt,
        "history": [{"user": user, "assistant": assistant} for user, assistant in record.history],
        "responses": [
            {"text": r.text, "model": r.model, "ratings": ratings, "rationales": rationales}
            | ({"images": json.dumps(r.images, separators=(",", ":"))} if record.has_views else {})
            for r, ratings, rationales in zip(
                record.responses, stored["responses/ratings"], stored["responses/rationales"], strict=True
            )
        ],
        "pairs": [{"chosen": chosen, "rejected": rejected} for chosen, rejected in record.pairs],
        "source": record.source,
        "extra": stored["extra"][0],
    }
    form = features(record.has_views)
    theirs = form.serialize_example(form.encode_example(example))
    assert tf_example_pb2.Example.FromString(theirs) == ours


def test_bytes_do_not_depend_on_the_process():
    code = (
        "import hashlib; from silkie_jax.corpus.schema import *;"
        "record = Record('a', (b'i',), 'p', (Response('t', 'm', {'x': 1.0}), Response('u')), extra={'k': [1]});"
        "print(hashlib.sha256(to_example(record)).hexdigest())"
    )
    hashes = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(hashes) == 1


def test_a_record_without_views_has_the_bytes_that_it_had_before_there_were_views():
    plain = Record("a", (b"i", b"j"), "p", (Response("t", "m", {"x": 1.0}), Response("u")), extra={"k": [1]})
    digest = hashlib.sha256(to_example(plain)).hexdigest()
    assert digest == "6c63e30a0717207e26ebca0cbbf7cf179f28e741a255b59cd8749856e811aad8"
    assert not plain.has_views
    assert [plain.view(0), plain.view(1)] == [(0, 1)] * 2
    own = replace(plain, responses=(replace(plain.responses[0], images=(1,)), plain.responses[1]))
    assert own.has_views
    assert [own.view(0), own.view(1)] == [(1,), (0, 1)]
    assert from_example(to_example(own)) == own


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="not a"):
        from_example(b"\xff\xff")
    with pytest.raises(ValueError, match="lacks id"):
        from_example(b"")
    with pytest.raises(ValueError, match="pair"):
        Record("a", (), "p", (Response("x"),), pairs=((0, 1),))
    for images in ((1,), (-1,), (0, 0)):
        with pytest.raises(ValueError, match="record a: response 0 shows images"):
            Record("a", (b"i",), "p", (Response("x", images=images),))
    with pytest.raises(UnicodeEncodeError):
        to_example(Record("a", (), "\ud800", ()))


def test_neither_jax_nor_tensorflow_is_imported():
    code = (
        "import sys, silkie_jax.corpus.pairs, data_prep.tables.vlfeedback, data_prep.tables.given_pairs;"
        "silkie_jax.corpus.schema.features();"
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
