"""Pictures to train on, and tiny runs in processes of their own (``running.py``)."""

import json
import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from triptych.data.shapes import Split, write_shards

SCRIPT = Path(__file__).with_name("running.py")
PRELOADED = ["triptych.training.runs", "torch._dynamo", "torchvision.transforms.v2"]
TIMEOUT = 120


@dataclass(frozen=True)
class Ended:
    """How a process ended; a signal is a negative code."""

    code: int | None
    output: str


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 12 training and 5 test scenes of 32 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, Split.TRAIN, 12, shard_size=4, size=32)
    write_shards(folder, Split.TEST, 5, shard_size=5, size=32)
    return folder


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """Starts processes that have torch and the library loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    from multiprocessing import forkserver

    forkserver._forkserver._stop()


@pytest.fixture(scope="session")
def launch(shapes: Path, processes: Any) -> Callable[..., Ended]:
    """``launch(folder, mishap, world=1, **changes of the recipe)`` runs the tiny recipe to its end, good or bad."""

    def run(folder: Path, mishap: tuple[Any, ...] | None = None, world: int = 1, **changes: Any) -> Ended:
        folder.mkdir(parents=True, exist_ok=True)
        outputs = [folder / f"output-{rank}.txt" for rank in range(world)]
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
        together["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        children = []
        for rank, output in enumerate(outputs):
            output.unlink(missing_ok=True)
            job = {
                "data": str(shapes / "train-*.tar"),
                "held_out": str(shapes / "test-*.tar"),
                "folder": str(folder),
                "changes": changes,
                "mishap": mishap,
                "output": str(output),
                "environment": {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {},
            }
            child = processes.Process(target=runpy.run_path, args=(str(SCRIPT), {"JOB": job}, "__main__"))
            child.start()
            children.append(child)
        for child in children:
            child.join(TIMEOUT)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        text = "".join(output.read_text() for output in outputs if output.exists())
        assert None not in codes, f"no end within {TIMEOUT} s:\n{text}"
        return Ended(codes[0] if len(set(codes)) == 1 else None, text)

    return run


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


TIMED = ("samples_per_s", "data_share", "mfu", "eta_s", "memory_gb")


@pytest.fixture(scope="session")
def log_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The records of a run without what depends on the time; every line must be whole."""

    def read(folder: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if name not in TIMED} for record in records]

    return read
