"""What EVE's tasks of pre-training cost: masked signals alone, and with contrast and matching (the paper's table 1).

    python benchmarks/eve_tasks.py > benchmarks/results/eve_tasks.json
    python benchmarks/eve_tasks.py --size small --memory-gb 4
    python benchmarks/eve_tasks.py --device cuda --precision bf16 --batch 64 --rounds 10

One network of the base size and one optimiser for all; a step is forward, backward, clipping and AdamW, as
``benchmarks/eve.py`` has it. ITC runs pictures and texts each alone through all blocks; ITM fuses each text with its
picture, each picture with a hard negative text and each text with a hard negative picture. None has a teacher.

``equal``: all at one batch, in turns; ``memory``: each at that batch in a process of its own. ``largest``: each at the
largest batch that fits into ``--memory-gb``, in turns. That batch is found by measuring: a step in a process of its own
(after one of two pairs, so that the optimiser has all its memory), a line through two measurements, the batch where it
meets the limit, and again, until one that fits and one that does not are no further apart than a twentieth. On a GPU
the limit is by default 95 % of its memory.

"time" and "operations" are those of a pair of data as multiples of MLM and MIM's; "paper" is the time of an epoch on
8 A100, each at its own largest batch, as such a multiple, and "paper's batch" that batch of a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from common import Timings, Work, apart, in_turns, options, parser, report
from eve import CONFIGS, DTYPES, Bench, Step, random_batch
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.training.flops import peak_memory_gb

Row = dict[str, Any]

BOTH, ALL = "MLM+MIM", "MLM+MIM+ITC+ITM"
TASKS: dict[str, MaskedSignalConfig] = {
    "MLM": MaskedSignalConfig(signals="text"),
    BOTH: MaskedSignalConfig(),
    "MLM+ITC": MaskedSignalConfig(signals="text", contrast="itc"),
    "MLM+MIM+ITC": MaskedSignalConfig(contrast="itc"),
    "MLM+ITC+ITM": MaskedSignalConfig(signals="text", contrast="itc", matching="hard"),
    ALL: MaskedSignalConfig(contrast="itc", matching="hard"),
}
PAPER: dict[str, tuple[int, float]] = {
    BOTH: (224, 2.14),
    "MLM+ITC": (132, 3.26),
    "MLM+ITC+ITM": (80, 6.88),
    ALL: (64, 7.73),
}
"""Batch of a GPU and hours of an epoch (table 1)."""
PAPER_BATCHES = PAPER[BOTH][0] / PAPER[ALL][0]

FEWEST = 2
"""Pairs in a batch: with one there is nothing to contrast."""
CPU_GB = 12.0
MEASUREMENTS = 8


def equal(bench: Bench, names: list[str], batch: int) -> Iterator[Row]:
    """All at one batch, in turns."""
    yield from in_turns_at(bench, dict.fromkeys(names, batch), "equal")


def in_turns_at(bench: Bench, batches: Mapping[str, int], part: str) -> Iterator[Row]:
    """Each at a batch of its own."""
    trained = bench.trained()
    works: dict[str, Work] = {}
    for name, batch in batches.items():
        step = Step(trained, TASKS[name], random_batch(bench.config, batch, bench.device), bench.precision)
        works[name] = bench.warm(step, bench.count(step, trained))
    timings = in_turns(works, bench.how)
    for name, batch in batches.items():
        yield {"part": part, "tasks": name, "batch": batch, **compared(timings, batches, name)}


def compared(timings: Timings, batches: Mapping[str, int], name: str) -> Row:
    """Time and operations of a step, and of a pair beside MLM and MIM's."""
    seconds, flops = timings.median(name), timings.works[name].amount
    row: Row = {"seconds": seconds, "samples/s": batches[name] / seconds, "GFLOP a pair": flops / batches[name] / 1e9}
    row["GFLOP/s"] = timings.rate(name) / 1e9
    if BOTH in batches:
        share = batches[BOTH] / batches[name]
        row["time"] = timings.ratio(name, BOTH) * share
        row["operations"] = flops / timings.works[BOTH].amount * share
        if name in PAPER:
            row["paper"] = PAPER[name][1] / PAPER[BOTH][1]
    return row


def memory(names: list[str], batch: int) -> Iterator[Row]:
    """The peak of each at one batch."""
    found = {name: apart("--alone", name, str(batch)) for name in names}
    for name, peak in found.items():
        row: Row = {"part": "memory", "tasks": name, "batch": batch, "peak GB": peak}
        if BOTH in found and peak is not None and found[BOTH] is not None:
            row["memory"] = peak / found[BOTH]
        yield row


def peak_alone(bench: Bench, name: str, batch: int) -> float | None:
    """GB of a step at a batch, once the optimiser has its memory; None where there is no room."""
    trained = bench.trained()
    try:
        for size in (FEWEST, batch):
            Step(trained, TASKS[name], random_batch(bench.config, size, bench.device), bench.precision)()
    except torch.OutOfMemoryError:
        return None
    return peak_memory_gb(bench.device)


