"""What a task measures besides its losses."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.training.loop import TrainConfig, Trainer
from triptych.training.optim import OptimConfig


class Batches:
    """1, 2, 3..."""

    skipped_count = 0

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((2,), float(n)) for n in range(1, 100))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Measuring(nn.Module):
    """Its loss is the weight times the batch; with ``measured`` it tells ten times the batch."""

    def __init__(self, measured: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2, bias=False)
        self.measured = measured
        if measured:
            self.measures: dict[str, Tensor] = {}

    @property
    def kept(self) -> nn.Module:
        return self

    def forward(self, batch: Tensor, step: int, part: int) -> dict[str, Tensor]:
        with torch.inference_mode():  # as generation does: it must not disturb the counting of operations
            self.inner(self.weight)
        if self.measured:
            self.measures = {"tens": 10 * batch.mean()}
        return {"product": (self.weight * batch + self.inner(batch)).mean()}


def run(folder: Path, measured: bool) -> tuple[list[dict[str, Any]], nn.Module]:
    torch.manual_seed(0)
    task = Measuring(measured)
    config = TrainConfig(steps=2, batch_size=2, accumulate=2, precision="fp32", log_every=1)
    Trainer(task, Batches(), folder, config, OptimConfig(lr=0.1, vision_lr=None)).run()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], task


def test_measures_are_logged_and_not_minimised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, task = run(tmp_path / "with", True)
    assert "tens 15.000" in capsys.readouterr().err
    plain, other = run(tmp_path / "without", False)
    assert [record["tens"] for record in records] == [15, 35]  # means of the accumulated passes
    for record, without in zip(records, plain, strict=True):
        assert record["loss"] == record["losses"]["product"] == without["loss"]
        assert record["losses"].keys() == {"product"}
        assert "tens" not in without
    for name, value in task.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
