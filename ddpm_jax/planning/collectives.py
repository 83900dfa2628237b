"""What a compiled program sends between devices, read from its HLO text."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
# "%name = f32[8,128]{1,0:T(8,128)} all-reduce(": an asynchronous one is counted at its start.
_OP = re.compile(rf"= (?P<shape>.*?) (?P<op>{'|'.join(OPS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CALL = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_CALLS = re.compile(r"\b(?:called_computations|branch_computations|calls)=\{([^}]*)\}")


class Collective(NamedTuple):
    """All collectives of a kind over groups of one size, a step."""

    op: str
    group_size: int  # devices that take part in one
    bytes: int  # of their results on one device
    number: int  # of them


def collectives_of(hlo: str, num_devices: int, trip_count: int = 1) -> list[Collective]:
    """The collectives that one execution of a program runs.

    Args:
        hlo: ``compiled.as_text()``.
        num_devices: of the program.
        trip_count: how often the bodies of its loops run.
    """
    computations, entry = _computations(hlo)
    times: dict[str, int] = {}
    _count_runs(computations, entry, 1, trip_count, times)
    totals: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    calls = [call for lines in computations.values() for line in lines for call in _CALL.findall(line)]
    fusions = {callee for kind, callee in calls if kind == "calls"}
    seen: dict[tuple[str, str, int], str] = {}
    for name, runs in times.items():
        for line in computations[name]:
            if not (found := _OP.search(line)):
                continue
            size = _result_bytes(found["op"], found["shape"], bool(found["start"]))
            # The parts of an asynchronous collective that XLA fuses with computing all name it, with its channel; but
            # all that a shard_map says itself have one channel.
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and seen.setdefault((channel[1], found["op"], size), name) != name and name in fusions:
                continue
            total = totals[found["op"], _group_size(line, num_devices)]
            total[0] += runs * size
            total[1] += runs
    return [Collective(op, size, *total) for (op, size), total in sorted(totals.items())]


def wire_bytes(collective: Collective) -> float:
    """Bytes that each device sends, at least: a ring's, which no algorithm beats."""
    n, size = collective.group_size, collective.bytes
    if n == 1:
        return 0.0
    factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return size * factors.get(collective.op, (n - 1) / n)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is executed."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations[header["name"]] = []
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line)
    return computations, entry


def _count_runs(
    computations: dict[str, list[str]], name: str, runs: int, trip_count: int, times: dict[str, int]
) -> None:
    """How often each computation runs that can be reached from ``name``."""
    if name not in computations or times.get(name, 0) >= runs:
        return
    times[name] = runs
    for line in computations[name]:
        for kind, callee in _CALL.findall(line):
            _count_runs(computations, callee, runs * (trip_count if kind == "body" else 1), trip_count, times)
        for callees in _CALLS.findall(line):
            for callee in re.findall(r"[\w.\-]+", callees):
                _count_runs(computations, callee, runs, trip_count, times)


def _result_bytes(op: str, shape: str, start: bool) -> int:
    """Bytes of the result; the tuple of a ``-start`` also holds the operands."""
    sizes = [
        (_BYTES.get(dtype, 1)) * math.prod(int(n) for n in dimensions.split(",") if n)
        for dtype, dimensions in _ARRAY.findall(shape)
    ]
    if not start or op == "all-reduce":
        return sum(sizes)
    if op == "collective-permute":
        return max(sizes)
    return sum(sizes[len(sizes) // 2 :])


def _group_size(line: str, num_devices: int) -> int:
    """Devices of one replica group, in any of the three ways in which HLO writes them."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", found[2]))
    return num_devices
