"""The one training loop, for pre-training and fine-tuning, in one process or many."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from triptych.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from triptych.training.expert_parallel import clip_gradients, put_own, take_own, whole_experts
from triptych.training.flops import UNCOUNTED, peak_flops, peak_memory_gb
from triptych.training.logs import Clock, RunLog, describe
from triptych.training.optim import OptimConfig, build_optimizer, set_learning_rate
from triptych.training.parallel import Precision, Process, autocast, parallelize, unwrap


@dataclass(frozen=True)
class TrainConfig:
    """How long and how a run goes.

    Attributes:
        steps: optimiser steps.
        batch_size: samples of a process and forward pass.
        accumulate: forward passes for one optimiser step.
        precision: ``bf16`` keeps fp32 master weights; ``auto`` takes it where the processor is fast in it.
        expert_parallel: every process keeps its share of a soft router's experts, not all of them, and tokens travel.
        ema: decay of an average of the weights that is evaluated and saved in their place; 0 for none.
        keep: newest checkpoints that are kept.
        evaluate_every: steps between evaluations; 0 for only at the end.
        seed: of weights, dropout, order and masks.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    workers: int = 0
    precision: Precision = "auto"
    checkpointing: bool = False
    compile: bool = False
    expert_parallel: bool = False
    ema: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    keep: int = 2
    steps_per_epoch: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("workers", "evaluate_every", "steps_per_epoch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), not {self.ema}")


