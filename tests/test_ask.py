"""Asking saved models about files: every task, every refusal, and that each answer is about its own file and text.

Shape legend: B pictures, P pooled width.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from triptych.ask import Answer, ask
from triptych.checkpoints.folder import save_folder
from triptych.data.lists import ENTAILMENT
from triptych.data.pictures import file_record, show
from triptych.data.samples import BrokenSample, Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, FrameChoice, Preprocessing
from triptych.generation import BeamSearch
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.predict import Predictor
from triptych.tasks.base import ItemTask, Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.entailment import Entailment, EntailmentConfig
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.image_classification import ImageClassification, ImageClassificationConfig
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.text_classification import TextClassification, TextClassificationConfig
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig

PIXELS = Preprocessing(16, HALF, HALF, frames=FrameChoice(3))
TEXTS = ("a red picture", "is it blue ?", "what colour has it", "two green ones")
LABELS = tuple(map(str, range(30)))
SEARCH = BeamSearch(1, 2, 6)
CONFIGS: dict[str, tuple[type[Task], Any]] = {
    "caption": (Captioning, CaptioningConfig(search=SEARCH)),
    "vqa": (VisualQuestionAnswering, VqaConfig(search=SEARCH)),
    "grounding": (Grounding, GroundingConfig(locating="regression")),
    "entailment": (Entailment, EntailmentConfig()),
    "nlvr2": (Nlvr2, Nlvr2Config()),
    "image_classification": (ImageClassification, ImageClassificationConfig(LABELS, pooling="mean")),
    "text_classification": (TextClassification, TextClassificationConfig(LABELS, pooling="mean")),
}
Load = Callable[..., Predictor]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([*TEXTS * 5, "no yes small large"], 90)


@pytest.fixture(scope="module")
def load(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Saves a network with random weights as a checkpoint of a task, and loads it; ``retrieval`` has no head."""

    def build(name: str, retrieval: RetrievalConfig | None = None, config: Any = None) -> Predictor:
        torch.manual_seed(5)
        text = TextConfig(tokenizer.vocab_size, width=16, heads=2, ffn=32, max_positions=32)
        vision = VisionConfig(width=16, layers=1, heads=2, patch=8, image_size=16)
        sizes = {"text_layers": 1, "fusion_layers": 2, "decoder_layers": 1, "stride": 1, "embed_dim": 8}
        model = MPlug(MPlugConfig(vision, text, **sizes))
        description: dict[str, Any] = {"retrieval": retrieval or RetrievalConfig()}
        state = {}
        if name in CONFIGS:
            kind, usual = CONFIGS[name]
            task = kind(model, tokenizer, PIXELS, config or usual)
            with torch.no_grad():
                for parameter in task.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.4)  # answers that differ from file to file
            description[name], state = task.config, task.own_state()
        described = {key: dataclasses.asdict(value) for key, value in description.items()}
        folder = tmp_path_factory.mktemp(name) / "model"
        save_folder(folder, model, tokenizer, PIXELS, task=described, task_state=state)
        return Predictor.load(folder, precision="fp32")

    return build


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four pictures, of noise with a colour, of different sizes."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    paths = []
    for number, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255), (30, 30, 30))):
        image = Image.new("RGB", (20 + 6 * number, 24), colour)
        noise = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8).numpy()
        image.paste(Image.fromarray(noise), (3 * number, 2))
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two videos of five frames that become brighter, in red and in blue."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    paths = []
    for channel in (0, 2):
        paths.append(folder / f"{channel}.mkv")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("ffv1", rate=10, width=16, height=16, pix_fmt="yuv444p")
            for number in range(5):
                colour = [20, 20, 20]
                colour[channel] += 50 * number
                container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16), tuple(colour)))))
            container.mux(stream.encode(None))
    return paths


def answers(predictor: Predictor, task: str, paths: list[Path], texts: tuple[str, ...] = ()) -> list[Answer]:
    return list(ask(predictor, task, paths, texts))


