"""Qwen-VL's tokenizer: byte-level BPE (tiktoken) over `qwen.tiktoken`, followed by 217 special tokens.

Agrees with the official `tokenization_qwen.py`, except that a special token or an `<img>` path is read out of
a text only where the caller asks for it. Text that comes from data is always plain text: a prompt or a response
that says `<|im_end|>` or `<img>/etc/passwd</img>` becomes the letters it is written with.
"""

import base64
import binascii
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from functools import cached_property, lru_cache
from pathlib import Path

import tiktoken

from silkie_jax.errors import UserError

RANKS_FILE = "qwen.tiktoken"
IMAGE_TOKENS = 256
"""Tokens between `<img>` and `</img>`: as many as the resampler has queries."""

LONGEST_BLANKS = 500_000

# How a text is cut into words before the merges: official `PAT_STR`.
WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
REF, REF_END, BOX, BOX_END, QUAD, QUAD_END = "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"
IMG, IMG_END, IMGPAD = "<img>", "</img>", "<imgpad>"
IMAGE_SPECIALS = (REF, REF_END, BOX, BOX_END, QUAD, QUAD_END, IMG, IMG_END, IMGPAD)
SPECIALS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)), *IMAGE_SPECIALS)
"""Special tokens in the order of their ids, which follow those of the ordinary tokens."""


