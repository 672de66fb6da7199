"""An instruction as one row of tokens: the prompt with its pictures, then every response as a branch of its own.

    row index     0  1  2  3 | 4  5  6 | 7  8
    token         p  p  p  p | a  a  a | b  b
    branches      0  0  0  0 | 1  1  1 | 2  2
    positions     0  1  2  3 | 4  5  6 | 4  5     each branch continues the prompt
    predicted by             | 3  4  5 | 3  7     its first token by the LAST PROMPT TOKEN, also in branch 2

A token sees the prompt and its own branch only, so each branch is what `prompt + response` would be as a sequence
of its own, and the prompt with its pictures is computed once.

Responses may have views: pictures of their own among the record's, or a condition that follows the question. Those of
one view share a segment, `[prompt | branches]`, and segments stand one after the other like rows that are packed, their
branches numbered from 0, 64, 128, ...: nothing that reads a row must know of them but what counts and places pictures.

    token         p  p | a  a | q  q  q | b  b       a's prompt is p, b's is q
    branches      0  0   1  1  64 64 64  65 65
    positions     0  1   2  3   0  1  2   3  4

Prompt form, labels and lengths are those of Silkie's
training (ChatML through Qwen's `preprocess`, trl 0.7.2's truncation), except that a picture is never cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Int32

from silkie_jax.corpus.schema import MOST_RESPONSES
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl import chat
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import ROW

if TYPE_CHECKING:
    from silkie_jax.corpus.schema import Record

ROW_FORM = "silkie-rows-1"
"""Names prompt form, labels and truncation. Changes whenever a record would become other tokens or other labels, so
that log-probabilities stored for an older form are recognised as such."""


class RowTooLong(UserError):
    """The pictures of a record and the opening of a response do not fit into the maximum length."""


@dataclass(frozen=True)
class Views:
    """The segments of a row whose responses have views.

    Attributes:
        prompts: tokens of each segment's prompt.
        segments: of each branch, the segment that it stands in.
        shown: of each image of the row, its index among the record's.
        spans: of each `<img>` of the row, in order, which of the row's images stands there.
    """

    prompts: tuple[int, ...]
    segments: tuple[int, ...]
    shown: tuple[int, ...]
    spans: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One record's tokens and labels (see the module's docstring), all arrays int32.

    Attributes:
        id: the record's.
        tokens: [T] prompt, then the branches.
        positions: [T] for the rotary embedding.
        branches: [T] 0 for the prompt, 1..K for the responses; from 64, 128, ... on in further segments.
        predecessors: [N] row index of the token that predicts label n.
        labels: [N] the labelled tokens, branch after branch.
        label_branches: [N] 1..K, whatever segments the branches stand in.
        pairs: [P, 2] chosen and rejected as 0-based branch numbers (branch k + 1 of the row is number k).
        responses: of each branch, the index into the record's responses.
        images: the record's image files in the order of their spans; with views, each that is shown, once.
        dropped_prompt: tokens of the prompts that truncation left out.
        dropped_responses: of each branch, the tokens that truncation left out.
        views: None where all responses answer the record's prompt with all its images.
    """

    id: str
    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, " T"]
    branches: Int32[np.ndarray, " T"]
    predecessors: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    label_branches: Int32[np.ndarray, " N"]
    pairs: Int32[np.ndarray, "P 2"]
    responses: tuple[int, ...]
    images: tuple[bytes, ...]
    dropped_prompt: int
    dropped_responses: tuple[int, ...]
    views: Views | None = None

    @property
    def spans(self) -> tuple[int, ...]:
        """Of each `<img>`, in order, which of the row's images stands there."""
        return tuple(range(len(self.images))) if self.views is None else self.views.spans

    @property
    def segments(self) -> int:
        """How many prompts the row has."""
        return 1 if self.views is None else len(self.views.prompts)

    @property
    def truncated(self) -> bool:
        return self.dropped_prompt > 0 or any(self.dropped_responses)