def largest_batch(name: str, limit_gb: float, begin: int) -> tuple[int, dict[int, float | None]]:
    """The largest batch that was seen to stay below the limit, and all that was measured; 0 where none did."""
    measured: dict[int, float | None] = {}
    batch: int | None = begin
    while batch is not None and len(measured) < MEASUREMENTS:
        measured[batch] = apart("--alone", name, str(batch))
        batch = next_batch(measured, limit_gb)
    return max((batch for batch, peak in measured.items() if fits(peak, limit_gb)), default=0), measured


def fits(peak: float | None, limit_gb: float) -> bool:
    """Whether a measured step stays below the limit."""
    return peak is not None and peak <= limit_gb


def next_batch(measured: Mapping[int, float | None], limit_gb: float) -> int | None:
    """What to measure next: where a straight line meets the limit. None once it is known to a twentieth."""
    fitting = [batch for batch, peak in measured.items() if fits(peak, limit_gb)]
    too_large = [batch for batch in measured if batch not in fitting]
    if not fitting:
        return None if min(too_large) == FEWEST else max(FEWEST, min(too_large) // 2)
    low = max(fitting)
    if not too_large:  # the line goes on beyond what was measured
        *_, (a, peak_a), (b, peak_b) = sorted({0: 0.0, **measured}.items())
        assert peak_a is not None
        assert peak_b is not None
        rises = len(measured) > 1 and peak_b > peak_a
        met = int(b + (limit_gb - peak_b) * (b - a) / (peak_b - peak_a)) if rises else 2 * b
        return min(max(met, b + 1), 4 * b)
    high = min(too_large)
    if high - low <= max(1, low // 20):
        return None
    peak_low, peak_high = measured[low], measured[high]
    assert peak_low is not None
    share = 0.5 if peak_high is None else (limit_gb - peak_low) / (peak_high - peak_low)
    return min(max(low + round(share * (high - low)), low + 1), high - 1)


def largest(bench: Bench, names: list[str], limit_gb: float, begin: int) -> tuple[list[Row], dict[str, Any]]:
    """Each at the largest batch that fits."""
    found = {name: largest_batch(name, limit_gb, begin) for name in names}
    batches = {name: batch for name, (batch, _) in found.items() if batch}
    rows = list(in_turns_at(bench, batches, "largest"))
    for row in rows:
        name = row["tasks"]
        row["peak GB"] = found[name][1][row["batch"]]
        if BOTH in batches:
            row["batches"] = batches[BOTH] / row["batch"]
        if name in PAPER:
            row["paper's batch"] = PAPER[name][0]
    notes = {
        f"GB by batch, {name}": {str(batch): peak for batch, peak in sorted(m.items())}
        for name, (_, m) in found.items()
    }
    return rows, notes


def main() -> None:
    description = parser(__doc__, rounds=5)
    parts = ("equal", "memory", "largest")
    description.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="these parts alone")
    description.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="these tasks alone")
    description.add_argument("--size", choices=CONFIGS, default="base")
    description.add_argument("--batch", type=int, default=4, help="the equal one, and where the search begins")
    description.add_argument("--memory-gb", type=float, help=f"for the largest batch; on a CPU {CPU_GB:g} by default")
    description.add_argument("--precision", choices=DTYPES, default="fp32", help="bf16: arithmetic, not the weights")
    description.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    description.add_argument("--compile", action="store_true", help="the blocks, as training can")
    description.add_argument("--checkpointing", action="store_true", help="recompute the activations of blocks")
    description.add_argument("--alone", nargs=2, metavar=("TASKS", "BATCH"), help="only the memory of these")
    given = description.parse_args()
    how = options(given)
    bench = Bench.of(given, how)
    torch.manual_seed(0)
    if given.alone:
        print(json.dumps(peak_alone(bench, given.alone[0], int(given.alone[1]))))
        return
    limit_gb = given.memory_gb or CPU_GB
    if given.memory_gb is None and bench.device.type == "cuda":
        limit_gb = 0.95 * torch.cuda.get_device_properties(bench.device).total_memory / 1e9
    rows: list[Row] = []
    notes: dict[str, Any] = {
        "paper": f"all four of MLM+MIM: time {PAPER[ALL][1] / PAPER[BOTH][1]:.2f}, batch {PAPER_BATCHES:.2f}"
    }
    if "memory" in given.only:
        rows += memory(given.tasks, given.batch)
    if "equal" in given.only:
        rows += equal(bench, given.tasks, given.batch)
    if "largest" in given.only:
        found, measured = largest(bench, given.tasks, limit_gb, given.batch)
        rows += found
        notes |= measured
    notes |= {f"all four of MLM+MIM, {row['part']}": ratios(row) for row in rows if row["tasks"] == ALL}
    settings = {
        "size": bench.size,
        "precision": bench.precision,
        "compiled": bench.compile,
        "recomputing": bench.checkpointing,
        "memory GB": limit_gb,
        "rounds": how.rounds,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
    }
    report("eve_tasks", settings, rows, notes)


def ratios(row: Row) -> Row:
    """What a row says beside MLM and MIM."""
    return {name: row[name] for name in ("time", "operations", "memory", "batches", "paper") if name in row}


if __name__ == "__main__":
    main()
