"""The steps of the demo: the Shapes world, a small network pre-trained on it and fine-tuned for captions, and a report.

A network whose pre-training is not also for retrieval is fine-tuned for that, too.

``triptych.demo`` is the command. Every step leaves what is done already as it is.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table as TerminalTable
from torch import Tensor

from triptych import report
from triptych.attention_maps import word_maps
from triptych.data.pictures import read_pictures
from triptych.data.samples import Record, decode_image
from triptych.data.shapes import ShapesConfig, Split, parse_caption, write_shards
from triptych.data.sources import open_source
from triptych.metrics.captions import score_captions
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.predict import Predictor
from triptych.progress import progress
from triptych.recipes.shapes import (
    caption_shapes_tiny,
    caption_shapes_tiny_eve,
    retrieval_shapes_tiny_eve,
    shapes_tiny,
    shapes_tiny_bridgetower,
    shapes_tiny_eve,
)
from triptych.reconstruction import pictures_of_data, reconstruct
from triptych.report import Captioned, Column, Figure, PictureSearch, Rows, Section, Strip, TextSearch
from triptych.tasks.captioning import CaptionReport, evaluate_captions
from triptych.tasks.retrieval import RetrievalReport, encode_collection, evaluate_retrieval, pairs_to_match
from triptych.training.logs import read_log
from triptych.training.parallel import autocast, process_group
from triptych.training.runs import Recipe, run_recipe

_BATCH = 50
_SHOWN, _SHOWN_QUERIES, _SHOWN_MAPS, _SHOWN_PAINTED, _FOUND = 12, 4, 2, 6, 5
_KS = (1, 5, 10)


@dataclass(frozen=True)
class Network:
    """A network that the demo can train.

    Attributes:
        title: its name for people.
        trainings: by name, in order: "pretraining" from nothing, and from there each of the others, "captioning" last.
        matcher: whose model retrieves, and shows where words look.
        photographs: the recipe that pre-trains it on one's own pictures.
    """

    title: str
    trainings: Mapping[str, Callable[[], Recipe]]
    photographs: str
    matcher: str = "pretraining"


NETWORKS: Mapping[str, Network] = {
    "mplug": Network("mPLUG", {"pretraining": shapes_tiny, "captioning": caption_shapes_tiny}, "flickr8k"),
    "bridgetower": Network(
        "BridgeTower",
        {"pretraining": shapes_tiny_bridgetower, "captioning": caption_shapes_tiny},
        "flickr8k_bridgetower",
    ),
    "eve": Network(
        "EVE",
        {
            "pretraining": shapes_tiny_eve,
            "retrieval": retrieval_shapes_tiny_eve,
            "captioning": caption_shapes_tiny_eve,
        },
        "flickr8k_eve",
        matcher="retrieval",
    ),
}
_PURPOSES = {"retrieval": "retrieval", "captioning": "captions"}
"""What each fine-tuning is for."""


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is.

    Attributes:
        model: which of :data:`NETWORKS`.
        train: training scenes.
        test, compositions: scenes to evaluate on, no two of a split with the same first caption.
        max_objects: scenes have 1 to so many.
        steps: of each training; by default the recipes'.
        quick: too small to learn anything; only a test that everything runs.
    """

    model: str = "mplug"
    train: int = 20_000
    test: int = 500
    compositions: int = 500
    max_objects: int = 2
    steps: int | None = None
    quick: bool = False

    @property
    def network(self) -> Network:
        """What is trained."""
        return NETWORKS[self.model]

    def recipes(self) -> dict[str, Recipe]:
        """Those of the network's trainings, with fewer steps where the demo has fewer."""
        return {name: self.shortened(recipe()) for name, recipe in self.network.trainings.items()}

    def pretraining(self) -> Recipe:
        """The first of :meth:`recipes`."""
        return self.recipes()["pretraining"]

    def shortened(self, recipe: Recipe) -> Recipe:
        """A recipe with the demo's number of steps, if it has one."""
        if self.steps is None:
            return recipe
        train = replace(recipe.train, steps=self.steps, log_every=min(recipe.train.log_every, 5))
        warmup = round(recipe.optim.warmup_steps * self.steps / recipe.train.steps)
        return replace(recipe, train=train, optim=replace(recipe.optim, warmup_steps=warmup))