def make_row(
    tokenizer: Tokenizer,
    record: "Record",
    pairs: Sequence[tuple[int, int]] = (),
    *,
    responses: Sequence[int] | None = None,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    conditions: Mapping[int, str] | None = None,
    specials: bool = False,
) -> Row:
    """Lays out a record.

    `pairs` are (chosen, rejected) indices into the record's responses; only responses that occur in one become
    branches, in the record's order, unless `responses` names others (to score all of them, or to imitate one).

    Lengths are those of the separate sequences. If the prompt and the longest response exceed `max_length`, the
    prompt is cut to its last `max_prompt_length` tokens (default: half), and if that is not enough the responses to
    their first `max_length - max_prompt_length` (trl's `keep_end`). Where that would cut a picture, see `_shorten`.
    The longest of ALL the record's responses is meant: so a response has the same log-probability in every row it
    is part of, whether scored or compared, under whichever pair rule. Each segment is cut by itself.

    `conditions` holds, of responses by their index, a text that follows the question on lines of its own.
    `specials=True` parses special tokens in the texts, as the original did: only to compare with it.
    Raises RowTooLong if the pictures leave no room for a single token of a response.
    """
    if max_prompt_length is None:
        max_prompt_length = max_length // 2
    if not 0 < max_prompt_length < max_length:
        raise UserError(f"max_prompt_length must lie between 0 and max_length = {max_length}, not {max_prompt_length}")
    pairs = list(pairs)
    if responses is None:
        responses = sorted({index for pair in pairs for index in pair})
    number = {index: k for k, index in enumerate(responses)}
    if not responses or len(number) != len(responses):
        raise ValueError(f"record {record.id}: a row needs one or more different responses, not {list(responses)}")
    if len(number) > MOST_RESPONSES:
        raise UserError(f"record {record.id!r} has {len(number)} responses to compare; a row holds {MOST_RESPONSES}")

    seen = [(record.view(index), (conditions or {}).get(index, "")) for index in responses]
    distinct = list(dict.fromkeys(seen))  # a segment each
    encoded = [_response_tokens(tokenizer, response.text, specials) for response in record.responses]
    longest = max(map(len, encoded))
    prompts, limits, dropped = [], [], 0
    for images, condition in distinct:
        messages = _prompt_messages(tokenizer, record, specials, len(images), condition)
        prompt, limit, lost = _fit(tokenizer, messages, longest, max_length, max_prompt_length, record.id)
        prompts.append(prompt)
        limits.append(limit)
        dropped += lost

    segments = [distinct.index(view) for view in seen]
    whole = [encoded[index] for index in responses]
    kept = [ids[: limits[segment]] for ids, segment in zip(whole, segments, strict=True)]
    tokens = []
    for segment, prompt in enumerate(prompts):
        tokens += prompt
        tokens += [token for ids, own in zip(kept, segments, strict=True) if own == segment for token in ids]
    lengths, every, views = tuple(map(len, prompts)), tuple(range(len(record.images))), None
    shown = tuple(sorted({image for images, _ in distinct for image in images}))
    if distinct != [(every, "")]:
        spans = tuple(shown.index(image) for images, _ in distinct for image in images)
        views = Views(lengths, tuple(segments), shown, spans)
    return Row(
        id=record.id,
        **_arrays(tokens, lengths, segments, list(map(len, kept)), len(chat.reply_opening(tokenizer))),
        pairs=np.array([(number[a], number[b]) for a, b in pairs], np.int32).reshape(-1, 2),
        responses=tuple(responses),
        images=tuple(record.images[image] for image in shown),
        dropped_prompt=dropped,
        dropped_responses=tuple(len(ids) - len(some) for ids, some in zip(whole, kept, strict=True)),
        views=views,
    )


