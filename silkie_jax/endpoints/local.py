"""A converted checkpoint as an endpoint: silkie_jax serves it from another process, so that this one needs no JAX."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from silkie_jax.endpoints.agents import Agent
from silkie_jax.errors import UserError

_READY = b"serving at "


@asynccontextmanager
async def local_server(agent: Agent, name: str) -> AsyncIterator[str]:
    """Starts the server of a `local` agent and yields its base URL; ends it afterwards.

    Raises:
        UserError: it does not start, in its own words.
    """
    command = [sys.executable, "-m", "silkie_jax.serving.serve", str(agent.local), "--port", "0", "--end-with-stdin"]
    command += ["--dtype", agent.dtype, *(["--adapter", agent.adapter] if agent.adapter else [])]
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