# --- one answer a file and text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "asked", "answer"),
    [
        ("vqa", "question", "answer"),
        ("grounding", "phrase", "box_xyxy"),
        ("entailment", "hypothesis", "label"),
    ],
)
def test_every_text_is_asked_of_every_file(load: Load, files: list[Path], task: str, asked: str, answer: str) -> None:
    predictor = load(task)
    found = answers(predictor, task, files, TEXTS)
    assert [set(line) for line in found] == [{"image", asked, answer}] * 16
    assert [(line["image"], line[asked]) for line in found] == [(str(p), t) for p in files for t in TEXTS]
    alone = [answers(predictor, task, [path], (text,))[0] for path in files for text in TEXTS]
    for line, own in zip(found, alone, strict=True):
        assert line == own if task != "grounding" else line[answer] == pytest.approx(own[answer], abs=1e-3)
    assert len({str(line[answer]) for line in found}) > 1


def test_labels_of_hypotheses_are_those_of_the_head(load: Load, files: list[Path]) -> None:
    predictor = load("entailment")
    head = predictor.task("entailment").head
    assert isinstance(head, torch.nn.Module)
    for line in answers(predictor, "entailment", files, TEXTS):
        pixels = show(file_record(Path(line["image"])), PIXELS.test_transform(), PIXELS.frames)
        image = predictor.model.encode_image(PIXELS.normalize(pixels[None]))
        ids, mask = predictor.tokenizer.encode_batch([line["hypothesis"]], max_length=None, end=False)
        pooled_BP = predictor.model.fuse(image, predictor.model.encode_text(ids, mask)).pooled_BP
        assert line["label"] == ENTAILMENT[int(head(pooled_BP).argmax())]


def test_boxes_are_inside_their_pictures(load: Load, files: list[Path]) -> None:
    for line in answers(load("grounding"), "grounding", files, TEXTS[:1]):
        left, top, right, bottom = line["box_xyxy"]
        width, height = Image.open(line["image"]).size
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= height


def test_boxes_written_as_tokens(load: Load, files: list[Path]) -> None:
    predictor = load("grounding", config=GroundingConfig(bins=16))
    found = answers(predictor, "grounding", files, TEXTS)
    assert len(found) == 16
    assert all(len(line["box_xyxy"]) == 4 for line in found)


def test_captions_and_classes_take_no_texts(load: Load, files: list[Path]) -> None:
    captions = answers(load("caption"), "caption", files)
    assert [line["image"] for line in captions] == list(map(str, files))
    assert all(set(line) == {"image", "caption"} and isinstance(line["caption"], str) for line in captions)
    predictor = load("image_classification")
    labels = answers(predictor, "image_classification", files)
    assert labels == [answers(predictor, "image_classification", [path])[0] for path in files]
    assert all(set(line) == {"image", "label"} for line in labels)
    assert len({line["label"] for line in labels}) > 1
    assert {line["label"] for line in labels} <= set(LABELS)


def test_texts_are_classified_without_files(load: Load) -> None:
    labels = answers(load("text_classification"), "text_classification", [], TEXTS)
    assert {line["label"] for line in labels} <= set(LABELS)
    predictor = load("text_classification", config=TextClassificationConfig(kind="regress", score="pearson"))
    found = answers(predictor, "text_classification", [], TEXTS)
    assert [line["text"] for line in found] == list(TEXTS)
    assert len({line["label"] for line in found}) == 4
    for line in found:
        (alone,) = answers(predictor, "text_classification", [], (line["text"],))
        assert alone["label"] == pytest.approx(line["label"], abs=1e-5)


# --- two pictures at once -----------------------------------------------------------------------------------------


def test_statements_are_about_the_pair_in_its_order(load: Load, files: list[Path]) -> None:
    predictor = load("nlvr2")
    pairs = list(itertools.permutations(files, 2))
    found = [answers(predictor, "nlvr2", list(pair), TEXTS) for pair in pairs]
    task = predictor.task("nlvr2")
    assert isinstance(task, ItemTask)
    for pair, lines in zip(pairs, found, strict=True):
        assert [line["statement"] for line in lines] == list(TEXTS)
        assert all(line["images"] == list(map(str, pair)) for line in lines)
        record = Record("k", None, (), "k", {"images": list(map(str, pair)), "statement": TEXTS[1]})
        assert [lines[1]["prediction"]] == task.answer([record])
    judged = {tuple(line["prediction"] for line in lines) for lines in found}
    assert len(judged) > 1
    assert {type(line["prediction"]) for lines in found for line in lines} == {bool}