def _fit(
    tokenizer: Tokenizer,
    messages: list["_Message"],
    longest: int,
    max_length: int,
    max_prompt_length: int,
    name: str,
) -> tuple[list[int], int, int]:
    """(prompt, tokens that a response may have, tokens that the prompt lost) where the longest response has so many.

    Raises:
      RowTooLong: the pictures leave no room.
    """
    prompt = [token for message in messages for token in message.tokens]
    whole, limit = len(prompt), longest
    if len(prompt) + limit > max_length:
        prompt = _shorten(tokenizer, messages, max_prompt_length, max_length - limit)
    if len(prompt) + limit > max_length:
        limit = max_length - max(max_prompt_length, len(prompt))
        opening = len(chat.reply_opening(tokenizer))
        if limit <= opening:
            images = sum(message.images for message in messages)
            raise RowTooLong(
                f"record {name}: the prompt with {images} images takes {max_length - limit} tokens, "
                f"a response {opening + 1} or more: {opening + 1 - limit} more than max_length = {max_length}"
            )
    return prompt, limit, whole - len(prompt)


def branched_row(id: str, prompt: Sequence[int], whole: Sequence[Sequence[int]], images: tuple[bytes, ...]) -> Row:
    """A row of sequences that go on from one prompt, each a branch; what each adds to its length counts.

    Text may be cut into other tokens where a continuation meets the prompt, so the row's common part is what all of
    the sequences begin with, and at most as long as the prompt.

    Args:
      prompt: ids of the prompt alone.
      whole: ids of the prompt with each continuation.

    Raises:
      UserError: a continuation adds nothing.
    """
    if any(len(ids) <= len(prompt) for ids in whole):
        raise UserError(f"{id}: an option adds no token to the question")
    common = 0
    while common < len(prompt) and len({ids[common] for ids in whole}) == 1:
        common += 1
    tokens = [*whole[0][:common], *(token for ids in whole for token in ids[common:])]
    arrays = _arrays(tokens, [common], [0] * len(whole), [len(ids) - common for ids in whole], opening=0)
    counted = arrays["positions"][_label_places(arrays)] >= len(prompt)
    labels = ("predecessors", "labels", "label_branches")
    return Row(
        id=id,
        **{name: values[counted] if name in labels else values for name, values in arrays.items()},
        pairs=np.zeros((0, 2), np.int32),
        responses=tuple(range(len(whole))),
        images=images,
        dropped_prompt=0,
        dropped_responses=(0,) * len(whole),
        views=None,
    )


def _label_places(arrays: dict[str, np.ndarray]) -> Int32[np.ndarray, " N"]:
    """Row index of every label, where all tokens of branches are labels."""
    return np.flatnonzero(arrays["branches"] > 0).astype(np.int32)


def _arrays(
    tokens: Sequence[int] | Int32[np.ndarray, " T"],
    prompts: Sequence[int],
    segments: Sequence[int],
    lengths: Sequence[int],
    opening: int,
) -> dict[str, np.ndarray]:
    """What follows from a row's tokens and how they are divided.

    Args:
      tokens: of the row: of each segment its prompt, then its branches.
      prompts: tokens of each segment's prompt.
      segments, lengths: of each branch, its segment and its tokens.
      opening: tokens of a reply's opening, of which the first alone counts.
    """
    # Pieces, prompts first: what stands in `branches`, the branch's number (0: a prompt), tokens, segment.
    pieces = np.array(
        [
            [*(ROW * np.arange(len(prompts))), *_branch_ids(segments)],
            [*([0] * len(prompts)), *range(1, len(segments) + 1)],
            [*prompts, *lengths],
            [*range(len(prompts)), *segments],
        ],
        np.int32,
    )
    ids, numbers, counts, own = pieces[:, np.argsort(pieces[0])]  # as they stand in the row
    starts = np.cumsum(counts, dtype=np.int32) - counts
    before = np.array(prompts, np.int32)[own]  # tokens of the prompt that a piece belongs to
    ends = starts[numbers == 0][own] + before  # and where it ends
    piece = np.repeat(np.arange(len(ids)), counts)
    offsets = np.arange(len(tokens), dtype=np.int32) - starts[piece]
    answers = numbers[piece] > 0
    at = np.flatnonzero(answers & _is_label(offsets, opening)).astype(np.int32)
    ids_of_tokens = np.asarray(tokens, np.int32)
    return {
        "tokens": ids_of_tokens,
        "positions": np.where(answers, before[piece] + offsets, offsets),
        "branches": ids[piece],
        # The first token of every branch is predicted by the last one of the prompt, each other one by that before it.
        "predecessors": np.where(offsets[at] == 0, ends[piece[at]], at) - 1,
        "labels": ids_of_tokens[at],
        "label_branches": numbers[piece[at]],
    }


