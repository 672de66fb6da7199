"""What `respond` and `rate` share: plan the requests, say what they will cost, send them, and sum up."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from silkie_jax.endpoints.agents import Agent, read_key
from silkie_jax.endpoints.attempts import Ids, Review, StageWork, mark_lost
from silkie_jax.endpoints.batch_files import release_unsent
from silkie_jax.endpoints.budget import Budget, Estimate, check_prices, estimate, usd
from silkie_jax.endpoints.journal import Journal
from silkie_jax.endpoints.local import by_checkpoint, local_server
from silkie_jax.endpoints.messages import Wire
from silkie_jax.endpoints.progress import Progress
from silkie_jax.endpoints.stopping import Stop
from silkie_jax.endpoints.store import DATABASE, RunStore
from silkie_jax.errors import UserError

if TYPE_CHECKING:  # who asks no endpoint need not wait for the client's many modules
    from silkie_jax.endpoints.client import Client, Route

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a stage is run.

    Attributes:
        budget: USD that the whole run, earlier stages included, may cost; None: no limit.
        batch: by the Batch API instead of one request at a time.
        dry_run: plan and estimate, change nothing and send nothing.
        poll: seconds between looks at a batch.
        progress: whether to show progress on stderr.
    """

    budget: float | None = None
    batch: bool = False
    dry_run: bool = False
    poll: float = 30.0
    progress: bool = True


@dataclass(frozen=True)
class StageResult:
    """What a command of a stage did.

    Attributes:
        estimates: what was open at its start, by agent.
        spent_before, spent: USD that the run had cost at its start and at its end.
        states: state -> requests of the stage at the end.
        attempts: outcome -> attempts of this command.
        notes: lines for people.
    """

    estimates: list[Estimate]
    spent_before: float
    spent: float
    states: dict[str, int]
    attempts: dict[str, int]
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """For the terminal."""
        lines = [estimate_table(self.estimates), f"  spent by this run before: {usd(self.spent_before)}"]
        if self.attempts:
            lines += [
                f"  spent by this run now:    {usd(self.spent)}",
                "  requests: " + ", ".join(f"{count:,} {state}" for state, count in sorted(self.states.items())),
                "  attempts: " + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(self.attempts.items())),
            ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def estimate_table(estimates: list[Estimate]) -> str:
    """Requests, tokens and cost that are expected, by agent and in all."""
    costs = [e.cost for e in estimates if e.requests]
    total = Estimate(
        agent="all",
        requests=sum(e.requests for e in estimates),
        input_tokens=sum(e.input_tokens for e in estimates),
        output_tokens=sum(e.output_tokens for e in estimates),
        cost=None if None in costs else sum(cost or 0.0 for cost in costs),
    )
    rows = [*estimates, total]
    width = max(len(row.agent) for row in rows)
    lines = [f"  {'expected':<{width}} {'requests':>10} {'tokens in':>13} {'tokens out':>13} {'cost':>12}"]
    for row in rows:
        tokens = f"{row.input_tokens:>13,.0f} {row.output_tokens:>13,.0f}"
        price = "unknown" if row.cost is None else usd(row.cost)
        lines.append(f"  {row.agent:<{width}} {row.requests:>10,} {tokens} {price:>12}")
    return "\n".join(lines)


def run_stage(
    run: RunStore,
    stage: str,
    agents: dict[str, Agent],
    plan: Callable[[], None],
    review: Review,
    options: Options,
    routes: "Mapping[str, Route] | None" = None,
) -> StageResult:
    """Plans and sends all requests of a stage that are not settled.

    Args:
        run: open for writing.
        agents: by name.
        plan: inserts the stage's requests, and leaves those that are there; called within a transaction.
        review: what makes a verdict of a reply.
        routes: what is asked of an agent, where that is not a chat.

    Raises:
        UserError: the budget is reached, a key or a price is missing, or an endpoint gave up.
        KeyboardInterrupt: interrupted; what was in flight is stored.
    """
    # A batch is of chats.
    agents = {name: replace(agent, batch=False) if name in (routes or {}) else agent for name, agent in agents.items()}
    if options.budget is not None:
        check_prices(agents)
    keys = {name: read_key(agent, name) for name, agent in agents.items() if not options.dry_run and not agent.local}
    if not options.dry_run:
        mark_lost(run)
        with run.transaction():
            release_unsent(run, stage, [name for name, agent in agents.items() if not _batches(agent, options)])
    spent = run.spent()
    try:
        with run.transaction():
            plan()
            run.db.execute("UPDATE requests SET state = 'open' WHERE stage = ? AND state = 'postponed'", (stage,))
            estimates = estimate(run.db, stage, agents, options.batch)
            if options.dry_run:
                raise _DryRun
    except _DryRun:
        return StageResult(estimates, spent, spent, {}, {})
    attempts: Counter[str] = asyncio.run(_send(run, stage, agents, keys, review, options, spent, routes or {}))
    states = _states(run, stage)
    outcome = StageResult(estimates, spent, run.spent(), states, dict(attempts))
    if states.get("postponed"):
        print(outcome.table())
        raise UserError(
            f"{states['postponed']:,} requests could not be answered for now (see the attempts above): "
            "run the same command again"
        )
    return outcome


