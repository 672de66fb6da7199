"""placeholder"""


async def run_batches(work, agents, clients, poll):
    raise RuntimeError