def _branch_ids(segments: Sequence[int]) -> list[int]:
    """What stands in `branches` of each branch, which are numbered within their segments."""
    return [ROW * own + 1 + list(segments[:place]).count(own) for place, own in enumerate(segments)]


def _is_label(offsets: Int32[np.ndarray, " N"], opening: int) -> np.ndarray:
    """Which tokens of a branch count: the leading `<|im_start|>`, and all after the role."""
    return (offsets == 0) | (offsets >= opening)


def pack_row(row: Row) -> Int32[np.ndarray, " Z"]:
    """A row in one array, for `unpack_row`; its id and images are the record's."""
    views = row.views or Views((int((row.branches == 0).sum()),), (0,) * len(row.responses), (), ())
    counts = [sum(views.prompts), *np.bincount(row.branches)[_branch_ids(views.segments)]]
    opening = row.predecessors[1] + 1 - views.prompts[0]  # the offset of the first branch's second label
    head = np.array([opening, len(row.responses), len(row.pairs), row.dropped_prompt])
    parts: list[Any] = [head, counts, row.responses, row.dropped_responses, row.pairs.ravel(), row.tokens]
    if row.views is not None:
        parts += [[len(views.prompts), len(views.shown)], views.prompts, views.segments, views.shown, views.spans]
    return np.concatenate(parts).astype(np.int32)


def packed_length(
    tokens: Int[np.ndarray, "*N"],
    branches: Int[np.ndarray, "*N"],
    pairs: Int[np.ndarray, "*N"],
    images: Int[np.ndarray, "*N"] | int = 0,
    spans: Int[np.ndarray, "*N"] | int = 0,
    segments: Int[np.ndarray, "*N"] | int = 0,
) -> Any:
    """Numbers that `pack_row` takes for rows of these sizes (layout.SIZES, VIEW_SIZES)."""
    views = np.where(np.asarray(segments) > 0, 2 + segments + branches + images + spans, 0)
    return 5 + 3 * branches + 2 * pairs + tokens + views


def unpack_row(packed: Int32[np.ndarray, " Z"], name: str, images: tuple[bytes, ...]) -> Row:
    """The inverse of `pack_row`; `images` are the record's (none: the row gets none, which its text does not need)."""
    opening, branches, pairs, dropped = packed[:4].tolist()
    counts, responses, cut, chosen, rest = np.split(
        packed[4:], np.cumsum([1 + branches, branches, branches, 2 * pairs])
    )
    tokens, more = np.split(rest, [counts.sum()])
    views, within = None, Views((int(counts[0]),), (0,) * branches, (), ())
    if len(more):
        parts = np.split(more[2:], np.cumsum([int(more[0]), branches, int(more[1])]))
        views = within = Views(*(tuple(part.tolist()) for part in parts))
        images = tuple(images[image] for image in views.shown) if images else ()
    return Row(
        id=name,
        **_arrays(np.array(tokens), within.prompts, within.segments, counts[1:].tolist(), opening),
        pairs=np.array(chosen).reshape(-1, 2),
        responses=tuple(responses.tolist()),
        images=images,
        dropped_prompt=dropped,
        dropped_responses=tuple(cut.tolist()),
        views=views,
    )


def encode_prompt(tokenizer: Tokenizer, record: "Record", specials: bool = False) -> list[int]:
    """The whole prompt: system message, earlier turns, the instruction, and the newline after it.

    Pictures belong to the first message of the user. Texts of the user are stripped, earlier replies are not.
    """
    messages = _prompt_messages(tokenizer, record, specials, len(record.images))
    return [token for message in messages for token in message.tokens]