class BatchLoader(Protocol):
    """What the loop needs of a loader (see :class:`triptych.data.loader.Loader`)."""

    skipped_count: int

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TrainingStopped(RuntimeError):  # noqa: N818 - it is a message to the user, not a fault
    """Training cannot go on; the last checkpoint is good."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: whether all steps were made, and the last evaluation."""

    step: int
    finished: bool
    metrics: Mapping[str, float]


Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""(what to evaluate, step) -> metrics; called on the process that leads."""


class Trainer:
    """Trains a task: a module whose call ``task(batch, step, part)`` gives losses by name.

    Args:
        task: has what is averaged, evaluated and saved as ``task.kept``; and perhaps ``task.measures``, numbers of its
            last call by name (tensors without a graph), which are logged but not minimised.
        folder: of the run: log, TensorBoard, checkpoints.
        evaluate: called every ``evaluate_every`` steps and at the end.
        best: metric (larger is better) that decides which weights ``save_best`` is called with.
    """

    def __init__(
        self,
        task: nn.Module,
        loader: BatchLoader,
        folder: Path,
        config: TrainConfig,
        optim: OptimConfig,
        process: Process | None = None,
        *,
        evaluate: Evaluate | None = None,
        best: str | None = None,
        save_best: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.task, self.loader, self.folder = task, loader, folder
        self.config, self.optim = config, optim
        self.process = process or Process()
        self._evaluate, self._best_metric, self._save_best = evaluate, best, save_best
        self._parallel = parallelize(
            task,
            self.process,
            checkpointing=config.checkpointing,
            compile=config.compile,
            expert_parallel=config.expert_parallel,
        )
        self.optimizer = build_optimizer(task, optim)
        self.average: AveragedModel | None = None
        if config.ema:
            self.average = AveragedModel(task.kept, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[arg-type, no-untyped-call]
        self.step = 0
        self.flops_per_step = 0.0
        self.best = -math.inf
        self.metrics: Mapping[str, float] = {}

    @property
    def kept(self) -> nn.Module:
        """What to evaluate and save: the average where there is one."""
        return self.task.kept if self.average is None else self.average.module  # type: ignore[return-value]

    def run(self) -> Outcome:
        """Resume from the newest checkpoint, if any, and train to the end or to a signal."""
        config = self.config
        torch.manual_seed(config.seed + self.process.rank)
        resumed = self._resume()
        log = RunLog(self.folder, self.step, quiet=not self.process.leads)
        if resumed:
            log.say(f"resumed from {resumed} at step {self.step}")
        self.task.train()
        try:
            with _termination() as terminated:
                return self._train(log, terminated)
        finally:
            log.close()

    def _train(self, log: RunLog, terminated: Callable[[], bool]) -> Outcome:
        config, clock = self.config, Clock()
        steps_per_epoch = config.steps_per_epoch or config.steps
        peak = peak_flops(self.process.device, self._arithmetic())
        batches = iter(self.loader)
        self._maybe_evaluate(log)  # a resumed run: evaluations follow their checkpoint, so this one may be missing
        clock.restart()
        while self.step < config.steps:
            rate = set_learning_rate(self.optimizer, self.optim, self.step, config.steps, steps_per_epoch)
            # Counted once in the life of a run, so that a resumed one computes every step as it would have.
            counter = nullcontext() if self.flops_per_step else _flop_counter()
            with counter:
                losses, measures, norm = self._step(batches, clock)
            if isinstance(counter, FlopCounterMode):
                self.flops_per_step = float(counter.get_total_flops())
                clock.restart()
            self.step += 1
            loss = sum(losses.values())
            record = {"step": self.step, "loss": loss, "losses": losses, **measures, "norm": norm, "lr": rate}
            if self.step % config.log_every == 0 or self.step == config.steps:
                record |= clock.report(config.steps - self.step, self.flops_per_step, peak)
                record |= {
                    "memory_gb": round(peak_memory_gb(self.process.device), 2),
                    "skipped": self.loader.skipped_count,
                }
                shown = record | {"losses": losses | measures}
                log.say(describe(shown, config.steps), passing=self.step != config.steps)
                clock.restart()
            log.write(record)
            stop = self._agree(terminated())
            due = self.step % config.checkpoint_every == 0 or self.step == config.steps
            if due or stop:
                self._save()
            if stop:
                log.say(f"stopped by a signal at step {self.step}; the same command goes on from there")
                return Outcome(self.step, False, self.metrics)
            evaluated = self._maybe_evaluate(log)
            if due or evaluated:
                clock.restart()
        return Outcome(self.step, True, self.metrics)

    def _step(self, batches: Iterator[Any], clock: Clock) -> tuple[dict[str, float], dict[str, float], float]:
        """One optimiser step; returns the mean losses, the mean measures and the gradient norm."""
        config, device = self.config, self.process.device
        parts: list[dict[str, Tensor]] = []
        measured: list[Mapping[str, Tensor]] = []
        for index in range(config.accumulate):
            waiting = time.perf_counter()
            batch = next(batches)
            clock.waiting += time.perf_counter() - waiting
            last = index == config.accumulate - 1
            with self._synchronised(last):
                with autocast(device, config.precision):
                    losses = self._parallel(batch.to(device), self.step, index)
                (torch.stack(list(losses.values())).sum() / config.accumulate).backward()  # type: ignore[no-untyped-call]
            parts.append({name: loss.detach() for name, loss in losses.items()})
            measured.append(getattr(self.task, "measures", {}))
            clock.samples += len(batch) * self.process.world
        largest = math.inf if self.optim.clip is None else self.optim.clip
        norm = clip_gradients(self.task, largest)
        means, measures = _means(parts), _means(measured)
        self._check_finite(means, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.task.kept)  # type: ignore[arg-type]
        clock.steps += 1
        return means, measures, float(norm)

    def _check_finite(self, losses: Mapping[str, float], norm: float) -> None:
        """Stop everywhere, if anywhere: who went on alone would wait for the others."""
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if not self._agree(bool(wrong) or not math.isfinite(norm)):
            return
        what = f"loss {', '.join(wrong)}" if wrong else "loss of another process" if math.isfinite(norm) else "gradient"
        raise TrainingStopped(
            f"the {what} is not finite at step {self.step + 1} ({dict(losses)}). The weights were not changed and "
            f"the last checkpoint in {self.folder / 'checkpoints'} is good; try a lower learning rate or fp32"
        )

    def _maybe_evaluate(self, log: RunLog) -> bool:
        every = self.config.evaluate_every
        due = self.step == self.config.steps or (every > 0 and self.step > 0 and self.step % every == 0)
        if self._evaluate is None or not due:
            return False
        with whole_experts(self.kept):
            if self.process.leads:
                self._lead_evaluation(self._evaluate, log)
            if self.process.world > 1:
                dist.barrier()
        return True

    def _lead_evaluation(self, evaluate: Evaluate, log: RunLog) -> None:
        self.kept.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.metrics = dict(evaluate(self.kept, self.step))
        self.task.train()
        log.write({"step": self.step, "metrics": dict(self.metrics)})
        log.say("  ".join(f"{name} {value:.2f}" for name, value in self.metrics.items()))
        score = self.metrics.get(self._best_metric, -math.inf) if self._best_metric else -math.inf
        if score > self.best and self._save_best is not None:
            self.best = score
            self._save_best(self.kept)

    def _agree(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.process.world == 1:
            return flag
        anywhere = torch.tensor(float(flag), device=self.process.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over processes with the last of the accumulated passes only."""
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            with self._parallel.no_sync():
                yield
        else:
            yield

    def _arithmetic(self) -> torch.dtype:
        plain = isinstance(autocast(self.process.device, self.config.precision), nullcontext)
        return torch.float32 if plain else torch.bfloat16

    def _save(self) -> None:
        state = {
            "step": self.step,
            "flops_per_step": self.flops_per_step,
            "best": self.best,
            "metrics": dict(self.metrics),
            "task": unwrap(self._parallel).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        own: dict[str, Any] = {"loader": self.loader.state_dict(), "random": torch.get_rng_state()}
        if self.process.device.type == "cuda":
            own["random_cuda"] = torch.cuda.get_rng_state(self.process.device)
        own["experts"] = take_own(state, self.task, self.average, self.optimizer)
        save_checkpoint(self.folder / "checkpoints", self.step, state, own, self.process, self.config.keep)

    def _resume(self) -> Path | None:
        path = newest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return None
        state, own = load_checkpoint(path, self.process)
        put_own(state, own.get("experts", {}), self.task, path)
        try:
            self.task.load_state_dict(state["task"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"] or {})
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this model, optimiser or average; use another folder") from error
        self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        self.flops_per_step = state["flops_per_step"]
        self.loader.load_state_dict(own["loader"])
        torch.set_rng_state(own["random"])
        if "random_cuda" in own:
            torch.cuda.set_rng_state(own["random_cuda"], self.process.device)
        return path


class _NoModules(ModuleTracker):
    """Follows nothing: only the whole is of interest, and hooks on modules fail where a step has no gradients."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _flop_counter() -> FlopCounterMode:
    """Counts the operations of a whole step, in which texts may be generated (without gradients)."""
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    counter.mod_tracker = _NoModules()
    return counter


def _means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Of each number over the accumulated passes."""
    return {name: float(sum(part[name] for part in parts) / len(parts)) for name in parts[0]}


@contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT set a flag instead of ending the process; a second one ends it."""
    told = False

    def remember(number: int, frame: object) -> None:
        nonlocal told
        told = True
        signal.signal(number, previous[signal.Signals(number)])

    try:
        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
