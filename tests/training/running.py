"""A tiny training run in a process of its own, with a mishap; ``conftest.py`` starts it with ``JOB`` set.

JOB: ``data``, ``held_out`` (shards), ``folder``, ``changes`` of the recipe (see :func:`build`), ``mishap`` (the name of
a function of ``Mishaps`` and its arguments), ``output`` (where stdout and stderr go).
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch, Sampling
from triptych.models.eve import EveConfig, PixelDecoderConfig
from triptych.models.moe import MoEConfig
from triptych.models.mplug import MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.objectives.ranking import RankingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training import checkpoint, flops, logs, runs
from triptych.training.loop import TrainConfig, TrainingStopped
from triptych.training.optim import OptimConfig
from triptych.training.parallel import process_group
from triptych.training.runs import DataConfig, Recipe, run_recipe

SEARCH = BeamSearch(1, 1, 4)
OBJECTIVES = {
    "pretraining": PretrainingConfig(queue_size=12, momentum=0.9, alpha_warmup=2),
    "retrieval": AlignmentConfig(queue_size=12, momentum=0.9, alpha_warmup=2),
    "captioning": CaptioningConfig(search=SEARCH),
    "vqa": VqaConfig(answering="classify", min_count=1, per_picture=2),
    "self_critical": SelfCriticalConfig(CaptioningConfig(search=SEARCH), explore=Sampling(1, 4), count=3),
    "ranking": RankingConfig(false_texts=2),
    "masked_signal": MaskedSignalConfig(image_ratio=0.5),
}


def build(data, held_out, *, objective="pretraining", dropout=0.1, width=32, lr=1e-2, muon_lr=None, **train):
    """A recipe for a network of width 32 on pictures of 32 pixels; ``train`` changes its TrainConfig.

    The network is an mPLUG, and where signals are masked an EVE.
    """
    vision = VisionConfig(width=32, layers=1, heads=2, patch=16, image_size=32)
    text = TextConfig(
        vocab_size=256, width=width, heads=2, ffn=48, max_positions=64, dropout=dropout, attention_dropout=dropout
    )
    model = MPlugConfig(vision, text, text_layers=1, fusion_layers=2, decoder_layers=1, stride=1, embed_dim=16)
    if objective == "masked_signal":
        pixels = PixelDecoderConfig(width=16, layers=1, heads=2)
        model = EveConfig(
            dataclasses.replace(vision, layers=2),
            text,
            deep_layers=1,
            moe=MoEConfig(experts=3),
            drop_path=0.1,
            embed_dim=16,
            pixel_decoder=pixels,
        )
    return Recipe(
        name="tiny",
        objective=OBJECTIVES[objective],
        model=model,
        data=DataConfig(
            train=(str(data),),
            evaluate=(str(held_out),),
            preprocessing=Preprocessing(32, HALF, HALF),
            scale=(0.5, 1.0),
            max_tokens=34,
        ),
        train=dataclasses.replace(
            TrainConfig(steps=6, batch_size=3, checkpoint_every=2, evaluate_every=3, log_every=3, precision="fp32"),
            **train,
        ),
        optim=OptimConfig(lr=lr, vision_lr=None, warmup_steps=2, muon_lr=muon_lr),
        retrieval=RetrievalConfig(candidates=2, max_tokens=34),
        captioning=CaptioningConfig(context="fused", search=SEARCH),
    )


class Mishaps:
    """What goes wrong; each is made ready before the run."""

    @staticmethod
    def signal_after(step, name):
        """A signal when a step has been logged."""
        write = logs.RunLog.write

        def write_and_signal(self, record):
            write(self, record)
            if record["step"] == step and "loss" in record:
                os.kill(os.getpid(), getattr(signal, name))

        logs.RunLog.write = write_and_signal

    @staticmethod
    def killed_evaluating(step):
        """Killed in the middle of an evaluation."""
        evaluate = runs.evaluate_model
        calls = itertools.count(1)

        def evaluate_and_die(*args, **kwargs):
            result = evaluate(*args, **kwargs)
            if next(calls) == step // 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        runs.evaluate_model = evaluate_and_die

    @staticmethod
    def killed_writing(step, file, part):
        """Killed when a part of a checkpoint's file is written."""
        write = checkpoint._write

        def write_and_die(path, values):
            write(path, values)
            if path.name == file and path.parent.name == f".writing-{step:08d}":
                os.truncate(path, int(path.stat().st_size * part))
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._write = write_and_die

    @staticmethod
    def killed_before_renaming(step):
        """Killed when all files of a checkpoint are written, but it has not got its name."""
        sync = checkpoint._sync

        def sync_and_die(folder):
            sync(folder)
            if folder.name == f".writing-{step:08d}":
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._sync = sync_and_die

    @staticmethod
    def killed_removing():
        """Killed when the checkpoint has its name and an old one is to be removed."""
        checkpoint.shutil.rmtree = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def full_disk(step, kind):
        """No space for a checkpoint: as Python reports it, or as torch does."""
        errors = {
            "OSError": OSError(errno.ENOSPC, "No space left on device"),
            "RuntimeError": RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        }
        write = checkpoint._write

        def write_a_little(path, values):
            if path.parent.name == f".writing-{step:08d}" and path.name == "state.pt":
                path.write_bytes(b"PK")
                raise errors[kind]
            write(path, values)

        checkpoint._write = write_a_little

    @staticmethod
    def limited_files(size):
        """No file may become larger: what happens is what happens on a full disk, but for the number."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(job):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # or the loader's workers would start as this process did
    flops.matmul_rate.__defaults__ = (64, 0.0)  # what it measures is of no interest here
    os.environ.update(job.get("environment", {}))
    name, *arguments = job["mishap"] or ("nothing",)
    if name != "nothing":
        getattr(Mishaps, name)(*arguments)
    with process_group() as process:
        run = run_recipe(build(job["data"], job["held_out"], **job["changes"]), Path(job["folder"]), process)
        print(json.dumps({"finished": run.outcome.finished, "step": run.outcome.step}), flush=True)


if __name__ == "__main__":
    with (
        open(JOB["output"], "a", buffering=1) as output,  # noqa: F821 - set by who runs this file
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            main(JOB)  # noqa: F821
        except (ValueError, OSError, TrainingStopped) as error:
            print(f"{type(error).__name__}: {error}")
            sys.exit(2)
