"""The pre-training step against a slow one: one row at a time, without padding, every pass by itself.

Shape legend: B batch, L tokens, V vocabulary, X selected tokens, K keys.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import PretrainingBatch
from triptych.models.mplug import MPlug
from triptych.models.protocol import Encoded
from triptych.objectives.alignment import Alignment, AlignmentConfig, OfficialBehaviour
from triptych.objectives.distributed import StepNoise
from triptych.objectives.pretraining import Pretraining, PretrainingConfig, TextIds

MakeModel = Callable[..., MPlug]
MakeBatch = Callable[..., PretrainingBatch]

IDS = TextIds(pad=0, mask=3, special=(0, 1, 2), vocab_size=40)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CONFIG = PretrainingConfig(
    queue_size=7, momentum=0.9, alpha=0.4, alpha_warmup=20, mlm_probability=0.4, weights=(1.0, 2.0, 0.5, 3.0)
)
ALONE = {"queue_size": 0, "momentum": None, "alpha": 0.0, "distill_language": False}
"""Without a teacher."""
STEP = 10  # half of the warm-up of alpha: alpha is 0.2


def pretraining(model: MPlug, config: PretrainingConfig = CONFIG, seed: int = 5, **official: bool) -> Pretraining:
    config = dataclasses.replace(config, official=OfficialBehaviour(**official))
    return Pretraining(model, config, IDS, mean=MEAN, std=STD, seed=seed).train()


def gradients(task: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    task.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


class Slow:
    """One step of :class:`Pretraining`, written from the paper, sharing nothing with it but the random numbers."""

    def __init__(self, task: Pretraining, batch: PretrainingBatch, step: int) -> None:
        self.task, self.batch, self.step = task, batch, step
        self.config, self.official = task.config, task.config.official
        self.model: MPlug = task.model  # type: ignore[assignment]
        self.teacher = self.model if task.teacher is None else self.moved(task.teacher.model)
        self.alpha = self.config.alpha * step / self.config.alpha_warmup
        self.queue = [part.clone() for part in task.queue.contents()]
        rows = range(len(batch))
        self.image = [self.encode_image(self.model, b) for b in rows]
        self.image_m = self.image
        if task.teacher is not None:
            self.image_m = [self.encode_image(self.teacher, b).detach() for b in rows]
        self.ids = [batch.text.ids_BL[b][batch.text.mask_BL[b]] for b in rows]

    def moved(self, teacher: nn.Module) -> MPlug:
        """The teacher after this step's move."""
        teacher, momentum = copy.deepcopy(teacher), self.config.momentum
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), self.model.parameters(), strict=True):
                mine.copy_(momentum * mine + (1 - momentum) * theirs)
        return teacher  # type: ignore[return-value]

    def encode_image(self, model: MPlug, b: int) -> Encoded:
        channels = [(self.batch.pixels_BCHW[b, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
        return model.encode_image(torch.stack(channels)[None])

    def losses(self) -> dict[str, Tensor]:
        itc, i2t, t2i = self.itc()
        losses = {"itc": itc, "itm": self.itm(i2t, t2i), "mlm": self.mlm(), "prefix": self.prefix()}
        return {name: loss * weight for (name, loss), weight in zip(losses.items(), self.config.weights, strict=True)}

    def itc(self) -> tuple[Tensor, list[list[float]], list[list[float]]]:
        model, teacher, temperature = self.model, self.teacher, self.model.temperature
        rows = range(len(self.batch))
        ids = [*self.batch.image_id_B.tolist(), *self.queue[2].tolist()]
        with torch.set_grad_enabled(self.task.teacher is None):
            image_m = [teacher.embed_image(self.image_m[b])[0] for b in rows]
            text_m = [teacher.embed_text(teacher.encode_text(self.ids[b][None]))[0] for b in rows]
        image_keys, text_keys = torch.stack([*image_m, *self.queue[0]]), torch.stack([*text_m, *self.queue[1]])
        losses, i2t, t2i = [], [], []
        for b in rows:
            same = torch.tensor([float(x == ids[b]) for x in ids])
            if self.official.diagonal_targets:
                same = torch.tensor([float(k == b) for k in range(len(ids))])
            image_E = model.embed_image(self.image[b])[0]
            text_E = model.embed_text(model.encode_text(self.ids[b][None]))[0]
            for own_E, keys, own_m, found in (
                (image_E, text_keys, image_m[b], i2t),
                (text_E, image_keys, text_m[b], t2i),
            ):
                logits_K = keys @ own_E / temperature
                soft_K = (keys @ own_m / temperature.detach()).softmax(0)
                target_K = self.alpha * soft_K + (1 - self.alpha) * same / same.sum()
                losses.append(-(target_K * logits_K.log_softmax(0)).sum())
                found.append(logits_K[: len(self.batch)].tolist())
        return torch.stack(losses).mean(), i2t, t2i

    def itm(self, i2t: list[list[float]], t2i: list[list[float]]) -> Tensor:
        rows, ids = range(len(self.batch)), self.batch.image_id_B.tolist()
        uniform = StepNoise(self.task.seed, self.step).uniform(len(rows), 2, len(rows), device=torch.device("cpu"))

        def negative(b: int, similarity: list[float], which: int) -> int | None:
            found, best = None, -math.inf
            for g in rows:
                score = similarity[g] - math.log(-math.log(float(uniform[b, which, g])))
                if ids[g] != ids[b] and score > best:
                    found, best = g, score
            return found

        pairs = [(b, b, 1) for b in rows]
        pairs += [(b, text, 0) for b in rows if (text := negative(b, i2t[b], 0)) is not None]
        pairs += [(image, b, 0) for b in rows if (image := negative(b, t2i[b], 1)) is not None]
        losses = []
        for image, text, label in pairs:
            fused = self.model.fuse(self.image[image], self.model.encode_text(self.ids[text][None]))
            losses.append(F.cross_entropy(self.model.match_logits(fused.pooled_BP), torch.tensor([label])))
        return torch.stack(losses).mean()

    def mlm(self) -> Tensor:
        """Per token: whether it is chosen, and what becomes of it."""
        B, L = self.batch.text.ids_BL.shape
        noise = StepNoise(self.task.seed, self.step, stream=1).uniform(B, L, 3, device=torch.device("cpu"))
        losses = []
        for b in range(B):
            corrupted, chosen = self.ids[b].clone(), []
            for position, token in enumerate(self.ids[b].tolist()):
                choose, action, random = noise[b, position].tolist()
                if token in IDS.special or choose >= self.config.mlm_probability:
                    continue
                chosen.append(position)
                if action < 0.8:
                    corrupted[position] = IDS.mask
                elif action < 0.9:
                    corrupted[position] = int(random * IDS.vocab_size)
            table_LV = self.fused_masked(self.model, self.image[b], corrupted)
            with torch.no_grad():
                teacher_LV = self.fused_masked(self.teacher, self.image_m[b], corrupted)
            for x in chosen:
                soft = -(table_LV[x].log_softmax(0) * teacher_LV[x].softmax(0)).sum()
                hard = -table_LV[x].log_softmax(0)[self.ids[b][x]]
                losses.append(self.mixed(hard, soft))
        return torch.stack(losses).mean()

    def fused_masked(self, model: MPlug, image: Encoded, ids_L: Tensor) -> Tensor:
        return model.masked_logits(model.fuse(image, model.encode_text(ids_L[None])).text_BLD[0])

    def mixed(self, hard: Tensor, soft: Tensor) -> Tensor:
        return (1 - self.alpha) * hard + self.alpha * soft if self.config.distill_language else hard

    def prefix(self) -> Tensor:
        losses = []
        for b in range(len(self.batch)):
            prefix = self.batch.prefix.ids_BL[b][self.batch.prefix.mask_BL[b]]
            target = self.batch.target.ids_BL[b][self.batch.target.mask_BL[b]]
            table_LV = self.decoded(self.model, self.image[b], prefix, target[:-1])
            with torch.no_grad():
                teacher_LV = self.decoded(self.teacher, self.image_m[b], prefix, target[:-1])
            for x, token in enumerate(target[1:]):
                soft = -(table_LV[x].log_softmax(0) * teacher_LV[x].softmax(0)).sum()
                hard = -table_LV[x].log_softmax(0)[token]
                losses.append(hard if self.official.unweighted_prefix else self.mixed(hard, soft))
        return torch.stack(losses).mean()

    def decoded(self, model: MPlug, image: Encoded, prefix: Tensor, given: Tensor) -> Tensor:
        fused = model.fuse(image, model.encode_text(prefix[None]))
        memory = Encoded(torch.cat([fused.image_BND, fused.text_BLD], dim=1))
        assert model.decoder is not None
        return model.decoder.logits(model.decoder(given[None], memory))[0]


@pytest.mark.parametrize(
    ("fusion", "settings", "official"),
    [
        ("skip", {}, {}),
        ("asymmetric", {}, {}),
        ("co_attention", {}, {}),
        ("skip", {"distill_language": False}, {}),
        ("skip", {"alpha_warmup": 1_000_000_000}, {}),
        ("skip", ALONE, {}),
        ("skip", {}, {"diagonal_targets": True, "unweighted_prefix": True}),
    ],
)
def test_the_step_equals_the_slow_one(
    fusion: str, settings: dict[str, object], official: dict[str, bool], make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """With a queue that holds some of the pictures, and two rows of one picture."""
    task = pretraining(make_model(fusion=fusion), dataclasses.replace(CONFIG, **settings), **official)
    task(make_batch(5, seed=1, image_ids=[1, 2, 3, 4, 5]), step=0)
    batch = make_batch(5, seed=2, image_ids=[3, 6, 7, 6, 8])
    slow = Slow(task, batch, STEP)
    expected = slow.losses()
    expected_grads = gradients(task, expected)
    found = task(batch, STEP)
    assert list(found) == ["itc", "itm", "mlm", "prefix"]
    for name, loss in expected.items():
        torch.testing.assert_close(
            found[name], loss, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )
    grads = gradients(task, found)
    assert grads.keys() == expected_grads.keys() == {f"model.{name}" for name, _ in task.model.named_parameters()}
    for name, grad in expected_grads.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    if task.teacher is not None:
        for mine, theirs in zip(task.teacher.model.parameters(), slow.teacher.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_without_a_teacher_there_is_nothing_to_teach(make_model: MakeModel) -> None:
    task = pretraining(make_model(), dataclasses.replace(CONFIG, **ALONE))
    assert {name.partition(".")[0] for name in task.state_dict()} == {"model", "queue"}
    for settings, message in (({"queue_size": 7}, "must be 0, not 7, 0.0"), ({"alpha": 0.4}, "must be 0, not 0, 0.4")):
        with pytest.raises(ValueError, match=message):
            AlignmentConfig(momentum=None, **{"queue_size": 0, "alpha": 0.0, **settings})
    with pytest.raises(ValueError, match="distill_language must be off"):
        PretrainingConfig(queue_size=0, momentum=None, alpha=0.0)


def test_the_queue_gets_the_teachers_embeddings(make_model: MakeModel, make_batch: MakeBatch) -> None:
    task, batch = pretraining(make_model()), make_batch(4, image_ids=[9, 8, 7, 6])
    slow = Slow(task, batch, STEP)
    task(batch, STEP)
    image_QE, text_QE, id_Q = task.queue.contents()
    assert id_Q.tolist() == [9, 8, 7, 6]
    expected = torch.cat([slow.teacher.embed_image(image) for image in slow.image_m])
    torch.testing.assert_close(image_QE, expected.detach())
    expected = torch.cat([slow.teacher.embed_text(slow.teacher.encode_text(ids[None])) for ids in slow.ids])
    torch.testing.assert_close(text_QE, expected.detach())


def changed_losses(make_model: MakeModel, batch: PretrainingBatch, **official: bool) -> set[str]:
    """The losses that an option changes."""
    found = []
    for options in ({}, official):
        task = pretraining(make_model(), **options)
        with torch.no_grad():  # away from the teacher, so that it matters whether that follows
            for parameter in task.model.parameters():
                parameter.mul_(1.3)
        found.append(task(batch, STEP))
    plain, other = found
    return {name for name in plain if not torch.allclose(plain[name], other[name], rtol=1e-6, atol=1e-7)}


DISTINCT, REPEATED = [1, 2, 3, 4, 5], [1, 2, 1, 3, 2]


@pytest.mark.parametrize(
    ("option", "image_ids", "expected"),
    [
        ("diagonal_targets", REPEATED, {"itc"}),
        ("diagonal_targets", DISTINCT, set()),
        ("frozen_fusion_teacher", REPEATED, {"mlm", "prefix"}),
        ("sequence_softmax", REPEATED, {"mlm"}),
        ("unweighted_prefix", REPEATED, {"prefix"}),
        ("teacher_dropout", REPEATED, set()),
    ],
)
def test_an_official_option_changes_what_it_says_and_nothing_else(
    option: str, image_ids: list[int], expected: set[str], make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """In a network without dropout; with dropout the last one changes all that has a teacher."""
    assert changed_losses(make_model, make_batch(5, image_ids=image_ids), **{option: True}) == expected


def test_options_are_off_by_default() -> None:
    assert not any(dataclasses.asdict(OfficialBehaviour()).values())
    assert PretrainingConfig().official == OfficialBehaviour()


def test_frozen_fusion_teacher_freezes_the_fusion_and_its_mlm_head_alone(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """Officially the MLM head is a part of ``fusion_encoder`` (specification 1.10 and 4)."""
    task = pretraining(make_model(), frozen_fusion_teacher=True)
    first = {name: parameter.clone() for name, parameter in task.teacher.model.named_parameters()}
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1.0)
        task.model.temperature.fill_(0.3)
    task(make_batch(3), STEP)
    moved = {name for name, p in task.teacher.model.named_parameters() if not torch.equal(p, first[name])}
    assert moved == {name for name in first if not name.startswith(("fusion.", "masked_head."))}


def test_sequence_softmax_is_the_official_formula(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """The batch has one length, since the official softmax counts padding as it happens to be."""
    config = dataclasses.replace(CONFIG, alpha=1.0, alpha_warmup=1, weights=(1.0,) * 4, mlm_probability=1.0)
    task, batch = pretraining(make_model(), config, sequence_softmax=True), make_batch(1, seed=3)
    L = batch.text.ids_BL.shape[1]
    slow = Slow(task, batch, STEP)
    corrupted, chosen_BL = task._mask(batch.text, StepNoise(task.seed, STEP, stream=1))
    table_LV = slow.fused_masked(slow.model, slow.image[0], corrupted.ids_BL[0])
    teacher_LV = slow.fused_masked(slow.teacher, slow.image_m[0], corrupted.ids_BL[0])
    chosen = chosen_BL[0].nonzero().flatten().tolist()
    assert 0 < len(chosen) < L
    expected = torch.stack([-(table_LV.log_softmax(0)[x] * teacher_LV[x].softmax(0)).sum() for x in chosen]).mean()
    torch.testing.assert_close(task(batch, STEP)["mlm"], expected, rtol=1e-5, atol=1e-5)


def test_teacher_dropout(make_model: MakeModel, make_batch: MakeBatch) -> None:
    for asked in (False, True):
        task = pretraining(make_model(dropout=0.5), teacher_dropout=asked)
        assert task.teacher.model.training == asked
        assert not task.eval().teacher.model.training
        task.train()
        images = [task.teacher.model.encode_text(make_batch(3).text.ids_BL).hidden_BLD for _ in range(2)]
        assert torch.equal(*images) != asked


def test_step_and_seed_decide_the_randomness(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """And nothing else does: not the global generator, not how often the step was run before."""
    batch = make_batch(5)
    config = dataclasses.replace(CONFIG, alpha=0.0)

    def losses(step: int, seed: int = 5) -> dict[str, float]:
        torch.rand(int(torch.randint(1, 9, ())))
        return {k: v.item() for k, v in pretraining(make_model(), config, seed)(batch, step).items()}

    first = losses(3)
    torch.manual_seed(77)
    assert losses(3) == first
    for other in (losses(4), losses(3, seed=6)):
        assert {name for name in first if first[name] != other[name]} >= {"mlm"}
        assert other["itc"] == first["itc"]
        assert other["prefix"] == first["prefix"]


@pytest.mark.parametrize("objective", ["pre-training", "alignment"])
def test_accumulated_passes_share_one_teacher_and_differ_in_what_they_draw(
    objective: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """Images, texts and alpha alike, so that only masks and negatives can differ."""
    model = make_model()
    task: Alignment = pretraining(model, dataclasses.replace(CONFIG, queue_size=0))
    if objective == "alignment":
        task = Alignment(model, AlignmentConfig(queue_size=0, alpha_warmup=20), mean=MEAN, std=STD).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.temperature.fill_(0.5)
    found, teachers = [], [[p.clone() for p in task.teacher.parameters()]]
    for part in range(4):
        found.append({name: loss.item() for name, loss in task(make_batch(5), STEP, part).items()})
        teachers.append([p.clone() for p in task.teacher.parameters()])
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in itertools.pairwise(teachers)
    ]
    assert moved == [True, False, False, False]
    for name in found[0]:
        assert (len({losses[name] for losses in found}) > 1) == (name in {"itm", "mlm"}), name


def test_negatives_differ_from_step_to_step(make_model: MakeModel, make_batch: MakeBatch) -> None:
    config = dataclasses.replace(CONFIG, alpha=0.0)
    model = make_model()
    with torch.no_grad():
        model.temperature.fill_(0.5)
    found = {pretraining(model, config)(make_batch(5), step)["itm"].item() for step in range(4)}
    assert len(found) > 1


def test_evaluation_changes_neither_teacher_nor_queue(make_model: MakeModel, make_batch: MakeBatch) -> None:
    task = pretraining(make_model()).eval()
    with torch.no_grad():
        task.model.match_head.weight.mul_(2)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task(make_batch(3), STEP)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_the_temperature_is_kept_in_its_range(make_model: MakeModel, make_batch: MakeBatch) -> None:
    for start, expected in ((0.9, 0.5), (-1.0, 0.001), (0.1, 0.1)):
        task = pretraining(make_model())
        with torch.no_grad():
            task.model.temperature.fill_(start)
        losses = task(make_batch(3), STEP)
        assert task.model.temperature.item() == pytest.approx(expected)
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 0.0), (0.0, 0.0, 0.5, 0.0)])
def test_weights(weights: tuple[float, float, float, float], make_model: MakeModel, make_batch: MakeBatch) -> None:
    plain = dataclasses.replace(CONFIG, weights=(1.0, 1.0, 1.0, 1.0))
    expected = pretraining(make_model(), plain)(make_batch(3), STEP)
    found = pretraining(make_model(), dataclasses.replace(CONFIG, weights=weights))(make_batch(3), STEP)
    for (name, loss), weight in zip(expected.items(), weights, strict=True):
        torch.testing.assert_close(found[name], weight * loss)


def test_padding_and_the_other_rows_lengths_change_nothing(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(4)
    expected = pretraining(make_model())(batch, STEP)

    def widen(tokens: object, extra: int) -> object:
        assert dataclasses.is_dataclass(tokens)
        ids_BL = F.pad(tokens.ids_BL, (0, extra))
        return dataclasses.replace(tokens, ids_BL=ids_BL, mask_BL=F.pad(tokens.mask_BL, (0, extra)))

    wide = dataclasses.replace(
        batch, text=widen(batch.text, 60), prefix=widen(batch.prefix, 3), target=widen(batch.target, 2)
    )
    for name, loss in pretraining(make_model())(wide, STEP).items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-5)


def test_padding_is_never_masked(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Not even where the tokenizer does not call it special."""
    config = dataclasses.replace(CONFIG, mlm_probability=1.0)
    task = Pretraining(make_model(), config, dataclasses.replace(IDS, special=(1,)), mean=MEAN, std=STD)
    text = make_batch(5).text
    _, chosen_BL = task._mask(text, StepNoise(0, 0))
    assert torch.equal(chosen_BL, text.mask_BL & (text.ids_BL != 1))
    assert not text.mask_BL.all()


def test_a_batch_of_one(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """No negatives: ITM is the positive pair alone, and every parameter still has a gradient."""
    task, batch = pretraining(make_model()), make_batch(1)
    losses = task(batch, STEP)
    assert all(loss.isfinite() for loss in losses.values())
    slow = Slow(task, batch, STEP)
    fused = slow.model.fuse(slow.image[0], slow.model.encode_text(slow.ids[0][None]))
    expected = 2.0 * F.cross_entropy(slow.model.match_logits(fused.pooled_BP), torch.tensor([1]))
    torch.testing.assert_close(losses["itm"], expected)
    assert len(gradients(task, losses)) == len(list(task.model.parameters()))


def test_one_picture_in_every_row(make_model: MakeModel, make_batch: MakeBatch) -> None:
    task = pretraining(make_model())
    for step in range(3):
        losses = task(make_batch(4, seed=step, image_ids=[7, 7, 7, 7]), step)
        grads = gradients(task, losses)
        assert all(loss.isfinite() for loss in losses.values())
        assert all(grad.isfinite().all() for grad in grads.values())


def test_no_token_masked(make_model: MakeModel, make_batch: MakeBatch) -> None:
    task = pretraining(make_model(), dataclasses.replace(CONFIG, mlm_probability=0.0))
    losses = task(make_batch(3), STEP)
    assert losses["mlm"].item() == 0
    grads = gradients(task, losses)
    assert not grads["model.masked_head.head.bias"].any()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_broken_picture_does_not_crash(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Its NaN shows in the loss, where the training loop sees it."""
    batch = make_batch(4)
    pixels_BCHW = batch.pixels_BCHW.float()
    pixels_BCHW[1] = math.nan
    losses = pretraining(make_model())(dataclasses.replace(batch, pixels_BCHW=pixels_BCHW), STEP)
    assert losses["itc"].isnan()


def test_bf16_autocast(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch(4)
    expected = pretraining(make_model())(batch, STEP)
    task = pretraining(make_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(batch, STEP)
    assert all(grad.isfinite().all() for grad in gradients(task, losses).values())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.1)


def test_a_saved_run_goes_on_as_if_never_stopped(make_model: MakeModel, make_batch: MakeBatch) -> None:
    task, resumed = pretraining(make_model()), pretraining(make_model())
    task(make_batch(4, seed=1), 1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.mul_(0.9)
    resumed.load_state_dict(task.state_dict())
    expected, found = (part(make_batch(4, seed=2), 2) for part in (task, resumed))
    assert {name: loss.item() for name, loss in found.items()} == {k: v.item() for k, v in expected.items()}
    for name, value in task.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_model_without_decoder_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.decoder = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="PrefixLM needs a model with a decoder; this mplug has none"):
        pretraining(model)


def test_alignment_is_the_first_half_of_pre_training(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Retrieval's fine-tuning: the same ITC and ITM, in values and gradients, and nothing of the rest."""
    settings = {"queue_size": 7, "momentum": 0.9, "alpha": 0.4, "alpha_warmup": 20}
    whole = pretraining(make_model(), PretrainingConfig(**settings))
    half = Alignment(make_model(), AlignmentConfig(**settings), mean=MEAN, std=STD, seed=5).train()
    for task in (whole, half):
        task(make_batch(5, seed=1, image_ids=[1, 2, 3, 4, 5]), step=0)
    batch = make_batch(5, seed=2, image_ids=[3, 6, 7, 6, 8])
    expected = {name: loss for name, loss in whole(batch, STEP).items() if name in {"itc", "itm"}}
    found = half(batch, STEP)
    assert list(found) == ["itc", "itm"]
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5)
    grads, expected_grads = gradients(half, found), gradients(whole, expected)
    unused = {name for name in expected_grads if name.startswith(("model.decoder.", "model.masked_head."))}
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-3, atol=2e-5)
    assert set(grads) == set(expected_grads) - unused
