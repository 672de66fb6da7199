"""Why a run ends before its work is done."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from silkie_jax.errors import UserError


class Stop:
    """Set once, by the first reason; what is in flight is still answered and stored.

    Attributes:
        reason: what to raise at the end; None while there is none.
    """

    def __init__(self) -> None:
        self.reason: BaseException | None = None
        self.event = asyncio.Event()

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, reason: BaseException) -> None:
        """Stops for this reason, unless there is one already."""
        if self.reason is None:
            self.reason = reason
            self.event.set()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, but not beyond the stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.event.wait()
        except TimeoutError:
            pass

    def raise_reason(self) -> None:
        """Raises the reason where there is one."""
        if self.reason is not None:
            raise self.reason

    @contextmanager
    def on_interrupt(self, message: str) -> Iterator[None]:
        """While this lasts the first Ctrl-C (or SIGTERM) stops; the second ends the process at once, as usual."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)

        def interrupt() -> None:
            for number in signals:
                loop.remove_signal_handler(number)
            self.set(KeyboardInterrupt(message))

        try:
            for number in signals:
                loop.add_signal_handler(number, interrupt)
        except (RuntimeError, ValueError, NotImplementedError):  # not the main thread: whoever owns it handles signals
            yield
            return
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def give_up(name: str, count: int, why: str) -> UserError:
    """The reason for a stop after errors that nothing interrupted."""
    return UserError(
        f"{name}: none of the first {count} requests was answered ({why}): mend it, then run the same command again"
    )