def test_statements_about_one_picture(load: Load, files: list[Path]) -> None:
    predictor = load("nlvr2", config=Nlvr2Config(pictures=1))
    found = answers(predictor, "nlvr2", files[:1], TEXTS)
    assert [line["images"] for line in found] == [[str(files[0])]] * 4
    with pytest.raises(BrokenSample, match="it shows 2 pictures, not 1"):
        answers(predictor, "nlvr2", files[:2], TEXTS)


@pytest.mark.parametrize("count", [1, 3])
def test_a_pair_is_two_pictures(load: Load, files: list[Path], count: int) -> None:
    with pytest.raises(BrokenSample, match=f"it shows {count} pictures, not 2"):
        answers(load("nlvr2"), "nlvr2", files[:count], TEXTS)


# --- search -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores_of(predictor: Predictor, paths: list[Path], text: str, matching: bool) -> list[float]:
    """What each file scores for a text, one at a time."""
    model = predictor.model
    ids, mask = predictor.tokenizer.encode_batch([text], max_length=None, end=False)
    encoded, scores = model.encode_text(ids, mask), []
    for path in paths:
        pixels = show(file_record(path), PIXELS.test_transform(), PIXELS.frames)
        image = model.encode_image(PIXELS.normalize(pixels[None]))
        similarity = (model.embed_image(image) * model.embed_text(encoded)).sum()
        scores.append(float(model.match_logits(model.pool(image, encoded))[0, 1] if matching else similarity))
    return scores


@pytest.mark.parametrize("candidates", [0, 4])
def test_files_are_ordered_for_each_text(load: Load, files: list[Path], candidates: int) -> None:
    predictor = load("retrieval", RetrievalConfig(candidates=candidates))
    found = answers(predictor, "retrieval", files, TEXTS)
    assert [line["text"] for line in found] == list(TEXTS)
    for line in found:
        scores = scores_of(predictor, files, line["text"], candidates > 0)
        assert line["images"] == [str(path) for _, path in sorted(zip(scores, files, strict=True), reverse=True)]


def test_only_the_candidates_are_listed(load: Load, files: list[Path]) -> None:
    predictor = load("retrieval", RetrievalConfig(candidates=2))
    for line in answers(predictor, "retrieval", files, TEXTS[:2]):
        similar = scores_of(predictor, files, line["text"], False)
        best = {str(path) for _, path in sorted(zip(similar, files, strict=True))[-2:]}
        assert set(line["images"]) == best


def test_a_file_given_twice_is_found_once(load: Load, files: list[Path]) -> None:
    predictor = load("retrieval")
    twice = [files[0], files[0], *files[1:]]
    assert answers(predictor, "retrieval", twice, TEXTS) == answers(predictor, "retrieval", files, TEXTS)


def test_more_files_than_are_encoded_at_once(load: Load, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load("retrieval")
    expected = answers(predictor, "retrieval", files, TEXTS)
    monkeypatch.setattr("triptych.ask._AT_ONCE", 3)
    assert answers(predictor, "retrieval", files, TEXTS) == expected


# --- videos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "texts"), [("caption", ()), ("vqa", TEXTS[:2]), ("image_classification", ())])
def test_pictures_and_videos_are_answered_in_their_order(
    load: Load, files: list[Path], videos: list[Path], task: str, texts: tuple[str, ...]
) -> None:
    predictor = load(task)
    mixed = [files[0], videos[0], files[1], files[2], videos[1]]
    found = answers(predictor, task, mixed, texts)
    each = len(texts) or 1
    assert [line["image"] for line in found] == [str(path) for path in mixed for _ in range(each)]
    assert found == [line for path in mixed for line in answers(predictor, task, [path], texts)]


def test_videos_are_ordered_for_each_text(load: Load, videos: list[Path], files: list[Path]) -> None:
    predictor = load("retrieval")
    for line in answers(predictor, "retrieval", videos, TEXTS):
        scores = scores_of(predictor, videos, line["text"], True)
        assert line["images"] == [str(path) for _, path in sorted(zip(scores, videos, strict=True), reverse=True)]
    with pytest.raises(ValueError, match="pictures and videos are searched apart"):
        answers(predictor, "retrieval", [*videos, files[0]], TEXTS)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "grounding", "entailment", "nlvr2", "retrieval", "text_classification"])
