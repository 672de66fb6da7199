"""Converted checkpoints as endpoints: silkie_jax serves them from other processes, so that this one needs no JAX."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from silkie_jax.endpoints.agents import Agent
from silkie_jax.errors import UserError

_READY = b"serving at "
_SECONDS = 3600  # for a request: all that are sent at once wait in one queue
Checkpoint = tuple[str | None, str | None, str]


def checkpoint_of(agent: Agent) -> Checkpoint:
    """What a server of its own is needed for: agents that agree in this share one."""
    return agent.local, agent.adapter, agent.dtype


def by_checkpoint(agents: Mapping[str, Agent]) -> dict[Checkpoint, dict[str, Agent]]:
    """The agents of each server."""
    found: dict[Checkpoint, dict[str, Agent]] = {}
    for name, agent in agents.items():
        found.setdefault(checkpoint_of(agent), {})[name] = agent
    return found


@asynccontextmanager
async def local_server(agents: Mapping[str, Agent]) -> AsyncIterator[str]:
    """The base URL of a server of one checkpoint, which ends with the block.

    Args:
        agents: all that are to ask it, by name; of one checkpoint.

    Raises:
        UserError: it does not start, in its own words.
    """
    agent = next(iter(agents.values()))
    command = [sys.executable, "-m", "silkie_jax.cli", "serve", str(agent.local), "--port", "0", "--end-with-stdin"]
    command += ["--timeout", str(_SECONDS), "--queue", "10000", "--dtype", agent.dtype]
    command += ["--adapter", agent.adapter] if agent.adapter else []
    for model in dict.fromkeys(one.model for one in agents.values() if one.model):
        command += ["--name", model]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        if not line.startswith(_READY):
            raise UserError(f"{', '.join(agents)}: the model {agent.local} could not be loaded (its message is above)")
        yield line.removeprefix(_READY).decode().strip()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
