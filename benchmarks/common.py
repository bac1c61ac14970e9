"""What the benchmarks share: measuring in turns, the processor's own rate, and one form of report.

Machines are shared and their clocks change, so nothing is compared with a time measured elsewhere or earlier: what is
compared runs in turns, A B A B, in one process, and a ratio is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from triptych.training.flops import UNCOUNTED

Call = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told.

    Attributes:
        quick: small sizes, to see that the script runs; its figures mean nothing.
        rounds: how often each side runs.
        processor_time: count the time that the process had a processor, not the time on the wall. With one thread
            it is what remains comparable while other jobs run on the same core.
    """

    quick: bool
    rounds: int
    processor_time: bool

    def seconds(self, call: Call) -> float:
        """How long one call takes."""
        clock = time.process_time if self.processor_time else time.perf_counter
        start = clock()
        call()
        return clock() - start


def parser(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    result.add_argument("--rounds", type=int, default=rounds, help="how often each side runs")
    result.add_argument("--threads", type=int, help="of torch; by default as many as it takes itself")
    result.add_argument("--processor-time", action="store_true", help="not the wall's; with one thread on a busy core")
    return result


def options(arguments: argparse.Namespace) -> Options:
    """The parsed options; sets the number of threads."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return Options(arguments.quick, 1 if arguments.quick else arguments.rounds, arguments.processor_time)


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        amount: what it does, in floating-point operations or in bytes.
    """

    call: Call
    amount: float = 0.0


@dataclass(frozen=True)
class Timings:
    """Seconds of every run of every piece of work, in the order in which they ran."""

    works: Mapping[str, Work]
    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """The middle one of the times."""
        return median(self.seconds[name])

    def rate(self, name: str) -> float:
        """Operations (or bytes) a second."""
        return self.works[name].amount / self.median(name)

    def ratio(self, name: str, to: str) -> float:
        """How many times as long one takes as another, from runs that were neighbours."""
        return median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))

    def share(self, name: str, of: str) -> float:
        """The rate of one as a share of another's, from runs that were neighbours."""
        return self.works[name].amount / self.works[of].amount * self.ratio(of, name)

    def fastest(self, names: Iterable[str]) -> str:
        """The one with the best rate."""
        return max(names, key=self.rate)


def in_turns(works: Mapping[str, Work], how: Options) -> Timings:
    """Run every piece of work once, then the next round. Each must have run before, to be warm."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(how.rounds):
        for name, work in works.items():
            seconds[name].append(how.seconds(work.call))
    return Timings(works, seconds)


def count_flops(call: Call) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of one call."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        call()
    return counter.get_total_flops()


def page_faults(call: Call) -> int:
    """How many pages of memory one call was the first to touch; each costs the processor a microsecond or more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def waited_for(call: Call, device: torch.device) -> Call:
    """The call, over when its device has done it."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def apart(*arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """What this script, with its own and these further arguments, prints in a process of its own."""
    command = [sys.executable, *sys.argv, *arguments]
    merged = os.environ | dict(environment or {})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=merged).stdout)


def products(dtype: torch.dtype, quick: bool = False) -> dict[str, Work]:
    """Matrix products by which the processor is judged: mPLUG-base's widest at batch 4, and two large square ones.

    One call repeats its product for some tens of milliseconds.
    """
    shapes = [(128, 128, 128)] if quick else [(1028, 768, 3072), (1536, 1536, 1536), (2048, 2048, 2048)]
    works = {}
    for rows, inner, columns in shapes:
        flops = 2 * rows * inner * columns
        times = max(1, round((1e10 if dtype == torch.float32 else 5e10) / flops))
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        work = Work(partial(_multiply, x, weight, 1 if quick else times), flops * (1 if quick else times))
        work.call()
        works[f"{str(dtype).removeprefix('torch.')} {rows}x{inner}x{columns}"] = work
    return works


@torch.inference_mode()
def _multiply(x: Tensor, weight: Tensor, times: int) -> None:
    for _ in range(times):
        F.linear(x, weight)


def reading(quick: bool = False) -> Work:
    """Reading memory that is in no cache."""
    numbers = torch.ones(1_000 if quick else 200_000_000)
    return Work(numbers.sum, numbers.nbytes)


def report(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """A table on stderr for people, and JSON on stdout with all that is needed to run it again."""
    _print_table(rows)
    for key, value in notes.items():
        print(f"{key}: {_shown(value)}", file=sys.stderr)
    document = {"benchmark": name, **surroundings(), "settings": settings, "rows": rows, "notes": notes}
    print(json.dumps(document, indent=1))


def _without_folders(argument: str) -> str:
    """An absolute path by its last name alone: where things lie is nobody else's concern."""
    return Path(argument).name if argument.startswith("/") else argument


def surroundings() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "command": " ".join(["python", *map(_without_folders, sys.argv)]),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, and whether it multiplies bf16 matrices in hardware."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [{key: _shown(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    widths = {key: max(len(key), *(len(row.get(key, "")) for row in shown)) for key in columns}
    for row in [{key: key for key in columns}, *shown]:
        print("  ".join(row.get(key, "").ljust(widths[key]) for key in columns).rstrip(), file=sys.stderr)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
