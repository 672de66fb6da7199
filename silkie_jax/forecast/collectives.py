"""What a compiled program sends between chips, read from its text."""

import math
import re
from collections import defaultdict

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLEES = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")
_INDEX = re.compile(r" get-tuple-element\(.*\), index=(\d+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that one chip receives in one run of the program, by kind of collective.

    Bodies of loops count as often as they run: by the trip count that the compiler notes, or else by the constant that
    the loop's condition compares with. An all-reduce counts twice, as a ring sends it. The TPU compiler writes a
    collective down again in each computation that it runs beside: those of one channel are one.
    """
    computations, entry = _computations(hlo)
    times = _executions(computations, entry)
    sizes: dict[tuple[str, str], float] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None or not times[name]:
                continue
            kind = match[2].removesuffix("-start")
            if kind in _KINDS:
                channel = _CHANNEL.search(line)
                one = (kind, channel[1] if channel else line)
                sizes[one] = min(sizes.get(one, math.inf), times[name] * _received(kind, match[1], line))
    total: defaultdict[str, float] = defaultdict(float)
    for (kind, _), size in sizes.items():
        total[kind] += size
    return dict(total)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _executions(computations: dict[str, list[str]], entry: str) -> dict[str, float]:
    """How often each computation runs."""
    times: defaultdict[str, float] = defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            if "=" not in line:
                continue
            trips = _trips(line, computations) if " while(" in line else 1
            callees = _CALLEES.findall(line)
            for branches in _BRANCHES.findall(line):
                callees += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for callee in callees:
                visit(callee, count * trips)

    visit(entry, 1)
    return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as noted, or the limit of the counter in its condition over the counter's step."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    lines = computations.get(condition[1], [])
    called = [callee for text in lines for callee in _CALLEES.findall(text)]
    lines = [*lines, *(text for callee in called for text in computations.get(callee, ()))]
    limit = max((int(n) for text in lines for n in _CONSTANT.findall(text)), default=1)
    counters = [int(n) for text in lines for n in _INDEX.findall(text)]
    body = _BODY.search(line)
    step = _step(computations.get(body[1], []), counters[0]) if body and len(counters) == 1 else 1
    return -(-limit // step)


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to the counter, element number `counter` of what it carries; 1 where it does not say."""
    values = {match[1]: line for line in body if (match := _NAME.match(line))}
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    carried = _OPERAND.findall(root[root.find(" tuple(") :])
    added = values.get(carried[counter], "") if counter < len(carried) else ""
    if " add(" not in added:
        return 1
    steps = [_CONSTANT.findall(values.get(name, "")) for name in _OPERAND.findall(added[added.find(" add(") :])]
    return next((int(found[0]) for found in steps if found), 1)


def _received(kind: str, result: str, line: str) -> float:
    sizes = [_BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in _SHAPE.findall(result)]
    start = f"{kind}-start(" in line
    group = _group_size(line)
    # Several may be joined. A start's result is (operands, results) for a gather, (operand, result, ...) otherwise.
    size = sum(sizes)
    if start and kind == "all-gather":
        size = sum(sizes[len(sizes) // 2 :])
    elif start and kind != "all-reduce":
        size = max(sizes, default=0)
    share = (group - 1) / group if group > 1 else 1.0
    match kind:
        case "all-reduce":
            return 2 * size * share
        case "reduce-scatter":
            return (size if start else size * group) * share
        case "collective-permute":
            return size
        case _:
            return size * share


def _group_size(line: str) -> int:
    """Members of a collective's groups, in any of the forms that XLA writes; 0 if it says nothing."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return listed[1].count(",") + 1 if listed else 0