@dataclass(frozen=True)
class Training:
    """One of the demo's trainings, done: its name, its recipe, and the folder of its run."""

    name: str
    recipe: Recipe
    folder: Path

    @property
    def seconds(self) -> float | None:
        """How long its steps took, if its log tells."""
        return report.training_seconds(read_log(self.folder), self.recipe.train.steps)


QUICK = DemoConfig(train=500, test=30, compositions=30, steps=12, quick=True)


@dataclass(frozen=True)
class Evaluation:
    """What the model can do on one split.

    Attributes:
        records: in the order of the pictures; each with its first caption alone.
        scores: of the model; ``blind`` of the same model shown a grey picture; ``chance`` without a model.
        seconds: that captions and retrieval of the model took.
    """

    records: list[Record]
    captions: CaptionReport
    retrieval: RetrievalReport
    blind_captions: CaptionReport
    scores: Mapping[str, float]
    blind: Mapping[str, float]
    chance: Mapping[str, float]
    seconds: Mapping[str, float]

    def is_right(self, record: Record) -> bool:
        """Whether the caption of a picture names exactly its objects."""
        return names_exactly(self.captions.predictions[record.image_id], record)


def run_demo(folder: Path, config: DemoConfig, command: str) -> Mapping[Split, Evaluation] | None:
    """Do or go on with all of it; ``None`` if the training was stopped by a signal before its end.

    Raises:
        ValueError: the folder holds a demo of another size, or of another version's recipe.
    """
    recipes = config.recipes()
    claim(folder / "demo.json", {"demo": asdict(config), **{name: asdict(recipe) for name, recipe in recipes.items()}})
    shards = write_world(folder / "data", config)
    models: dict[str, Path] = {}
    for name, recipe in recipes.items():
        data = replace(recipe.data, train=tuple(map(str, shards[Split.TRAIN])), evaluate=())
        start = (str(models["pretraining"]),) if models else ()
        train = recipe.train
        sys.stderr.write(f"{name}, {recipe.name}: {train.steps} steps of {train.batch_size} pictures\n")
        with process_group() as process:
            run = run_recipe(replace(recipe, data=data, start=start), folder / name, process)
        if not run.outcome.finished:
            return None
        models[name] = run.model_folder
    matcher, captioner = (Predictor.load(models[name]) for name in (config.network.matcher, "captioning"))
    evaluations = {
        split: evaluate(matcher, captioner, list(map(str, shards[split])), str(split))
        for split in (Split.TEST, Split.COMPOSITIONS)
    }
    trainings = [Training(name, recipe, folder / name) for name, recipe in recipes.items()]
    results = collect_results(config, trainings, evaluations, command)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    save_pictures(folder / "pictures", evaluations[Split.TEST].records)
    compose_report(folder, config, trainings, matcher, evaluations, command)
    return evaluations


def claim(path: Path, settings: Mapping[str, object]) -> None:
    """Note in a file what a demo's folder was made with; what is there of other settings must not be mixed with it.

    Raises:
        ValueError: the file notes something else.
    """
    folder, settings = path.parent, json.loads(json.dumps(settings))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{folder} holds a demo of another size or version: delete that folder, or name another with --folder"
        )


# --- data and evaluation ------------------------------------------------------------------------------------


def write_world(folder: Path, config: DemoConfig) -> dict[Split, list[Path]]:
    """The shards of each split; those that are complete already are left as they are."""
    counts = {Split.TRAIN: config.train, Split.TEST: config.test, Split.COMPOSITIONS: config.compositions}
    world, size = ShapesConfig(max_objects=config.max_objects), config.pretraining().data.preprocessing.image_size
    return {
        split: write_shards(
            folder,
            split,
            count,
            config=world,
            size=size,
            distinct=split is not Split.TRAIN,
            keep=True,
            show_progress=True,
        )
        for split, count in counts.items()
    }