class Tokenizer:
    """Text to token ids and back.

    `ranks` maps each ordinary token's bytes to its id; ids run from 0 without a gap and every single byte has
    one. Any number of ordinary tokens will do: the special tokens come after them.
    """

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        self.specials = {text: len(ranks) + i for i, text in enumerate(SPECIALS)}
        self.bpe = tiktoken.Encoding(name="qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=self.specials)
        self.end_of_text = self.specials[END_OF_TEXT]
        self.im_start = self.specials[IM_START]
        self.im_end = self.specials[IM_END]
        self.ref, self.ref_end = self.specials[REF], self.specials[REF_END]
        self.box, self.box_end = self.specials[BOX], self.specials[BOX_END]
        self.quad, self.quad_end = self.specials[QUAD], self.specials[QUAD_END]
        self.img, self.img_end = self.specials[IMG], self.specials[IMG_END]
        self.imgpad = self.specials[IMGPAD]

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder (Hugging Face or converted)."""
        return cls(read_ranks(Path(path) / RANKS_FILE))

    def __reduce__(self):
        # Data-loading workers receive a copy; tiktoken's compiled half is rebuilt there.
        return Tokenizer, (self.ranks,)

    @property
    def n_vocab(self) -> int:
        """Ordinary and special tokens together (the model's tables may have more rows)."""
        return len(self.ranks) + len(self.specials)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every token and its id: equal only for tokenizers that encode everything alike."""
        digest = hashlib.sha256(WORDS.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"\n%d %s" % (rank, token.hex().encode()))
        for text, index in self.specials.items():
            digest.update(b"\n%d %s" % (index, text.encode()))
        return digest.hexdigest()

    def encode(self, text: str, specials: bool | Collection[str] = False) -> list[int]:
        """Token ids of `text` after NFC normalisation.

        `specials` says which special tokens are looked for in the text: none (the only choice for text from
        data), all (True, as the official tokenizer does) or the given ones. Where `<img>` is among them,
        `<img>path</img>` becomes a span of 256 tokens: the path's bytes (ids equal to the byte values), then
        `<imgpad>`. Raises UserError for an unclosed `<img>`, a path of more than 256 bytes or one with special
        tokens in it.
        """
        if specials is False:  # the words of the prompt's form come again with every row
            return list(self._known(text)) if len(text) <= 32 else self._encode_ordinary(text)
        pieces = _cut_blanks(unicodedata.normalize("NFC", text))
        allowed = set(SPECIALS if specials is True else specials)
        ids = [i for piece in pieces for i in self.bpe.encode(piece, allowed_special=allowed, disallowed_special=())]
        return self._pad_paths(ids) if self.img in ids else ids

    def _encode_ordinary(self, text: str) -> list[int]:
        pieces = _cut_blanks(unicodedata.normalize("NFC", text))
        return [i for piece in pieces for i in self.bpe.encode_ordinary(piece)]

    @cached_property
    def _known(self) -> Callable[[str], list[int]]:
        return lru_cache(1024)(self._encode_ordinary)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """Text of token ids, in whatever order a model wrote them.

        A span of path bytes and `<imgpad>` becomes `<img>path</img>`. `skip_special_tokens` leaves special tokens
        out. `errors` is that of `bytes.decode`, for tokens that do not join to UTF-8; an id beyond `n_vocab` (the
        model's tables have spare rows) counts as such.
        """
        ids = [int(i) for i in ids]
        data = bytearray()
        position = 0
        while position < len(ids):
            token = ids[position]
            path = self._path_at(ids, position) if token == self.img else None
            if path is not None:
                data += path if skip_special_tokens else b"<img>%s</img>" % path
                position += IMAGE_TOKENS + 2
                continue
            if token < self.end_of_text or not skip_special_tokens:
                data += self.bpe.decode_single_token_bytes(token) if token < self.n_vocab else b"\xff"
            position += 1
        return data.decode("utf-8", errors)

    def image_ids(self) -> list[int]:
        """The span of one image: `<img>`, 256 places for its features, `</img>`."""
        return [self.img, *[self.imgpad] * IMAGE_TOKENS, self.img_end]

    def _pad_paths(self, ids: list[int]) -> list[int]:
        """Turns the text between image tags into spans of 256 tokens."""
        out: list[int] = []
        end = 0
        while self.img in itertools.islice(ids, end, None):
            start = ids.index(self.img, end)
            try:
                stop = ids.index(self.img_end, start)
            except ValueError:
                raise UserError(f"Unclosed image token: {IMG} without {IMG_END}") from None
            inside = ids[start + 1 : stop]
            if any(i >= self.end_of_text for i in inside):
                raise UserError(f"a special token stands between {IMG} and {IMG_END}, where only a path may")
            path = self.bpe.decode_bytes(inside)
            if len(path) > IMAGE_TOKENS:
                raise UserError(
                    f"The content in {IMG}..{IMG_END} is too long: {len(path)} bytes, at most {IMAGE_TOKENS}"
                )
            padding = [self.imgpad] * (IMAGE_TOKENS - len(path))
            out += [*ids[end : start + 1], *path, *padding, self.img_end]
            end = stop + 1
        return out + ids[end:]

    def _path_at(self, ids: list[int], start: int) -> bytes | None:
        """The path of the span that begins at `start`; None where it is no span that the tokenizer writes."""
        span = ids[start + 1 : start + 1 + IMAGE_TOKENS]
        path = list(itertools.takewhile(lambda i: i != self.imgpad, span))
        padding = [self.imgpad] * (IMAGE_TOKENS - len(path))
        closed = ids[start + 1 + IMAGE_TOKENS : start + 2 + IMAGE_TOKENS] == [self.img_end]
        if not closed or span != path + padding or any(i > 255 for i in path):
            return None
        return bytes(path)


def _cut_blanks(text: str) -> list[str]:
    """Cuts runs of blanks that would overflow the stack of tiktoken's pattern matcher (at about a million)."""
    if len(text) <= LONGEST_BLANKS:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s++", text):
        cuts += range(run.start() + LONGEST_BLANKS, run.end(), LONGEST_BLANKS)
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ordinary tokens of a `qwen.tiktoken` file: a line each, base64 of the bytes, a space and the id."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the tokenizer ({error.strerror}); a checkpoint folder holds {RANKS_FILE}"
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}: line {number} is not 'BASE64 RANK'; the file is damaged, copy it again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: ids do not run from 0 without gap or repeat; the file is damaged, copy it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: {len(missing)} of the 256 single bytes have no token; the file is damaged")
    return ranks
