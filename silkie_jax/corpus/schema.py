"""What one instruction looks like, in Python and on disk.

A record is one instruction with everything known about it: its images as encoded bytes, the prompt, earlier turns,
every response with its ratings and rationales, and, for data that comes as pairs, the pairs themselves. Which
responses are compared is decided at training time (`pairs.py`).

On disk a record is a `tf.train.Example` in the layout that TFDS gives `features()`, so anybody's
`tfds.builder_from_directory(path).as_data_source("train")` reads it. It is encoded here rather than by TFDS because
TFDS leaves the order of the fields to chance: the same record would give other bytes in every process.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_RESPONSES = 63
"""Responses of a record that one row of tokens can compare."""


@dataclass(frozen=True)
class Response:
    """One answer to the instruction.

    Attributes:
        text: the answer, exactly as the model gave it.
        model: the name of the model that gave it ("" when unknown).
        ratings: aspect -> rating; NaN where the judge gave no number. The order of the aspects is kept.
        rationales: aspect -> the judge's reason; aspects without one are absent.
        images: which of the record's images it answers, by their index, in the order in which its prompt shows them;
            None: all.
    """

    text: str
    model: str = ""
    ratings: Mapping[str, float] = field(default_factory=dict)
    rationales: Mapping[str, str] = field(default_factory=dict)
    images: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Record:
    """One instruction.

    Attributes:
        id: unique in its corpus.
        images: encoded JPEG or PNG files, in the order in which the prompt shows them.
        prompt: the user's last turn, as it came (the prompt form decides about stripping).
        history: earlier turns as (user, assistant), oldest first.
        responses: the answers; other files refer to them by their index here.
        pairs: (chosen, rejected) indices into `responses` where the source gave them; may be empty.
        source: the name of the data set.
        extra: whatever else the source said, JSON values only.
    """

    id: str
    images: tuple[bytes, ...]
    prompt: str
    responses: tuple[Response, ...]
    history: tuple[tuple[str, str], ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if not all(0 <= index < len(self.responses) for index in pair):
                raise ValueError(
                    f"record {self.id}: pair {pair} names a response that is not among its {len(self.responses)}"
                )

        for number, response in enumerate(self.responses):
            shown = response.images or ()
            if len(set(shown)) < len(shown) or not all(0 <= index < len(self.images) for index in shown):
                raise ValueError(
                    f"record {self.id}: response {number} shows images {list(shown)}, each must be another one of "
                    f"the record's {len(self.images)}"
                )

    def view(self, response: int) -> tuple[int, ...]:
        """The images that a response answers, by their index."""
        shown = self.responses[response].images
        return tuple(range(len(self.images))) if shown is None else shown

    @property
    def has_views(self) -> bool:
        """Whether a response names the images that it answers."""
        return any(response.images is not None for response in self.responses)

    @property
    def image_sha256(self) -> tuple[str, ...]:
        """The SHA-256 of each image file: equal for records that share an image."""
        return tuple(hashlib.sha256(image).hexdigest() for image in self.images)


@functools.cache
def features(views: bool = False) -> Any:
    """The TFDS features of a record.

    What is ragged inside a sequence (ratings, rationales, images of a response) is JSON text, and a NaN rating is null
    in it.

    Args:
        views: whether responses have `images`, null for all of the record's; absent reads as null.
    """
    import numpy as np
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    more = {"images": text} if views else {}
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "images": tfds.features.Sequence(tfds.features.Image()),
            "prompt": text,
            "history": tfds.features.Sequence({"user": text, "assistant": text}),
            "responses": tfds.features.Sequence(
                {"text": text, "model": text, "ratings": text, "rationales": text, **more}
            ),
            "pairs": tfds.features.Sequence({"chosen": np.int64, "rejected": np.int64}),
            "source": text,
            "extra": text,
        }
    )


def to_example(record: Record) -> bytes:
    """Encodes a record as `features()` describes it. Equal records give equal bytes, in any process.

    Raises:
        UnicodeEncodeError: a text holds a lone surrogate, which UTF-8 cannot express.
    """
    proto = codec()
    responses = record.responses
    texts: dict[str, Iterable[str]] = {
        "id": [record.id],
        "prompt": [record.prompt],
        "history/user": [user for user, _ in record.history],
        "history/assistant": [assistant for _, assistant in record.history],
        "responses/text": [response.text for response in responses],
        "responses/model": [response.model for response in responses],
        "responses/ratings": [_ratings_to_json(response.ratings) for response in responses],
        "responses/rationales": [_to_json(response.rationales) for response in responses],
        "source": [record.source],
        "extra": [_to_json(record.extra)],
    }
    if record.has_views:  # absent otherwise: such a record has the bytes that it had before there were views
        texts["responses/images"] = [_encoder.encode(response.images) for response in responses]
    numbers = {
        "pairs/chosen": [chosen for chosen, _ in record.pairs],
        "pairs/rejected": [rejected for _, rejected in record.pairs],
    }
    example = proto.Example()
    feature = example.features.feature
    files = {"images": record.images} | {key: [value.encode() for value in values] for key, values in texts.items()}
    for key, values in files.items():
        feature[key].bytes_list.SetInParent()  # an empty list must still say what it is a list of
        feature[key].bytes_list.value.extend(values)
    for key, indices in numbers.items():
        feature[key].int64_list.SetInParent()
        feature[key].int64_list.value.extend(indices)
    return example.SerializeToString(deterministic=True)


def from_example(data: bytes) -> Record:
    """The inverse of `to_example`; NaN ratings are `math.nan` itself, so records compare equal.

    Raises:
        ValueError: the bytes are not a record.
    """
    try:
        feature = codec().Example.FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError; its class differs between implementations
        raise ValueError(f"not a tf.train.Example: {error}") from error
    absent = [key for key in ("id", "images", "prompt", "responses/text") if key not in feature]
    if absent:
        raise ValueError(f"not a record of this project: it lacks {', '.join(absent)}")

    def texts(key: str) -> list[str]:
        return [value.decode() for value in feature[key].bytes_list.value]

    answers = texts("responses/text")
    views = texts("responses/images") if "responses/images" in feature else []
    responses = zip(
        answers,
        texts("responses/model"),
        texts("responses/ratings"),
        texts("responses/rationales"),
        views or ["null"] * len(answers),
        strict=True,
    )
    return Record(
        id=texts("id")[0],
        images=tuple(feature["images"].bytes_list.value),
        prompt=texts("prompt")[0],
        responses=tuple(
            Response(text, model, _ratings_from_json(ratings), json.loads(rationales), _view_from_json(view))
            for text, model, ratings, rationales, view in responses
        ),
        history=tuple(zip(texts("history/user"), texts("history/assistant"), strict=True)),
        pairs=tuple(
            zip(feature["pairs/chosen"].int64_list.value, feature["pairs/rejected"].int64_list.value, strict=True)
        ),
        source=texts("source")[0],
        extra=json.loads(texts("extra")[0]),
    )


def images_of(data: bytes) -> tuple[bytes, ...]:
    """The images of an encoded record, without the rest of it.

    Raises:
        ValueError: the bytes are no message; that it is a record is not checked.
    """
    try:
        return tuple(codec().Example.FromString(data).features.feature["images"].bytes_list.value)
    except Exception as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error


@functools.cache
def codec() -> Any:
    """The module of the Example message, which TFDS carries so that TensorFlow is not needed."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # json.dumps makes one a call


def _to_json(value: Mapping[str, Any]) -> str:
    return _encoder.encode(dict(value))


def _ratings_to_json(ratings: Mapping[str, float]) -> str:
    return _to_json({aspect: None if math.isnan(rating) else float(rating) for aspect, rating in ratings.items()})


def _ratings_from_json(text: str) -> dict[str, float]:
    return {aspect: math.nan if rating is None else float(rating) for aspect, rating in json.loads(text).items()}


def _view_from_json(text: str) -> tuple[int, ...] | None:
    images = json.loads(text)
    return None if images is None else tuple(images)