def encode_response(tokenizer: Tokenizer, text: str, specials: bool = False) -> tuple[list[int], list[bool]]:
    """Tokens of a response's branch, and which of them are labels.

    `<|im_start|>` counts and `assistant\\n` does not; the text (not stripped; it may be empty), `<|im_end|>`, the
    newline and `<|endoftext|>` count.
    """
    tokens = _response_tokens(tokenizer, text, specials)
    return tokens, _is_label(np.arange(len(tokens)), len(chat.reply_opening(tokenizer))).tolist()


def _response_tokens(tokenizer: Tokenizer, text: str, specials: bool) -> list[int]:
    content = tokenizer.encode(text, specials=specials)
    end = [tokenizer.im_end, *tokenizer.encode("\n"), tokenizer.end_of_text]
    return [*chat.reply_opening(tokenizer), *content, *end]


@dataclass(frozen=True)
class _Message:
    """A message of the prompt with the newline after it; tokens[start:stop] is text that may be left out."""

    tokens: list[int]
    start: int
    stop: int
    turn: int  # earlier turns are numbered from 0; -1 for the system message and the instruction
    images: int


def _prompt_messages(
    tokenizer: Tokenizer, record: "Record", specials: bool, images: int, condition: str = ""
) -> list[_Message]:
    """The messages of a record that shows so many images, with a condition after the question."""
    newline = tokenizer.encode("\n")

    def message(role: str, text: list[int], turn: int, pictures: list[int], images: int) -> _Message:
        tokens = [*chat.message(tokenizer, role, text), *newline]
        start = len(chat.message(tokenizer, role, pictures)) - 1
        return _Message(tokens, start, len(tokens) - 1 - len(newline), turn, images)

    def user(text: str, turn: int, images: int) -> _Message:
        content = chat.user_content(tokenizer, text, images, specials=specials)
        return message("user", content, turn, chat.user_content(tokenizer, "", images), images)

    def assistant(text: str, turn: int) -> _Message:
        return message("assistant", tokenizer.encode(text, specials=specials), turn, [], 0)

    system = tokenizer.encode(chat.SYSTEM)
    messages = [message("system", system, -1, system, 0)]
    for turn, (question, reply) in enumerate(record.history):
        messages += [user(question, turn, images), assistant(reply, turn)]
        images = 0
    question = f"{record.prompt.rstrip()}\n{condition}" if condition else record.prompt
    return [*messages, user(question, -1, images)]


def _shorten(tokenizer: Tokenizer, messages: list[_Message], max_prompt_length: int, room: int) -> list[int]:
    """The prompt's last `max_prompt_length` tokens, if every picture is whole in them.

    Otherwise the head of the conversation and the pictures stay, and text goes until the prompt fits into
    `max_prompt_length` tokens or into the `room` that the responses leave, whichever is more: first earlier turns
    without pictures, whole and from the oldest on, then text from the front, the end of the instruction last.
    What is returned may still be too long: then it is all pictures and ChatML.
    """
    prompt = [token for message in messages for token in message.tokens]
    cut = len(prompt) - max_prompt_length
    if not any(message.images for message in messages) or cut <= prompt.index(tokenizer.img):
        return prompt[max(cut, 0) :]

    excess = len(prompt) - max(max_prompt_length, room)
    with_pictures = {message.turn for message in messages if message.images}
    for turn in range(max(message.turn for message in messages) + 1):
        if excess > 0 and turn not in with_pictures:
            excess -= sum(len(message.tokens) for message in messages if message.turn == turn)
            messages = [message for message in messages if message.turn != turn]
    kept: list[int] = []
    for message in messages:
        dropped = min(max(excess, 0), message.stop - message.start)
        excess -= dropped
        kept += message.tokens[: message.start] + message.tokens[message.start + dropped :]
    return kept