_INTERRUPTED = "interrupted; every reply is stored: run the same command again to continue"
_IN_BATCHES = " (batches go on at the server)"


class _DryRun(Exception):
    """Takes the plan back."""


async def _send(
    run: RunStore,
    stage: str,
    agents: dict[str, Agent],
    keys: dict[str, str | None],
    review: Review,
    options: Options,
    spent: float,
    routes: "Mapping[str, Route]",
) -> Counter[str]:
    from silkie_jax.endpoints.batches import run_batches
    from silkie_jax.endpoints.client import CHAT, Client
    from silkie_jax.endpoints.lanes import send_all

    states = _states(run, stage)
    total, waiting = sum(states.values()), states.get("open", 0)
    progress = Progress(stage, total, total - waiting, spent, options.progress)
    try:
        async with Journal(run.db, run.path / DATABASE) as journal:
            work = StageWork(
                run=run,
                stage=stage,
                review=review,
                budget=Budget(options.budget, spent),
                journal=journal,
                stop=Stop(),
                progress=progress,
                ids=Ids(run.db, "attempts"),
                batch_ids=Ids(run.db, "batches"),
                wire=Wire(run),
            )
            async with AsyncExitStack() as stack:
                clients = {
                    name: await stack.enter_async_context(Client(agent, keys.get(name), route=routes.get(name, CHAT)))
                    for name, agent in agents.items()
                    if not agent.local
                }
                # A reply may have led to another request, of another agent's too: go on until nothing is open.
                while not work.stop and (busy := _with_open(run, stage, agents)):
                    batched = {n: a for n, a in busy.items() if _batches(a, options)}
                    live = {n: a for n, a in busy.items() if n not in batched}
                    with work.stop.on_interrupt(_INTERRUPTED + (_IN_BATCHES if batched else "")):
                        await asyncio.gather(
                            run_batches(work, batched, clients, options.poll),
                            send_all(work, {n: a for n, a in live.items() if not a.local}, clients),
                            _ask_own_models(
                                work,
                                {n: a for n, a in agents.items() if a.local},
                                {n: a for n, a in agents.items() if not a.local and n not in busy},
                                clients,
                                routes,
                            ),
                        )
                    if not work.stop and _all_in_batches(run, stage, live):
                        mend = "leave out batch: false" if options.batch else "add --batch"
                        work.stop.set(
                            UserError(f"the requests that are left wait in batches: {mend} to collect their replies")
                        )
            work.stop.raise_reason()
    finally:
        progress.close()
    return progress.outcomes


async def _ask_own_models(
    work: StageWork,
    agents: dict[str, Agent],
    idle: dict[str, Agent],
    idle_clients: "Mapping[str, Client]",
    routes: "Mapping[str, Route]",
) -> None:
    """Sends what is open for local models. Their servers run one after another: each takes all accelerators there are.

    Agents of one checkpoint share its server. What goes wrong with one stops the run as any endpoint's failure does.

    Args:
        idle: agents that nobody else asks meanwhile. What replies of local models want of them is sent from here, so
            that a server stays while model and agent take turns.
    """
    from silkie_jax.endpoints.client import CHAT, Client
    from silkie_jax.endpoints.lanes import send_all

    for sharing in by_checkpoint(agents).values():
        if work.stop or not _with_open(work.run, work.stage, sharing):
            continue
        try:
            async with AsyncExitStack() as stack:
                url = await _unless_stopped(work.stop, stack.enter_async_context(local_server(sharing)))
                if url is None:
                    return
                clients = {
                    name: await stack.enter_async_context(Client(agent, None, url, routes.get(name, CHAT)))
                    for name, agent in sharing.items()
                }
                while not work.stop and (busy := _with_open(work.run, work.stage, sharing | idle)):
                    await send_all(work, busy, {**idle_clients, **clients})
        except UserError as error:
            work.stop.set(error)


async def _unless_stopped(stop: Stop, work: Coroutine[Any, Any, T]) -> T | None:
    """What comes of some work; None where the stop comes first."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.event.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, stopped):
            one.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def _states(run: RunStore, stage: str) -> dict[str, int]:
    return dict(run.db.execute("SELECT state, count(*) FROM requests WHERE stage = ? GROUP BY 1", (stage,)))


def _with_open(run: RunStore, stage: str, agents: dict[str, Agent]) -> dict[str, Agent]:
    rows = run.db.execute("SELECT DISTINCT agent FROM requests WHERE stage = ? AND state = 'open'", (stage,))
    names = {name for (name,) in rows}
    return {name: agent for name, agent in agents.items() if name in names}


def _batches(agent: Agent, options: Options) -> bool:
    return options.batch and agent.batch and not agent.local


def _all_in_batches(run: RunStore, stage: str, names: Iterable[str]) -> bool:
    """Whether all open requests of these agents, of which there are some, lie in batches."""
    counts = [
        run.db.execute(
            "SELECT count(*), coalesce(sum(EXISTS (SELECT 1 FROM attempts a WHERE a.request = r.id "
            "AND a.outcome IS NULL AND a.batch IS NOT NULL)), 0) FROM requests r "
            "WHERE stage = ? AND agent = ? AND state = 'open'",
            (stage, name),
        ).fetchone()
        for name in names
    ]
    left, in_batches = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return bool(left) and left == in_batches
