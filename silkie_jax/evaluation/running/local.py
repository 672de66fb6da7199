"""Answers of a model on this machine, by the engine over a mesh."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.evaluation.benchmark import Answer, Item, Picture
from silkie_jax.evaluation.running.answers import AnswersFile, is_finished
from silkie_jax.evaluation.running.questions import Questions
from silkie_jax.generation.engine import Engine
from silkie_jax.generation.requests import Request
from silkie_jax.hardware.kernel import sound_keeper, sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.chat import decode_reply, templated
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.rows import Row, branched_row
from silkie_jax.scoring.fingerprints import adapter_fingerprint, weights_fingerprint
from silkie_jax.scoring.scorer import Scorer

_READ_AHEAD = 16  # items whose images are read and decoded before the engine asks for them
_CONTEXT_STEP = 64  # contexts are rounded up to this, so that like data compiles like programs
_CHUNK = 16  # batches of rows whose options are compared before answers are written


class LocalModel:
    """A checkpoint that is loaded once and answers several benchmarks.

    Args:
        path: a Hugging Face folder, or one made by `silkie convert`.
        adapter: a PEFT folder.
        quantize: "int8": large weights in 8 bits; their fingerprint says so.
        asked: all that it will be asked, which decides the engine's context.
        mesh: sizes of data, fsdp and tensor.
        slots: replies generated together; None: what memory has room for.
        batch_rows: questions whose options are compared together.

    Raises:
        UserError: what is wrong with the folder or an option, in one line.
    """

    def __init__(
        self,
        path: str | Path,
        asked: Sequence[Questions],
        *,
        adapter: str | Path | None = None,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        mesh: tuple[int, int, int] = (-1, 1, 1),
        slots: int | None = None,
        batch_rows: int = 8,
        say: Callable[[str], None] = print,
    ):
        self.path, self.dtype, self.slots, self.batch_rows, self._say = str(path), dtype, slots, batch_rows, say
        self.tokenizer = Tokenizer.from_folder(path)  # quick to fail, before gigabytes are read
        self._contexts = [context_of(self.tokenizer, questions) for questions in asked if not questions.by_likelihood]
        self.mesh = make_mesh(*mesh)
        where = partial(sharding_of, self.mesh)
        self._model = load_model(path, dtype=dtype, adapter=adapter, sharding_of=where, quantize=quantize)
        self._weights, self._adapter = weights_fingerprint(self._model), adapter_fingerprint(self._model)
        self.kernel = sound_kernel("auto", dtype, self.mesh, say=say)

    @cached_property
    def engine(self) -> Engine:
        """Made when it is first needed; from then on the model is its own."""
        keeper = sound_keeper(self.dtype, self.mesh, say=self._say)
        options = {"context": max(self._contexts), "slots": self.slots, "mesh": self.mesh}
        return Engine(self._model, **options, kernel=self.kernel, keeper=keeper, own=True)  # type: ignore[arg-type]

    @cached_property
    def scorer(self) -> Scorer:
        """What compares options; rows come ready made, so that it needs no length."""
        model = self.engine.model if "engine" in self.__dict__ else self._model
        options = {"batch_rows": self.batch_rows, "max_length": model.config.seq_length, "kernel": self.kernel}
        return Scorer(model, self.tokenizer, self.mesh, **options)  # type: ignore[arg-type]

    def answer(self, questions: Questions, out: Path) -> None:
        """Answers every item and writes `out`; the same call continues where one ended.

        Raises:
            UserError: what is wrong with the data or the file.
            KeyboardInterrupt: interrupted; every answer is kept.
        """
        origin = replace(
            questions.origin,
            model=self.path,
            dtype=self.dtype,
            weights=self._weights,
            adapter=self._adapter,
            tokenizer=self.tokenizer.fingerprint,
        )
        if is_finished(out, origin):
            self._say(f"{out}: all {origin.rows:,} answers are there")
            return
        with (
            AnswersFile(out, origin).open() as file,
            tqdm(total=origin.rows, initial=len(file.done), desc=origin.benchmark, unit="answer") as bar,
        ):
            left = [item for item in questions.items if item.id not in file.done]
            if questions.by_likelihood:
                stream = by_likelihood(self.scorer, partial(option_row, self.tokenizer, questions), left)
            else:
                stream = generated(self.engine, self.tokenizer, questions, left) if left else iter(())
            for answer in stream:
                file.add(answer)
                bar.update()
            file.finish(questions.items)


def context_of(tokenizer: Tokenizer, questions: Questions) -> int:
    """The context that the longest question and its answer need."""
    longest = max(len(tokens_of(tokenizer, questions, item)) for item in questions.items)
    return -(-(longest + questions.decoding.max_new_tokens) // _CONTEXT_STEP) * _CONTEXT_STEP


def tokens_of(tokenizer: Tokenizer, questions: Questions, item: Item) -> list[int]:
    """A question as the model is asked it."""
    return templated(tokenizer, questions.text(item), len(item.pictures), questions.template)


def generated(engine: "Engine", tokenizer: Tokenizer, questions: Questions, items: Sequence[Item]) -> Iterator[Answer]:
    """Answers as they come. What an item gets follows from the item, however many are in flight."""
    decoding, size = questions.decoding, engine.config.visual.image_size

    def request(item: Item, images: list[np.ndarray]) -> Request:
        return Request(
            tokens_of(tokenizer, questions, item),
            images,
            decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            stop=(tokenizer.im_end, tokenizer.im_start),
            seed=questions.seed_of(item),
        )

    requests = (request(item, images) for item, images in _with_images(items, size))
    for number, completion in engine.run(requests):
        text = decode_reply(tokenizer, completion.tokens)
        yield Answer(items[number].id, text, {"tokens": len(completion.tokens), "finish": completion.finish})


def _with_images(items: Iterable[Item], size: int) -> Iterator[tuple[Item, list[np.ndarray]]]:
    """Items with their images decoded, some ahead; an image of several neighbours is read once."""
    recent: dict[str, Future[np.ndarray]] = {}
    waiting: deque[tuple[Item, list[Future[np.ndarray]]]] = deque()

    def decode(picture: Picture) -> np.ndarray:
        return read_image(picture.read(), size, name=picture.name)

    def taken() -> tuple[Item, list[np.ndarray]]:
        item, images = waiting.popleft()
        return item, [image.result() for image in images]

    with ThreadPoolExecutor(max_workers=2) as pool:
        for item in items:
            for picture in item.pictures:
                if picture.name not in recent:
                    recent[picture.name] = pool.submit(decode, picture)
            waiting.append((item, [recent[picture.name] for picture in item.pictures]))
            while len(recent) > 2 * _READ_AHEAD:
                recent.pop(next(iter(recent)))
            if len(waiting) >= _READ_AHEAD:
                yield taken()
        while waiting:
            yield taken()


def option_row(tokenizer: Tokenizer, questions: Questions, item: Item) -> Row:
    """The options of an item as branches of one row, whose labels are the tokens that an option adds to the question.

    As in the adapter of SEED-Bench's authors for Qwen-VL-Chat: question and option are one string, cut into tokens
    together; how many tokens are the option's is the difference in length to the question alone. The row's prompt is
    what all of these strings begin with, up to there.
    """
    text = questions.text(item)
    question = templated(tokenizer, text, len(item.pictures), questions.template)
    options = questions.continuations(item)
    whole = [templated(tokenizer, text + option, len(item.pictures), questions.template) for option in options]
    images = tuple(picture.read() for picture in item.pictures)
    return branched_row(item.id, question, whole, images)


def by_likelihood(scorer: Scorer, row: Callable[[Item], Row], items: Sequence[Item]) -> Iterator[Answer]:
    """The mean loss of each option's tokens; the answer is the letter of the smallest, the first of equal ones."""
    at_once = _CHUNK * scorer.rows
    for first in range(0, len(items), at_once):
        some = items[first : first + at_once]
        rows = dict(enumerate(map(row, some)))
        sums = scorer.score_rows(rows)
        for number, item in enumerate(some):
            counts = np.bincount(rows[number].label_branches, minlength=len(rows[number].responses) + 1)[1:]
            losses = (-sums[number] / counts).astype(np.float32)
            letter = chr(ord("A") + int(np.argmin(losses)))
            yield Answer(item.id, letter, {"losses": [float(x) for x in losses], "tokens": counts.tolist()})
