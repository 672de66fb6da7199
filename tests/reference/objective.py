"""Preference objectives in plain NumPy float64, beside the model of `tests.reference.qwen_vl`.

summed_logps(logits, labels)                  # one sequence a row, labels as Hugging Face has them -> [B]
branch_row(prompt, responses, labelled)       # the row of several branches, and what its loss needs
branch_logps(logits, row, branches)           # [K]
pair_losses("sigmoid", ...)                   # losses and implicit rewards of pairs, from their log-probabilities
AdamW(...).step(parameters, gradients)        # decoupled decay after clipping by the global norm
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

IGNORED = -100  # a label that does not count


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -np.asarray(x, np.float64))


def summed_logps(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum over a row of log p(label at t | tokens before t): logits [B, T, V], labels [B, T] with -100 -> [B]."""
    counted = labels[:, 1:] != IGNORED
    targets = np.where(counted, labels[:, 1:], 0)
    logps = np.take_along_axis(log_softmax(logits[:, :-1]), targets[..., None], axis=-1)[..., 0]
    return (logps * counted).sum(axis=1)


def branch_row(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    labelled: Sequence[Sequence[bool]] | None = None,
    length: int | None = None,
    padding: int = 0,
) -> dict[str, np.ndarray]:
    """`[prompt | response 1 | ... | response K]` as arrays [1, T], padded to `length`.

    tokens; positions, which restart after the prompt in every branch; branches, 0 for the prompt, k for response k,
    -1 for padding; predecessors, the index of the token that predicts this one (the last of the prompt for the first
    of a branch); labelled, whether this token counts (`labelled` gives it for the responses; all of them if None).
    """
    row: dict[str, list] = {name: [] for name in ("tokens", "positions", "branches", "predecessors", "labelled")}

    def add(token, position, branch, predecessor, counts):
        for name, value in zip(row, (token, position, branch, predecessor, counts), strict=True):
            row[name].append(value)

    for t, token in enumerate(prompt):
        add(token, t, 0, max(t - 1, 0), False)
    for k, response in enumerate(responses):
        for t, token in enumerate(response):
            before = len(row["tokens"]) - 1 if t else len(prompt) - 1
            add(token, len(prompt) + t, k + 1, before, labelled is None or labelled[k][t])
    while len(row["tokens"]) < (length or 0):
        add(padding, 0, -1, 0, False)
    return {name: np.array([values]) for name, values in row.items()}


def branch_logps(logits: np.ndarray, row: dict[str, np.ndarray], branches: int) -> np.ndarray:
    """Summed log-probability of each branch's labelled tokens: logits [B, T, V] -> [B, K]."""
    predicting = np.take_along_axis(log_softmax(logits), row["predecessors"][..., None], axis=1)
    logps = np.take_along_axis(predicting, row["tokens"][..., None], axis=-1)[..., 0] * row["labelled"]
    return np.stack([(logps * (row["branches"] == k + 1)).sum(axis=1) for k in range(branches)], axis=1)


def pair_losses(
    kind: str,
    policy_chosen: np.ndarray,
    policy_rejected: np.ndarray,
    reference_chosen: np.ndarray,
    reference_rejected: np.ndarray,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_tokens: np.ndarray | None = None,
    rejected_tokens: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, chosen reward and rejected reward of every pair, from its summed log-probabilities [P].

    `sigmoid_norm` also needs how many tokens each response was summed over.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    rewards = beta * chosen, beta * rejected
    if kind == "sigmoid_norm":
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
    x = beta * (chosen - rejected)
    smoothed = -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)
    match kind:
        case "sigmoid":
            # DPO, arXiv 2305.18290, equation 7; smoothed: cDPO (Mitchell, "A note on DPO with noisy preferences").
            loss = smoothed
        case "sigmoid_norm":
            # DPO on means per token: Tulu 3, arXiv 2411.15124, equation 6.
            loss = smoothed
        case "robust":
            # arXiv 2403.00409, robust DPO: unbiased when labels are flipped with probability label_smoothing.
            loss = -(1 - label_smoothing) * log_sigmoid(x) + label_smoothing * log_sigmoid(-x)
            loss = loss / (1 - 2 * label_smoothing)
        case "hinge":
            # SLiC, arXiv 2305.10425, on the log-ratios as in RSO, 2309.06657.
            loss = np.maximum(0, 1 - x)
        case "ipo":
            # arXiv 2310.12036, equation 17; beta is its tau.
            loss = (chosen - rejected - 1 / (2 * beta)) ** 2
        case _:
            raise ValueError(f"unknown loss {kind!r}")
    return loss, *rewards


def global_norm(gradients: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))


@dataclass
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on gradients clipped by their global norm."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    count: int = 0
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, parameters: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters after one more step. Every parameter decays, as in PyTorch's AdamW."""
        self.count += 1
        scale = 1.0
        if self.clip_norm is not None:
            scale = min(1.0, self.clip_norm / global_norm(gradients))
        updated = {}
        for name, parameter in parameters.items():
            g = gradients[name].astype(np.float64) * scale
            self.first[name] = self.beta1 * self.first.get(name, 0.0) + (1 - self.beta1) * g
            self.second[name] = self.beta2 * self.second.get(name, 0.0) + (1 - self.beta2) * g**2
            first = self.first[name] / (1 - self.beta1**self.count)
            second = self.second[name] / (1 - self.beta2**self.count)
            direction = first / (np.sqrt(second) + self.eps) + self.weight_decay * parameter
            updated[name] = parameter - self.learning_rate * direction
        return updated