def test_texts_that_are_missing(load: Load, files: list[Path], task: str) -> None:
    with pytest.raises(ValueError, match=f"^{task} needs --text$"):
        answers(load(task), task, files if task != "text_classification" else [])


@pytest.mark.parametrize("task", ["caption", "image_classification"])
def test_texts_that_are_not_wanted(load: Load, files: list[Path], task: str) -> None:
    with pytest.raises(ValueError, match=f"^{task} takes no --text$"):
        answers(load(task), task, files, TEXTS)


@pytest.mark.parametrize("task", [*CONFIGS, "retrieval"])
def test_files_that_are_missing_or_not_wanted(load: Load, files: list[Path], task: str) -> None:
    texts = () if task in ("caption", "image_classification") else TEXTS
    what, given = ("takes no", files) if task == "text_classification" else ("needs", [])
    with pytest.raises(ValueError, match=f"^{task} {what} files$"):
        answers(load(task), task, given, texts)


@pytest.mark.parametrize("task", [name for name in CONFIGS if name != "caption"])
def test_a_task_that_the_checkpoint_does_not_know(load: Load, files: list[Path], task: str) -> None:
    texts = () if task == "image_classification" else TEXTS
    with pytest.raises(ValueError, match=f"was not trained for {task}, only for: retrieval"):
        answers(load("retrieval"), task, [] if task == "text_classification" else files[:2], texts)


def test_two_pictures_of_which_one_cannot_be_read(load: Load, files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for path in (broken, tmp_path / "nowhere.png"):
        with pytest.raises(BrokenSample, match=path.name):
            answers(load("nlvr2"), "nlvr2", [files[0], path], TEXTS)


@pytest.mark.parametrize("task", ["caption", "vqa", "grounding", "retrieval", "image_classification"])
def test_files_that_cannot_be_read_are_skipped(
    load: Load, files: list[Path], tmp_path: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, nowhere = tmp_path / "broken.png", tmp_path / "nowhere.png"
    broken.write_bytes(b"no picture")
    pictures = [path for path in files if path.suffix == ".png"][:2]
    texts = () if task in ("caption", "image_classification") else TEXTS
    expected = answers(load(task), task, pictures, texts)
    found = answers(load(task), task, [broken, pictures[0], nowhere, pictures[1]], texts)
    if task == "grounding":  # boxes of smaller batches differ in the last bits
        expected, found = ([{**one, "box_xyxy": None} for one in some] for some in (expected, found))
    assert found == expected
    assert [name in caplog.text for name in ("broken.png", "nowhere.png")] == [True, True]
    with pytest.raises(ValueError, match=r"none of the files can be read|at least one picture"):
        answers(load(task), task, [broken, nowhere], texts)


@pytest.mark.parametrize("task", ["grounding", "nlvr2"])
def test_tasks_that_look_at_no_videos(load: Load, tmp_path: Path, task: str) -> None:
    with pytest.raises(ValueError, match="not at videos"):
        answers(load(task), task, [tmp_path / "clip.mp4"], TEXTS)


def test_a_model_that_judges_by_premises_is_refused(load: Load, files: list[Path]) -> None:
    predictor = load("entailment")
    settings = {**predictor.settings, "entailment": {**predictor.settings["entailment"], "premise": True}}
    with pytest.raises(ValueError, match="by a premise"):
        answers(dataclasses.replace(predictor, settings=settings), "entailment", files[:1], TEXTS)
