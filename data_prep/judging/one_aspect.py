"""What readings of judges of one number have in common: one aspect, which has no scale and is no verdict."""

from typing import ClassVar

from data_prep.judging.rubric import Scale


class OneAspect:
    """A part of a `kinds.Reading`.

    Attributes:
        aspect: the name of what the judge measures.
    """

    aspect: ClassVar[str]

    @property
    def names(self) -> list[str]:
        return [self.aspect]

    @property
    def weights(self) -> dict[str, float]:
        return {self.aspect: 1.0}

    @property
    def scale(self) -> Scale | None:
        return None

    @property
    def verdict(self) -> bool:
        return False
