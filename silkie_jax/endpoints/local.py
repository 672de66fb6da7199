"""Converted checkpoints as endpoints: silkie_jax serves them from other processes, so that this one needs no JAX."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from silkie_jax.endpoints.agents import Agent
from silkie_jax.errors import UserError

_READY = b"serving at "
_SECONDS = 3600  # for a request: all that are sent at once wait in one queue


class LocalServers:
    """The servers of `local` agents: one for each checkpoint, however many agents ask it.

    Args:
        stack: ends the servers.
    """

    def __init__(self, stack: AsyncExitStack):
        self._stack = stack
        self._urls: dict[tuple[str | None, ...], str] = {}

    async def url(self, agent: Agent, name: str) -> str:
        """The base URL of an agent's server, which is started if it is not there yet.

        Raises:
            UserError: it does not start, in its own words.
        """
        key = (agent.local, agent.adapter, agent.dtype, agent.model)
        if key not in self._urls:
            self._urls[key] = await self._stack.enter_async_context(_server(agent, name))
        return self._urls[key]


@asynccontextmanager
async def _server(agent: Agent, name: str) -> AsyncIterator[str]:
    command = [sys.executable, "-m", "silkie_jax.cli", "serve", str(agent.local), "--port", "0", "--end-with-stdin"]
    command += ["--timeout", str(_SECONDS), "--queue", "10000", "--dtype", agent.dtype]
    command += ["--adapter", agent.adapter] if agent.adapter else []
    command += ["--name", agent.model] if agent.model else []
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        if not line.startswith(_READY):
            raise UserError(f"{name}: the model {agent.local} could not be loaded (its message is above)")
        yield line.removeprefix(_READY).decode().strip()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
