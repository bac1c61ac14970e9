"""What every task must do with every registered network: train all that it says, and nothing else.

Shape legend: B batch.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from triptych.data.batches import ImageTextBatch, PretrainingBatch, Tokens
from triptych.data.lists import ENTAILMENT
from triptych.data.samples import Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch
from triptych.models import build
from triptych.models.protocol import VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.pretraining import Pretraining, PretrainingConfig, TextIds
from triptych.objectives.ranking import RankingConfig, TextRanking
from triptych.tasks.base import Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.entailment import Entailment, Hypothesis
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.image_classification import ImageClassification, ImageClassificationConfig, LabelledImage
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config, Statement
from triptych.tasks.self_critical import ReferencedBatch, SelfCritical, SelfCriticalConfig
from triptych.tasks.text_classification import LabelledText, TextClassification, TextClassificationConfig
from triptych.tasks.vqa import Question, VisualQuestionAnswering, VqaConfig

B = 3
PREPROCESSING = Preprocessing(32, HALF, HALF)
CAPTIONS = ("a red circle", "two blue stars", "a blue circle")
SEARCH = BeamSearch(2, 1, 6)


@pytest.fixture
def tokenizer(case: Any) -> Tokenizer:
    tokenizer = train_wordpiece([*CAPTIONS * 3, "seven large green squares above them"] * 2, case.vocab)
    assert tokenizer.vocab_size == case.vocab
    return tokenizer


@pytest.fixture
def pixels(case: Any) -> Tensor:
    """uint8."""
    torch.manual_seed(1)
    return torch.randint(0, 256, (B, 3, case.image_size, case.image_size), dtype=torch.uint8)


@pytest.fixture
def texts(tokenizer: Tokenizer) -> Tokens:
    return Tokens(*tokenizer.encode_batch(CAPTIONS, max_length=None, end=True))


def gradients(module: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of losses. Every parameter that is to be trained gets one: processes wait for them all."""
    module.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(grad.isfinite().all() for grad in grads.values())
    return grads


def assert_trains_what_it_says(task: Task, batch: Any) -> None:
    """A step gives a finite gradient to all that is to be trained: of the used parts, and the head."""
    task.freeze_rest()
    grads = gradients(task, task(batch))
    assert {name for name in task.own_state() if name in dict(task.named_parameters())} <= set(grads)
    attributes = {name.split(".")[1] for name in grads if name.startswith("model.")}
    assert attributes <= {name for part in task.uses for name in task.model.parts.get(part, ())}


def owners(model: VisionLanguageModel, *, with_gradient: bool = False) -> set[str]:
    """The attributes that have parameters."""
    named = model.named_parameters()
    return {name.partition(".")[0] for name, own in named if own.grad is not None or not with_gradient}


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("head", ["linear", "hidden"])
def test_pictures_are_classified_by_their_encoder_alone(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, pooling: Any, head: Any
) -> None:
    config = ImageClassificationConfig(("x", "y"), pooling=pooling, head=head)
    task = ImageClassification(model, tokenizer, PREPROCESSING, config).eval()
    items = [LabelledImage(str(row), row % 2) for row in range(B)]
    batch = task.batch(pixels, torch.arange(B), items, max_tokens=9)
    assert_trains_what_it_says(task, batch)
    assert task.uses == ("image",)
    assert owners(model, with_gradient=True) == owners(model) & set(model.parts["image"])
    assert set(task.predict(batch)) <= {"x", "y"}


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_texts_are_classified_by_their_encoder_alone(
    model: VisionLanguageModel, tokenizer: Tokenizer, pooling: Any, kind: Any
) -> None:
    score = "accuracy" if kind == "classify" else "pearson"
    config = TextClassificationConfig(("x", "y"), pooling=pooling, kind=kind, score=score)
    task = TextClassification(model, tokenizer, PREPROCESSING, config).eval()
    items = [LabelledText(row, CAPTIONS[row], CAPTIONS[0] if row else None, row % 2) for row in range(B)]
    assert_trains_what_it_says(task, task.batch(items, max_tokens=20))
    assert task.uses == ("text",)
    assert owners(model, with_gradient=True) == owners(model) & set(model.parts["text"])


def test_probed_encoders_get_no_gradient(model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor) -> None:
    config = ImageClassificationConfig(("x", "y"), linear_probe=True)
    task = ImageClassification(model, tokenizer, PREPROCESSING, config).train()
    batch = task.batch(pixels, torch.arange(B), [LabelledImage("1", 0)] * B, max_tokens=9)
    assert_trains_what_it_says(task, batch)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("locating", ["tokens", "regression"])
