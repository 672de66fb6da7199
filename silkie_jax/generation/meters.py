"""What an engine counts."""

from dataclasses import dataclass


@dataclass
class EngineMeters:
    """What an engine has done so far.

    prompts, prompt_tokens: computed, each once whatever its `n`. images: encoded; image_hits: found in the pool.
    samples, tokens: finished completions, and ids of all. steps: of decoding. prefill_seconds includes encoding.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    images: int = 0
    image_hits: int = 0
    samples: int = 0
    tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        seconds = self.prefill_seconds + self.decode_seconds
        rate = self.tokens / seconds if seconds else 0.0
        return (
            f"{self.samples:,} replies, {self.tokens:,} tokens at {rate:.0f} tokens/s; {self.prompts:,} prompts of "
            f"{self.prompt_tokens:,} tokens, {self.images:,} images encoded and {self.image_hits:,} taken again"
        )
