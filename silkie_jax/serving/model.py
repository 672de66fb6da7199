"""The model that is served: loaded once, in the thread that computes; requests are read against it in any thread."""

from dataclasses import dataclass
from typing import Any

from silkie_jax.generation.defaults import Defaults
from silkie_jax.generation.engine import Engine
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.serving.fields import shown
from silkie_jax.serving.limits import Refused


@dataclass(frozen=True)
class ServedModel:
    """A model with all that asks it.

    Attributes:
        name: what `/v1/models` calls it.
        defaults: of requests that do not say.
        top_logprobs: the most that a request may ask for at each place.
        names: by which clients may call it, besides its own.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine
    scorer: Scorer
    defaults: Defaults
    top_logprobs: int
    names: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        return self.engine.config.visual.image_size

    def check_name(self, name: Any) -> None:
        """Refuses a request for another model; an absent or empty name is this one's."""
        if name not in (None, "", self.name, *self.names):
            raise Refused(f"there is no model {shown(name)} here, only {self.name!r}", 404, "model", "model_not_found")

    def check_length(self, characters: int) -> None:
        """Refuses a text that cannot fit, before time is spent on cutting it into tokens."""
        longest = 256  # characters, more than any ordinary token of these vocabularies has
        if characters > self.engine.context * longest:
            raise self._too_long(f"a prompt of {characters:,} characters cannot fit")

    def room(self, tokens: int, images: int) -> int:
        """The most tokens that may follow a prompt.

        Raises:
          Refused: there is no place for one.
        """
        left = self.engine.context - tokens
        if left < 1:
            pictures = f", of which {images} images of {IMAGE_TOKENS} each," if images else ""
            raise self._too_long(f"a prompt of {tokens:,} tokens{pictures} leaves no room for a reply")
        return left

    def _too_long(self, what: str) -> Refused:
        message = (
            f"{what} in the context of {self.engine.context:,} tokens: shorten it, or serve with a larger --context"
        )
        return Refused(message, 400, "messages", "context_length_exceeded")
