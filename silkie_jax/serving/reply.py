"""A reply as it grows: tokens come in, text that nothing can take back goes out.

Between the two stand a character that is not whole yet, a text that may become one of the request's stops, and blanks
that may turn out to be the end, where they are stripped. What goes out, put together, is what the whole reply says,
however its tokens came in.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from silkie_jax.generation.requests import STOP
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReplyToken:
    """A token of a reply: its log-probability, the most probable ones at its place, where its text begins."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    begin: int


@dataclass(frozen=True)
class Delta:
    """What one sample of a request has to say: more text, the tokens it is of, and at its end how it finished."""

    sample: int
    text: str
    tokens: list[ReplyToken] = field(default_factory=list)
    finish: str | None = None
    count: int = 0  # at its end: all its tokens


class ReplyText:
    """The text of one sample.

    Args:
      stops: texts that end it: at the one that is complete first, which is cut off.
      continued: it goes on from a text, so that blanks at its start count.
      keep_stop: the text that ends it is its last, and is not cut off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sample: int,
        stops: Sequence[str] = (),
        continued: bool = False,
        keep_stop: bool = False,
    ):
        self.sample = sample
        self.count = 0
        self.finish: str | None = None
        self._tokenizer, self._stops, self._keep_stop = tokenizer, stops, keep_stop
        self._endings = (tokenizer.im_end, tokenizer.im_start, tokenizer.end_of_text)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""  # decoded; a stop may still take it back
        self._passed = 0  # characters that came before it
        self._stripping = not continued
        self._blanks = ""
        self._tokens: deque[ReplyToken] = deque()

    def feed(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[Sequence[tuple[int, float]]],
        finish: str | None,
    ) -> Delta | None:
        """Takes more tokens, and how the engine ended the sample if it did; None where nothing can be said yet."""
        said = ""
        for token, logprob, best in zip(tokens, logprobs, top, strict=True):
            self.count += 1
            if token in self._endings:
                continue  # the engine says that it ended
            self._tokens.append(ReplyToken(token, logprob, best, self._passed + len(self._open)))
            said += self._hear(self._bytes.decode(token_bytes(self._tokenizer, token)))
            if self.finish:
                break
        if finish and not self.finish:
            said += self._hear(self._bytes.decode(b"", final=True))
            said += self._pass(len(self._open))
            self.finish = self.finish or finish
        tokens_said = []
        if said or self.finish:
            while self._tokens and self._tokens[0].begin < self._passed:
                tokens_said.append(self._tokens.popleft())
        if not (said or self.finish):
            return None
        return Delta(self.sample, said, tokens_said, self.finish, self.count if self.finish else 0)

    def _hear(self, text: str) -> str:
        """Adds decoded text; returns what is certain now."""
        self._open += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._open.find(stop)) >= 0]
        if found:
            end, begin = min(found)
            self._open = self._open[: end if self._keep_stop else begin]
            self.finish = STOP
            return self._pass(len(self._open))
        return self._pass(len(self._open) - self._begun())

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a stop."""
        for size in range(min(len(self._open), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(size < len(stop) and self._open.endswith(stop[:size]) for stop in self._stops):
                return size
        return 0

    def _pass(self, size: int) -> str:
        """Lets the first `size` characters go, stripped as the whole will be."""
        text, self._open = self._open[:size], self._open[size:]
        self._passed += size
        if self._stripping:
            text = text.lstrip()
            self._stripping = not text
        text = self._blanks + text
        said = text.rstrip()
        self._blanks = text[len(said) :]
        return said


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token writes; one beyond the vocabulary writes nothing that is UTF-8."""
    return tokenizer.bpe.decode_single_token_bytes(token) if token < tokenizer.n_vocab else b"\xff"
