"""Checks of what a JSON file holds inside its records; messages say where."""

from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.records import kind


def an_object(value: Any, where: str) -> dict[str, Any]:
    """An object.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {kind(value)}")
    return value


def a_list(value: Any, where: str) -> list[Any]:
    """A list.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, found {kind(value)}")
    return value


def some_words(value: Any, where: str) -> list[str]:
    """A list of texts.

    Raises:
        UserError: it is something else.
    """
    for entry in a_list(value, where):
        if not isinstance(entry, str):
            raise UserError(f"{where}: expected a list of texts, found {kind(entry)} in it")
    return value