def evaluate(matcher: Predictor, captioner: Predictor, shards: Sequence[str], name: str) -> Evaluation:
    """Captions and retrieval on shards: by the models, by the models shown a grey picture, and by chance."""
    records = [replace(record, captions=record.captions[:1]) for record in open_source(shards)]
    started = time.perf_counter()
    captions = _caption(captioner, shards, name, len(records), blank=False)
    captioned = time.perf_counter()
    retrieval = _retrieve(matcher, shards, name, len(records), blank=False)
    retrieved = time.perf_counter()
    blind_captions = _caption(captioner, shards, name, len(records), blank=True)
    blind_retrieval = _retrieve(matcher, shards, name, len(records), blank=True)
    return Evaluation(
        records,
        captions,
        retrieval,
        blind_captions,
        scores={"exact": exact_share(captions.predictions, records), **captions.scores, **retrieval.scores},
        blind={
            "exact": exact_share(blind_captions.predictions, records),
            **blind_captions.scores,
            **blind_retrieval.scores,
        },
        chance=chance_level(records, captions.references),
        seconds={"captions": captioned - started, "retrieval": retrieved - captioned},
    )


def _caption(predictor: Predictor, shards: Sequence[str], name: str, count: int, *, blank: bool) -> CaptionReport:
    label = f"captions, {name}{', blind' if blank else ''}"
    with progress(label, count) as advance, autocast(predictor.device, predictor.precision):
        pictures = _pictures(predictor, shards)

        def counted() -> Iterator[tuple[Sequence[Record], Tensor]]:
            for records, pixels_BCHW in pictures:
                yield records, pixels_BCHW
                advance(len(records))

        return evaluate_captions(predictor.captioner(), counted(), blank=blank)


def _retrieve(predictor: Predictor, shards: Sequence[str], name: str, count: int, *, blank: bool) -> RetrievalReport:
    """Every picture with its first caption alone."""
    model, config = predictor.model, predictor.retrieval
    pictures = (
        ([replace(record, captions=record.captions[:1]) for record in records], pixels_BCHW)
        for records, pixels_BCHW in _pictures(predictor, shards)
    )
    with autocast(predictor.device, predictor.precision):
        collection = encode_collection(
            model, predictor.tokenizer, predictor.preprocessing, pictures, config, blank=blank
        )
        assert len(collection.records) == len(collection.text) == count
        label = f"retrieval, {name}{', blind' if blank else ''}"
        with progress(label, pairs_to_match(collection, config), unit="pairs") as advance:
            return evaluate_retrieval(model, collection, config, advance)


def _pictures(predictor: Predictor, shards: Sequence[str]) -> Iterator[tuple[Sequence[Record], Tensor]]:
    return read_pictures(open_source(shards), predictor.preprocessing, _BATCH)


def names_exactly(caption: str, record: Record) -> bool:
    """Whether a caption names the objects of a Shapes picture, each as often as it is there, and no others."""
    return parse_caption(caption) == _objects(record)


def _objects(record: Record) -> Counter[tuple[str, str, str]]:
    return Counter((item["size"], item["colour"], item["shape"]) for item in record.extra["objects"])


def exact_share(predictions: Mapping[str, str], records: Sequence[Record]) -> float:
    """Percentage of pictures whose caption names exactly the objects."""
    return 100.0 * sum(names_exactly(predictions[record.image_id], record) for record in records) / len(records)


