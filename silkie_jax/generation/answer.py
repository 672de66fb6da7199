"""Answering: a model, images and a question in, a reply out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from silkie_jax.generation.defaults import read_defaults
from silkie_jax.generation.engine import Engine
from silkie_jax.generation.requests import Request
from silkie_jax.loading import load
from silkie_jax.models.qwen_vl.chat import SYSTEM, chat_prompt, decode_reply
from silkie_jax.models.qwen_vl.image import read_image


@dataclass(frozen=True)
class Reply:
    """The text of a reply, and its ids up to and with the one that ended it."""

    text: str
    tokens: list[int]


def answer(
    model_path: str | Path,
    prompt: str,
    *,
    images: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    system: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
) -> Reply:
    """Loads a model and answers one question about some images.

    The prompt is plain text: special tokens in it are not parsed, and no path in it is opened. What is not given
    comes from the model's generation_config.json (officially top_p 0.5, 512 new tokens).

    Raises:
      UserError: a file or an option that is not sound.
    """
    defaults = read_defaults(model_path)
    if max_new_tokens is None:
        max_new_tokens = defaults.max_new_tokens
    model, tokenizer = load(model_path, dtype=dtype, adapter=adapter, quantize=quantize)
    size = model.config.visual.image_size
    pixels = [read_image(path, size) for path in images]
    ids = chat_prompt(tokenizer, prompt, len(images), system=SYSTEM if system is None else system).tokens
    stop = (tokenizer.im_end, tokenizer.im_start)
    request = Request(
        ids,
        pixels,
        max_new_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        stop=stop,
        seed=seed,
    )
    engine = Engine(model, slots=1, context=len(ids) + max(max_new_tokens, 1), images=len(images), own=True)
    ((_, completion),) = engine.run([request])
    return Reply(decode_reply(tokenizer, completion.tokens), completion.tokens)