def test_phrases_are_located(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, locating: Any, case: Any
) -> None:
    config = GroundingConfig(locating=locating, bins=8)
    if locating == "tokens" and model.decoder is None:
        with pytest.raises(ValueError, match="has no decoder: locate with locating='regression'"):
            Grounding(model, tokenizer, PREPROCESSING, config)
        return
    task = Grounding(model, tokenizer, PREPROCESSING, config).eval()
    record = Record("k", picture_file(case.image_size), (), "k", {"phrase": CAPTIONS[0], "box_xyxy": [2, 3, 9, 30]})
    pipeline = task.training_pipeline(PREPROCESSING.test_transform(), 9, 20)
    batch = pipeline.collate([pipeline.prepare(record, seed) for seed in range(B)])
    assert_trains_what_it_says(task, batch)
    (box,) = task.answer([record])
    assert all(0 <= number <= case.image_size for number in box)


def why_no_pairs(model: VisionLanguageModel, picture_types: bool) -> str | None:
    """The refusal to expect of ``merged``, if any."""
    try:
        attention = model.pair_attention()
    except ValueError:
        return "takes one picture: fuse a text with each by itself"
    told_apart = len(attention) > 0 or picture_types
    return None if told_apart else "sees two pictures alike, whatever their order: set picture_types=True"


@pytest.mark.parametrize("variant", ["passes", "merged", "biattention"])
@pytest.mark.parametrize("picture_types", [False, True])
def test_statements_about_two_pictures(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, variant: Any, picture_types: bool
) -> None:
    config = Nlvr2Config(variant, picture_types=picture_types)
    refusal = why_no_pairs(model, picture_types) if variant == "merged" else None
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            Nlvr2(model, tokenizer, PREPROCESSING, config)
        return
    task = Nlvr2(model, tokenizer, PREPROCESSING, config).eval()
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if not name.startswith("model."):
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    pairs = torch.stack([pixels, pixels.flip(0)], dim=1)
    items = [Statement(str(row), CAPTIONS[row], bool(row % 2)) for row in range(B)]
    batch = task.batch(pairs, torch.arange(B), items, max_tokens=20)
    assert_trains_what_it_says(task, batch)
    swapped = dataclasses.replace(batch, pixels=pairs.flip(1))
    with torch.no_grad():
        assert abs(task(batch)["nlvr2"] - task(swapped)["nlvr2"]) > 1e-6  # rows 0 and 2 change places with another
    assert {type(truth) for truth in task.predict(batch)} == {bool}


@pytest.mark.parametrize("context", ["image", "fused"])
def test_a_step_of_self_critical_training(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, context: Any, tmp_path: Path
) -> None:
    config = SelfCriticalConfig(CaptioningConfig(context, search=SEARCH), explore=SEARCH)
    if model.decoder is None:
        with pytest.raises(ValueError, match="captioning needs a model with a decoder"):
            SelfCritical(model, tokenizer, PREPROCESSING, config)
        return
    task = SelfCritical(model, tokenizer, PREPROCESSING, config).eval()
    task.study([Record(text, None, (text,), text) for text in CAPTIONS], tmp_path / "study.json.gz")
    assert_trains_what_it_says(task, ReferencedBatch(pixels, tuple((text,) for text in CAPTIONS)))
    assert 0 <= float(task.measures["reward"]) <= 10


@pytest.mark.parametrize("answering", ["generate", "rank", "classify"])
def test_questions_are_answered(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, answering: Any
) -> None:
    config = VqaConfig(answering, answers=("red", "two"), search=SEARCH)
    if answering != "classify" and model.decoder is None:
        with pytest.raises(ValueError, match="has no decoder: answer with answering='classify'"):
            VisualQuestionAnswering(model, tokenizer, PREPROCESSING, config)
        return
    task = VisualQuestionAnswering(model, tokenizer, PREPROCESSING, config).eval()
    items = [Question(row, CAPTIONS[row], ("red", "two"), (0.5, 0.5)) for row in range(B)]
    batch = task.batch(pixels, torch.arange(B), items, max_tokens=20)
    assert_trains_what_it_says(task, batch)
    assert len(task.predict(batch)) == B


def test_hypotheses_are_judged(model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor) -> None:
    task = Entailment(model, tokenizer, PREPROCESSING).eval()
    items = [Hypothesis(str(row), CAPTIONS[row], row) for row in range(B)]
    batch = task.batch(pixels, torch.arange(B), items, max_tokens=20)
    assert_trains_what_it_says(task, batch)
    assert set(task.predict(batch)) <= set(ENTAILMENT)


@pytest.mark.parametrize("context", ["image", "fused"])
def test_pictures_are_captioned(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, texts: Tokens, context: Any
) -> None:
    config = CaptioningConfig(context, search=SEARCH)
    if model.decoder is None:
        with pytest.raises(ValueError, match="captioning needs a model with a decoder"):
            Captioning(model, tokenizer, PREPROCESSING, config)
        return
    task = Captioning(model, tokenizer, PREPROCESSING, config).eval()
    assert_trains_what_it_says(task, ImageTextBatch(pixels, texts, torch.arange(B)))
    assert len(task.caption(pixels)) == B


