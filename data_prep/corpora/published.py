"""What VLFeedback's paper (arXiv 2312.10665, section 2 and appendix) says of it, to lay a corpus against."""

from silkie_jax.corpus.pairs import plain_name

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")

RATINGS = {
    "Helpfulness": (22.8, 14.2, 13.4, 23.4, 26.3),
    "Ethical Considerations": (2.3, 1.2, 1.5, 15.6, 79.4),
    "Visual Faithfulness": (23.1, 11.4, 11.3, 23.3, 30.9),
}
"""Aspect -> percent of ratings 1, 2, 3, 4, 5."""

MEANS = {
    "GPT-4V": 4.70,
    "LLaVA-v1.5-7B": 3.95,
    "Qwen-VL-Chat": 3.90,
    "LLaVA-RLHF-13b-v1.5-336": 3.80,
    "IDEFICS-9b-Instruct": 3.79,
    "LLaVA-RLHF-7b-v1.5-224": 3.72,
    "InstructBLIP-Vicuna-7B": 3.58,
    "InstructBLIP-Vicuna-13B": 3.51,
    "Fuyu-8B": 3.23,
    "LLaVA-v1.5-13B": 3.06,
    "VisualGLM-6B": 2.95,
    "MMICL-Vicuna-13B": 2.35,
}
"""Model -> mean of the three aspects."""

_ALIASES = {"llava157b": "llavav157b", "llava1513b": "llavav1513b", "idefics9b": "idefics9binstruct"}


def published_mean(model: str) -> float | None:
    """The mean of a model, whichever way its name is written; None of a model that the paper does not have."""
    name = plain_name(model)
    name = _ALIASES.get(name, name)
    return next((mean for known, mean in MEANS.items() if plain_name(known) == name), None)
