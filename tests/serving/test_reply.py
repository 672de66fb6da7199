"""The text of a reply: the same however its tokens come in, and nothing said that is taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tiny_qwen_vl import TEXT, learn_bpe
from silkie_jax.models.qwen_vl.chat import decode_reply
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.serving.reply import ReplyText

TOKENIZER = Tokenizer(learn_bpe(TEXT))


def feed(tokens, sizes=(), stops=(), continued=False, finish="length"):
    """The deltas of tokens that come in pieces of these sizes, the rest at last."""
    reply = ReplyText(TOKENIZER, 0, stops, continued)
    deltas, at = [], 0
    for size in [*sizes, len(tokens)]:
        some = tokens[at : at + size]
        at += len(some)
        ended = finish if at == len(tokens) else None
        deltas.append(reply.feed(some, [-0.5] * len(some), [[]] * len(some), ended))
        if reply.finish:
            break
    return [delta for delta in deltas if delta]


def said(deltas) -> str:
    return "".join(delta.text for delta in deltas)


# Whole words, bytes of characters, blanks and special tokens that end nothing.
words = st.sampled_from([*"ab \n", "图", "片", " the", "é", "😀"]).map(TOKENIZER.encode)
odd = st.integers(0, TOKENIZER.n_vocab + 3).filter(lambda token: token != TOKENIZER.img).map(lambda token: [token])
ids = st.lists(words | odd, max_size=12).map(lambda parts: [token for part in parts for token in part])


@settings(max_examples=300, deadline=None)
@given(ids, st.lists(st.integers(1, 3), max_size=30))
def test_pieces_say_what_the_whole_says(tokens, sizes):
    ending = {TOKENIZER.im_end, TOKENIZER.im_start, TOKENIZER.end_of_text}
    cut = next((i + 1 for i, token in enumerate(tokens) if token in ending), len(tokens))
    assert said(feed(tokens[:cut], sizes)) == decode_reply(TOKENIZER, tokens)


@settings(max_examples=500, deadline=None)
@given(
    st.text("abc é图\n", max_size=12),
    st.lists(st.text("abc é图", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 3), max_size=30),
)
def test_the_first_whole_stop_ends_the_text(text, stops, sizes):
    tokens = TOKENIZER.encode(text)
    deltas = feed(tokens, sizes, stops, continued=True)
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert said(deltas) == expected.rstrip()
    assert deltas[-1].finish == ("stop" if found else "length")


def test_nothing_is_said_that_a_stop_may_take_back():
    deltas = feed([*TOKENIZER.encode("one ##"), *TOKENIZER.encode("# two")], [1] * 30, ["###"])
    assert said(deltas) == "one"
    assert deltas[-1].finish == "stop"
    assert said(feed(TOKENIZER.encode("one ## two"), [1] * 30, ["###"])) == "one ## two"


def test_the_bytes_of_a_character_wait_for_each_other():
    tokens = TOKENIZER.encode("😀")
    assert len(tokens) == 4
    reply = ReplyText(TOKENIZER, 0)
    for token in tokens[:3]:
        assert reply.feed([token], [0.0], [[]], None) is None
    last = reply.feed(tokens[3:], [0.0], [[]], None)
    assert last.text == "😀"
    assert [token.token for token in last.tokens] == tokens


def test_blanks_count_where_a_text_goes_on():
    tokens = TOKENIZER.encode("  and more \n")
    assert said(feed(tokens, [1] * 20)) == "and more"
    assert said(feed(tokens, [1] * 20, continued=True)) == "  and more"


@pytest.mark.parametrize(
    ("stops", "pieces"), [((), ["a", " b", " the"]), (("th",), ["a", " b", " the"]), ((" th",), ["a", " b"])]
)
def test_tokens_are_those_of_the_text(stops, pieces):
    """A token is told with its text: those that begin before a stop, and none that ends the reply."""
    tokens = [*TOKENIZER.encode("a b the"), TOKENIZER.im_end]
    deltas = feed(tokens, [1] * 20, stops, finish="stop")
    assert [TOKENIZER.decode([token.token]) for delta in deltas for token in delta.tokens] == pieces
    assert deltas[-1].count == len(tokens) - bool(stops)


def test_the_text_that_ends_a_reply_can_be_kept():
    tokens = TOKENIZER.encode("the ab. the ba. the")
    for keep, text in ((False, "the ab"), (True, "the ab.")):
        reply = ReplyText(TOKENIZER, 0, ["."], keep_stop=keep)
        delta = reply.feed(tokens, [-0.5] * len(tokens), [[]] * len(tokens), "length")
        assert (delta.text, delta.finish) == (text, "stop")
        said = b"".join(TOKENIZER.bpe.decode_single_token_bytes(one.token) for one in delta.tokens)
        assert said.decode().startswith(text), "each of its tokens has its log-probability"
