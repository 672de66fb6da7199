"""What judged benchmarks share: settings that are switches, what is said of replies that are missing, cut lists."""

from collections.abc import Callable, Iterable, Sequence

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Ask, Dialogue, Replies, Settings

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def switch(settings: Settings, name: str) -> bool:
    """A setting that is on or off; off where it is not set.

    Raises:
        UserError: it is neither.
    """
    value = settings.get(name, "false")
    if value.lower() not in _SWITCH:
        raise UserError(f"--set {name}={value}: write {name}=true or {name}=false")
    return _SWITCH[value.lower()]


def one_reply(ask: Callable[[], Ask]) -> Dialogue:
    """A dialogue of one request, whose reply is taken as it is."""
    return lambda replies: None if replies else ask()


def until_said(ask: Callable[[], Ask]) -> Dialogue:
    """The same request until a reply says something: an empty one is asked for again, as officially."""
    return lambda replies: None if any(reply.strip() for reply in replies) else ask()


def what_was_said(replies: Sequence[str]) -> str:
    """The first reply that says something, stripped; "" where none does."""
    return next((reply.strip() for reply in replies if reply.strip()), "")


def needed(replies: Replies | None, title: str) -> Replies:
    """The replies, of a benchmark that has no figures without.

    Raises:
        UserError: there are none.
    """
    if replies is None:
        raise UserError(
            f"{title} is scored by a judge: give its replies with --replies, or a judge to ask with --judge"
        )
    return replies


def failure_notes(replies: Replies | None, without: int, instead: str) -> list[str]:
    """Lines about dialogues that brought no usable reply.

    Args:
        without: how many items have none.
        instead: what the official figures take for them.
    """
    if not without:
        return []
    kinds = ", ".join(f"{count} {outcome}" for outcome, count in sorted((replies.failed if replies else {}).items()))
    return [
        f"{without} items have no reply of the judge{f' ({kinds})' if kinds else ''}: {instead} in the official "
        "figures, and left out of ours"
    ]


def named(ids: Iterable[str], most: int = 5) -> str:
    """A list for an error: the first few, and how many more there are."""
    ids = list(ids)
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