def chance_level(records: Sequence[Record], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """What needs no model: for captions that of another picture of the split, for retrieval any order.

    The share of exact captions is the mean over all pairs of pictures; the scores are of the next picture's caption.
    """
    following = [*records[1:], records[0]]
    captions = {record.image_id: other.captions[0] for record, other in zip(records, following, strict=True)}
    alike = Counter(frozenset(_objects(record).items()) for record in records).values()
    pairs = max(1, len(records) * (len(records) - 1))
    scores = {"exact": 100.0 * sum(count * (count - 1) for count in alike) / pairs}
    scores |= score_captions(references, captions)
    for k in _KS:
        recall = 100.0 * min(k, len(records)) / len(records)
        scores |= {f"t2i_r{k}": recall, f"i2t_r{k}": recall}
    return scores


# --- results ------------------------------------------------------------------------------------------------


def collect_results(
    config: DemoConfig, trainings: Sequence[Training], evaluations: Mapping[Split, Evaluation], command: str
) -> dict[str, object]:
    """Everything that results.json holds."""
    return {
        "command": command,
        "quick": config.quick,
        "trainings": {
            training.name: {
                "recipe": training.recipe.name,
                "steps": training.recipe.train.steps,
                "batch": training.recipe.train.batch_size,
                "seconds": training.seconds,
            }
            for training in trainings
        },
        "environment": report.environment(),
        "splits": {
            str(split): {
                "pictures": len(found.records),
                "model": dict(found.scores),
                "blind": dict(found.blind),
                "chance": dict(found.chance),
                "seconds": {name: round(value, 2) for name, value in found.seconds.items()},
            }
            for split, found in evaluations.items()
        },
    }


_METRICS = (
    ("Captions", (("all objects right, %", "exact", 1), ("BLEU-4", "Bleu_4", 100), ("CIDEr", "CIDEr", 100))),
    ("Text to image", tuple((f"R@{k}, %", f"t2i_r{k}", 1) for k in _KS)),
    ("Image to text", tuple((f"R@{k}, %", f"i2t_r{k}", 1) for k in _KS)),
)
"""Rows of the tables: what is shown, its name among the scores, and its factor."""


def _table_rows(evaluations: Mapping[Split, Evaluation]) -> Iterator[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    """Each group of metrics with its rows: (label, model, blind and chance on each split)."""
    for heading, metrics in _METRICS:
        rows = []
        for label, name, factor in metrics:
            scores = (part[name] * factor for e in evaluations.values() for part in (e.scores, e.blind, e.chance))
            rows.append((label, tuple(f"{score:.1f}" for score in scores)))
        yield heading, rows


def print_results(evaluations: Mapping[Split, Evaluation]) -> None:
    """The headline table, to stderr."""
    table = TerminalTable(box=None, pad_edge=False)
    table.add_column("")
    for split in evaluations:
        for name in (str(split), "blind", "chance"):
            table.add_column(name, justify="right", style=None if name == str(split) else "dim")
    for heading, rows in _table_rows(evaluations):
        table.add_row(heading, style="bold")
        for label, cells in rows:
            table.add_row(f"  {label}", *cells)
    Console(stderr=True).print(table)


def save_pictures(folder: Path, records: Sequence[Record], count: int = 8) -> None:
    """The first pictures as PNG files, to try ``triptych predict`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records[:count], start=1):
        decode_image(record).save(folder / f"test-{number}.png")


def compose_report(
    folder: Path,
    config: DemoConfig,
    trainings: Sequence[Training],
    matcher: Predictor,
    evaluations: Mapping[Split, Evaluation],
    command: str,
) -> Path:
    """Write report.html."""
    pretraining, *tuned = trainings
    curves, speed, *rest = report.run_sections(pretraining.folder)
    test, compositions = evaluations[Split.TEST], evaluations[Split.COMPOSITIONS]
    sections: list[Section] = [
        _headline(test, compositions, trainings),
        _results(evaluations),
        _caption_section("Captions of test pictures", test.records[:_SHOWN], test),
        _caption_section("Captions of new compositions", compositions.records[: _SHOWN // 2], compositions),
        *_mistakes(evaluations),
        _picture_searches(test),
        _text_searches(test),
        _attention(matcher, test),
        *_paintings(pretraining, folder / "data"),
        curves,
        *(
            report.curves_of(read_log(training.folder), f"Training curves: {_PURPOSES[training.name]}")
            for training in tuned
        ),
        speed,
        _evaluation_speed(evaluations),
        *rest,
        report.Commands("Commands", (("This report:", command), *next_steps(folder, config))),
    ]
    lead = _lead(config, trainings, sum(p.numel() for p in matcher.model.parameters()))
    warning = (
        "A smoke test (--quick): so few steps teach the model nothing, and its numbers say nothing. "
        "The demo without --quick trains it."
    )
    title = "Pre-training on Shapes"
    return report.write_report(
        folder / "report.html", title, sections, lead=lead, warning=warning if config.quick else ""
    )


def _lead(config: DemoConfig, trainings: Sequence[Training], parameters: int) -> str:
    """What was trained, and which of the networks the sections are about."""
    pretraining, *tuned = trainings
    lengths = " and ".join(f"for {_PURPOSES[one.name]} for {_length(one)}" for one in tuned)
    matcher = _PURPOSES.get(config.network.matcher)
    return (
        f"{config.network.title} with {parameters / 1e6:.1f} million parameters, pre-trained from nothing for "
        f"{_length(pretraining)} on {config.train:,} generated scenes, then fine-tuned {lengths}"
        f"{', each time from there' if len(tuned) > 1 else ''}. Retrieval and attention are of the "
        f"{f'network fine-tuned for {matcher}' if matcher else 'pre-trained network'}, captions of that fine-tuned for "
        "captions. No test scene has a set of objects that training shows; each scene of the compositions has a colour "
        "and a shape that training never shows together."
    )


def _length(training: Training) -> str:
    return f"{training.recipe.train.steps:,} steps of {training.recipe.train.batch_size} pictures"


def _headline(test: Evaluation, compositions: Evaluation, trainings: Sequence[Training]) -> Section:
    def figure(found: Evaluation, name: str, label: str) -> Figure:
        compared = f"blind {_percent(found.blind[name])}, chance\N{NO-BREAK SPACE}{_percent(found.chance[name])}"
        return Figure(_percent(found.scores[name]), label, compared)

    figures = [
        figure(test, "exact", "of the test captions name exactly the objects"),
        figure(compositions, "exact", "of the captions of new compositions do"),
        figure(test, "t2i_r1", f"of the test texts find their picture first among {len(test.records)}"),
        figure(test, "i2t_r1", f"of the test pictures find their text first among {len(test.records)}"),
    ]
    seconds = [training.seconds for training in trainings]
    if None not in seconds:
        facts = report.environment()
        where = facts.get("GPU", f"threads: {facts['threads']}")
        figures.append(Figure(report.duration(sum(filter(None, seconds))), "of training", where))
    return report.Figures("At a glance", tuple(figures))


def _percent(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}%"


def _results(evaluations: Mapping[Split, Evaluation]) -> Section:
    columns = (Column("model"), Column("blind", muted=True), Column("chance", muted=True)) * len(evaluations)
    says = Counter(evaluations[Split.TEST].blind_captions.predictions.values()).most_common(1)[0][0]
    return report.Table(
        "Results",
        columns,
        tuple(Rows(heading, tuple(rows)) for heading, rows in _table_rows(evaluations)),
        spans=tuple((f"{split} ({len(found.records)} pictures)", 3) for split, found in evaluations.items()),
        note="All objects right: the caption names size, colour and shape of every object, and no others; places are "
        f"not judged. Blind: the same model shown a grey picture, of which it says \u201c{says}\u201d; equal scores "
        "count as wrong in retrieval. Chance: for captions that of another picture, for retrieval any order. Retrieval "
        "has one caption a picture, and no two captions are equal. BLEU-4 and CIDEr are times 100, against five "
        "captions a picture.",
    )


def _caption_section(title: str, records: Sequence[Record], found: Evaluation) -> Section:
    return report.Captions(
        title,
        tuple(_captioned(record, found) for record in records),
        "The first pictures of the split, not chosen. Above: the model's caption, with the words marked that differ "
        "from the nearest of five references; below: that reference. Right: all objects are right, places not judged.",
    )


def _captioned(record: Record, found: Evaluation) -> Captioned:
    name = record.image_id
    return Captioned(
        decode_image(record), found.captions.predictions[name], found.captions.references[name], found.is_right(record)
    )


def _mistakes(evaluations: Mapping[Split, Evaluation]) -> list[Section]:
    """The first wrong captions of each split."""
    wrong = [
        _captioned(record, found)
        for found in evaluations.values()
        for record in [record for record in found.records if not found.is_right(record)][: _SHOWN // 4]
    ]
    note = "The first captions of each split that do not name exactly the objects."
    return [report.Captions("Mistakes", tuple(wrong), note)] if wrong else []


def _picture_searches(found: Evaluation) -> Section:
    pictures = [decode_image(record) for record in found.records]

    def query(number: int) -> PictureSearch:
        best = found.retrieval.images_of_text[number][:_FOUND].tolist()
        right = best.index(number) if number in best else None
        caption = found.records[number].captions[0]
        return PictureSearch(caption, tuple(pictures[index] for index in best), right, pictures[number])

    return report.PictureSearches(
        "Text to image",
        tuple(map(query, range(min(_SHOWN_QUERIES, len(pictures))))),
        "The first texts of the test split, and the pictures found for each, best first; the right one is framed.",
    )


def _text_searches(found: Evaluation) -> Section:
    def query(number: int) -> TextSearch:
        best = found.retrieval.texts_of_image[number][:_FOUND].tolist()
        texts = tuple(found.records[index].captions[0] for index in best)
        right = best.index(number) if number in best else None
        return TextSearch(decode_image(found.records[number]), texts, right, found.records[number].captions[0])

    return report.TextSearches(
        "Image to text",
        tuple(map(query, range(min(_SHOWN_QUERIES, len(found.records))))),
        "The first pictures of the test split, and the texts found for each, best first; the right one is marked.",
    )


def _attention(predictor: Predictor, found: Evaluation) -> Section:
    """Pictures of two objects: with one there is little to see, with more a row of maps gets long."""
    records = [record for record in found.records if len(record.extra["objects"]) == 2][:_SHOWN_MAPS]
    return report.AttentionMaps(
        "Where the words look",
        tuple(_attended(predictor, record) for record in records),
        "Attention of each word to the patches of the picture in the fusion layers, the mean of all heads, each map "
        "relative to its own maximum: bright where the word looks.",
    )


def _attended(predictor: Predictor, record: Record) -> report.Attended:
    picture = decode_image(record)
    pixels_CHW = predictor.preprocessing.test_transform()(picture)
    maps = word_maps(predictor.model, predictor.tokenizer, predictor.preprocessing, pixels_CHW, record.captions[0])
    layers = tuple((name, np.asarray(share_WHW)) for name, share_WHW in maps.layers)
    return report.Attended(picture, maps.words, layers)


def _paintings(pretraining: Training, data: Path) -> list[Section]:
    """What a network that is pre-trained to paint hidden patches makes of test pictures."""
    if not isinstance(pretraining.recipe.objective, MaskedSignalConfig):
        return []
    predictor = Predictor.load(pretraining.folder / "model")
    pictures = pictures_of_data(predictor, open_source(str(data / "test-*.tar")), _SHOWN_PAINTED)
    found = reconstruct(predictor, pictures)

    def shown(pixels_CHW: Tensor) -> Image.Image:
        return Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())

    strips = [
        Strip(
            one.picture.text,
            (
                ("what is seen", shown(one.seen_CHW)),
                ("painted", shown(one.paintings[0].pixels_CHW)),
                ("the picture", shown(one.picture.pixels_CHW)),
            ),
        )
        for one in found
    ]
    share = pretraining.recipe.objective.image_ratio
    note = (
        f"The first test pictures with {share:.0%} of their patches hidden, and what the pre-trained network paints in "
        "their place, which has read the text."
    )
    return [report.Strips("What it paints", tuple(strips), note)]


def _evaluation_speed(evaluations: Mapping[Split, Evaluation]) -> Section:
    facts = {}
    for split, found in evaluations.items():
        count = len(found.records)
        captions, retrieval = found.seconds["captions"], found.seconds["retrieval"]
        facts[f"captions, {split}"] = f"{captions:.1f} s, {count / captions:.1f} a second"
        facts[f"retrieval, {split}"] = f"{retrieval:.1f} s for {count} texts and {count} pictures"
    return report.Facts("Speed of the evaluation", facts, "Of the seeing model; the blind one takes as long.")


def next_steps(folder: Path, config: DemoConfig) -> tuple[tuple[str, str], ...]:
    """What to do after the demo: what it is good for, and the command."""
    tool = _tool()
    model = "" if folder == Path("demo") else f" --checkpoint {shlex.quote(str(folder / 'captioning' / 'model'))}"
    pictures = f"{shlex.quote(str(folder / 'pictures'))}/*.png"
    return (
        ("Caption pictures with this model:", f"{tool} predict caption {pictures}{model}"),
        (
            "Train on your own pictures, from a file of lines such as "
            '{"image": "photos/1.jpg", "caption": "a dog on a beach"}, or from tar shards of img2dataset:',
            f"{tool} pretrain {config.network.photographs} --data captions.jsonl --folder runs/mine",
        ),
    )


def _tool() -> str:
    """The installed command as a person would type it."""
    path = Path(sys.executable).parent / "triptych"
    if not path.exists():
        return "triptych"
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