@pytest.mark.usefixtures("once_a_network")
@pytest.mark.parametrize("context", ["image", "fused"])
def test_a_network_that_is_given_a_decoder_writes_captions(
    case: Any, pixels: Tensor, tokenizer: Tokenizer, texts: Tokens, context: Any
) -> None:
    """As fine-tuning does where pre-training had none; mPLUG always has one."""
    if case.model_type == "mplug":
        with pytest.raises(ValueError, match="cannot be given a decoder"):
            build(case.model_type, case.config).add_decoder(2)
        return
    model = build(case.model_type, dataclasses.replace(case.config, decoder_layers=0))
    with pytest.raises(ValueError, match="captioning needs a model with a decoder"):
        Captioning(model, tokenizer, PREPROCESSING, CaptioningConfig(context, search=SEARCH))
    model.add_decoder(2)
    task = Captioning(model, tokenizer, PREPROCESSING, CaptioningConfig(context, search=SEARCH)).eval()
    assert_trains_what_it_says(task, ImageTextBatch(pixels, texts, torch.arange(B)))
    assert "decoder" in owners(model, with_gradient=True)


@pytest.mark.usefixtures("once_a_network")
def test_clips_are_captioned_questioned_and_aligned(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, texts: Tokens
) -> None:
    """What is trained of pictures is trained of clips: [B, F, C, H, W] in their place."""
    clips = torch.stack([pixels, pixels.flip(0)], dim=1)
    batch = ImageTextBatch(clips, texts, torch.arange(B))
    captioning = Captioning(model, tokenizer, PREPROCESSING, CaptioningConfig(search=SEARCH)).eval()
    assert_trains_what_it_says(captioning, batch)
    assert len(captioning.caption(clips)) == B
    config = VqaConfig("classify", answers=("red", "two"))
    questions = VisualQuestionAnswering(model, tokenizer, PREPROCESSING, config).eval()
    items = [Question(row, CAPTIONS[row], ("red", "two"), (0.5, 0.5)) for row in range(B)]
    asked = questions.batch(clips, torch.arange(B), items, max_tokens=20)
    assert_trains_what_it_says(questions, asked)
    with torch.no_grad():
        still = dataclasses.replace(asked, pixels=torch.stack([pixels, pixels], dim=1))
        assert abs(questions(asked)["vqa"] - questions(still)["vqa"]) > 1e-5
    alignment = Alignment(model, AlignmentConfig(queue_size=0, momentum=None, alpha=0.0), mean=HALF, std=HALF)
    assert gradients(alignment, alignment(batch, 0))


def test_a_prompt_is_read_as_texts_are_in_training(
    model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids, mask=None: read.append(ids[0].tolist()) or encode(ids, mask))
    task = Captioning(model, tokenizer, PREPROCESSING, CaptioningConfig("fused", search=SEARCH, prompt="a red")).eval()
    task.caption(pixels)
    assert (read[0][-1] == tokenizer.eos_id) == model.ends_texts


def test_pictures_and_texts_are_aligned(model: VisionLanguageModel, pixels: Tensor, texts: Tokens) -> None:
    batch = ImageTextBatch(pixels, texts, torch.arange(B))
    task = Alignment(model, AlignmentConfig(queue_size=4), mean=HALF, std=HALF)
    assert gradients(task, task(batch, 0))
    ranking = TextRanking(model, RankingConfig(2), mean=HALF, std=HALF)
    assert gradients(ranking, ranking(batch, 0))


def test_a_step_of_pretraining(
    case: Any, model: VisionLanguageModel, tokenizer: Tokenizer, pixels: Tensor, texts: Tokens
) -> None:
    ids = TextIds(tokenizer.pad_id, tokenizer.mask_id, tokenizer.special_ids, tokenizer.vocab_size)
    config = PretrainingConfig(queue_size=4, mlm_probability=0.5)
    if model.decoder is None:
        with pytest.raises(ValueError, match="PrefixLM needs a model with a decoder"):
            Pretraining(model, config, ids, mean=HALF, std=HALF)
        return
    task = Pretraining(model, config, ids, mean=HALF, std=HALF)
    prefix = Tokens(texts.ids_BL[:, :2], texts.mask_BL[:, :2])
    assert gradients(task, task(PretrainingBatch(pixels, texts, torch.arange(B), prefix, texts), 0))
    unused = {case.beside, *model.parts.get("pixels", ())}
    assert all(p.requires_grad for name, p in model.named_parameters() if name.partition(".")[0] not in unused)


def picture_file(size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (200, 10, 90)).save(file, "png")
    return file.getvalue()
