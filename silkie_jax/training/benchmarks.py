"""`evaluate_with`: parts of benchmarks, answered and scored at every checkpoint by the code of `silkie evaluate`."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.local import context_of, generated
from silkie_jax.evaluation.running.questions import AnswerOptions, Questions, open_questions
from silkie_jax.evaluation.table import find_benchmark
from silkie_jax.generation.engine import Engine
from silkie_jax.hardware.kernel import sound_keeper
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import Kernel
from silkie_jax.training.config import BenchmarkConfig, TrainConfig


class Benchmarks:
    """What a run is measured by; `after` follows every question.

    Raises:
      UserError: data or an option is not sound, or a benchmark needs what is not to be had while training.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh, kernel: Kernel, after: str | None = None):
        self._tokenizer, self._mesh, self._kernel, self._dtype = tokenizer, mesh, kernel, config.dtype
        self._asked = [(entry, _questions(entry, after)) for entry in config.evaluate_with]
        self._context = max((context_of(tokenizer, questions) for _, questions in self._asked), default=0)

    def __bool__(self) -> bool:
        return bool(self._asked)

    def measure(self, model: QwenVL, say: Callable[[str], object] = print) -> dict[str, float]:
        """Headline figures as `eval_BENCHMARK/FIGURE`; undefined ones are left out. Each benchmark is a line to say.

        The engine lives as long as this call: its decoder and keys and values take memory beside the run's.
        """
        if not self._asked:
            return {}
        rows = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        slots = min(entry.slots or 8 * rows for entry, _ in self._asked)
        keeper = sound_keeper(self._dtype, self._mesh, say=lambda line: None)
        engine = Engine(model, context=self._context, slots=slots, mesh=self._mesh, kernel=self._kernel, keeper=keeper)
        found: dict[str, float] = {}
        for _, questions in self._asked:
            figures = self._figures(engine, questions)
            say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            found |= figures
        return found

    def _figures(self, engine: Engine, questions: Questions) -> dict[str, float]:
        answers = {answer.id: answer for answer in generated(engine, self._tokenizer, questions, questions.items)}
        ordered = [answers[item.id] for item in questions.items]
        about, settings = questions.benchmark.ABOUT, questions.origin.settings
        score = questions.benchmark.score(questions.items, ordered, None, about.parsers[0], settings)
        values = score.sums.figures()
        name = questions.origin.benchmark
        figures = {f"eval_{name}/{figure.name}": float(values[figure.name]) for figure in about.figures}
        return {key: value for key, value in figures.items() if value == value}


def _questions(entry: BenchmarkConfig, after: str | None) -> Questions:
    about = find_benchmark(entry.benchmark).ABOUT
    if about.judge is not None and not about.judge_optional:
        raise UserError(f"evaluate_with: {entry.benchmark} needs a judge: use `silkie evaluate run` on a checkpoint")
    options = AnswerOptions(prompt=entry.prompt, limit=entry.limit, settings=dict(entry.settings), after=after)
    questions = open_questions(entry.benchmark, Path(entry.data), options)
    if questions.by_likelihood:
        raise UserError(f"evaluate_with: {entry.benchmark} compares likelihoods by default; give its entry a prompt")
    return questions
