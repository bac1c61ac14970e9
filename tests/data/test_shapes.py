"""The Shapes world: every text is judged here by rules of its own, from the scene's objects alone."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data import shapes, shapes_clips
from triptych.data.shapes import Object, Scene, ShapesConfig, Split
from triptych.data.shapes_render import render_background

SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(list(Split))
QUESTION_KINDS = {
    *("existence", "colour", "shape", "size", "count", "position"),
    *("relation", "comparison", "verification"),
}
HELD_OUT = {("red", "square"), ("blue", "star"), ("yellow", "triangle")}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CROWDED = ShapesConfig(min_objects=1, max_objects=8)

GOLDEN_CAPTIONS = [
    "a small blue triangle at the top left and a large green circle at the top centre "
    "and a large purple circle at the centre",
    "a large green square at the centre and a large red triangle at the bottom centre",
    "a small blue triangle at the top left and a small green square at the top centre "
    "and a small blue star at the bottom left",
]


def scenes(count: int, split: Split = Split.TRAIN, config: ShapesConfig | None = None, seed: int = 5) -> list[Scene]:
    return [shapes.generate_scene(seed, index, split, config) for index in range(count)]


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    mixed = [scene for split in Split for scene in scenes(400, split)]
    return mixed + scenes(200, Split.COMPOSITIONS, CROWDED) + scenes(200, Split.TRAIN, CROWDED)


def rng_of(scene: Scene, purpose: int = 9) -> np.random.Generator:
    return shapes.scene_generator(scene.seed, scene.index, scene.split, purpose)


# --- an independent reading of the texts ----------------------------------------------------------------------

NOUN_PHRASE = (
    r"(?:(?:the|an?) )?(?P<{0}size>small |large )?(?P<{0}colour>red |green |blue |yellow |purple |orange )?"
    r"(?P<{0}noun>object|circle|square|triangle|star)s?"
    r"(?: at the (?P<{0}place>(?:top|bottom|centre)(?: left| right| centre)?))?"
)
RELATION = "to the left of|to the right of|above|below"
ROWS, COLUMNS = {"top": 0, "bottom": 2}, {"left": 0, "right": 2}


def cell_named(place: str) -> int:
    words = place.split()
    row = next((ROWS[word] for word in words if word in ROWS), 1)
    column = next((COLUMNS[word] for word in words if word in COLUMNS), 1)
    return 3 * row + column


def find(phrase: str, scene: Scene) -> list[Object]:
    """The objects that the noun phrase fits."""
    match = re.fullmatch(NOUN_PHRASE.format(""), phrase)
    assert match, phrase
    size, colour = (match[name].strip() if match[name] else None for name in ("size", "colour"))
    return [
        item
        for item in scene.objects
        if size in (None, item.size)
        and colour in (None, item.colour)
        and match["noun"] in ("object", item.shape)
        and (match["place"] is None or cell_of(item) == cell_named(match["place"]))
    ]


def the(phrase: str, scene: Scene) -> Object:
    (item,) = find(phrase, scene)
    return item


def cell_of(item: Object) -> int:
    return 3 * int(item.y * 3) + int(item.x * 3)


def stands(item: Object, relation: str, other: Object) -> bool:
    """Judged by positions; the gap must be clear."""
    gap = {
        "to the left of": other.x - item.x,
        "to the right of": item.x - other.x,
        "above": other.y - item.y,
        "below": item.y - other.y,
    }[relation]
    assert abs(gap) > 0.15, "not a clear case"
    return gap > 0


def judge(text: str, scene: Scene) -> str:
    """The answer to a question."""

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    if match := re.fullmatch(r"is there (.+)", text):
        return yes(bool(find(match[1], scene)))
    if match := re.fullmatch(r"what (colour|shape|size) is (.+)", text):
        return str(getattr(the(match[2], scene), match[1]))
    if match := re.fullmatch(r"how many (.+) are there", text):
        return NUMBER_WORDS[len(find(match[1], scene))]
    if match := re.fullmatch(r"where is (.+)", text):
        return the(match[1], scene).place
    if match := re.fullmatch(r"are there more (.+) than (.+)", text):
        counts = [len(find(phrase, scene)) for phrase in match.groups()]
        assert counts[0] != counts[1]
        return yes(counts[0] > counts[1])
    if match := re.fullmatch(r"is (.+) larger than (.+)", text):
        first, second = (the(phrase, scene) for phrase in match.groups())
        return yes(first.radius > 1.3 * second.radius)
    if match := re.fullmatch(r"does (.+) have the same (size|colour|shape) as (.+)", text):
        first, second = the(match[1], scene), the(match[3], scene)
        assert first is not second
        return yes(getattr(first, match[2]) == getattr(second, match[2]))
    if match := re.fullmatch(rf"is (.+) ({RELATION}) (the .+)", text):
        return yes(stands(the(match[1], scene), match[2], the(match[3], scene)))
    match = re.fullmatch(r"is (the .+?) (a \w+|\w+|at the \w+(?: left| right| centre)?)", text)
    assert match, text
    item = the(match[1], scene)
    said = match[2].removeprefix("a ")
    if said.startswith("at the "):
        return yes(cell_of(item) == cell_named(said.removeprefix("at the ")))
    return yes(said in item.kind)


def is_true(text: str, left: Scene, right: Scene) -> bool:
    """The truth of a statement about two images."""
    if match := re.fullmatch(r"the (left|right) image contains more (.+) than the (left|right) image", text):
        counts = [len(find(match[2], {"left": left, "right": right}[match[i]])) for i in (1, 3)]
        return counts[0] > counts[1]
    if match := re.fullmatch(r"the two images contain (\w+) (.+) in total", text):
        return len(find(match[2], left)) + len(find(match[2], right)) == NUMBER_WORDS.index(match[1])
    match = re.fullmatch(r"(the left|the right|only the left|only the right|both|neither) images? contains? (.+)", text)
    assert match, text
    here, there = bool(find(match[2], left)), bool(find(match[2], right))
    return {
        "the left": here,
        "the right": there,
        "only the left": here and not there,
        "only the right": there and not here,
        "both": here and there,
        "neither": not here and not there,
    }[match[1]]


def label_of(hypothesis: str, scene: Scene) -> str:
    """Tries both weights for every object: entailed if true in all worlds, contradicted if in none."""
    match = re.fullmatch(r"there is (.+?) that is (.+?)(?: (and|or) heavy)?", hypothesis)
    assert match, hypothesis
    items = find(match[1], scene)
    said = [
        match[2] == item.size or (match[2].startswith("at the ") and cell_of(item) == cell_named(match[2][7:]))
        for item in items
    ]
    worlds = set()
    for heavy in itertools.product((False, True), repeat=len(items)):
        combined = {"and": np.logical_and(said, heavy), "or": np.logical_or(said, heavy)}.get(match[3], said)
        worlds.add(bool(np.any(combined)))
    if len(worlds) == 2:
        return "neutral"
    return "entailment" if worlds == {True} else "contradiction"


def balance(answers: Iterable[bool]) -> float:
    return float(np.mean(list(answers)))


# --- scenes and splits ------------------------------------------------------------------------------------------


@given(SEEDS, SEEDS, SPLITS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_scene_is_a_function_of_its_arguments(seed: int, index: int, split: Split) -> None:
    scene = shapes.generate_scene(seed, index, split)
    shapes.generate_scene(seed ^ 1, index, split)
    assert shapes.generate_scene(seed, index, split) == scene
    assert (shapes.render(scene) == shapes.render(shapes.generate_scene(seed, index, split))).all()
    assert shapes.generate_scene(seed, index ^ 1, split).objects != scene.objects


def test_scene_is_the_same_on_every_platform() -> None:
    """Written down once; a change here changes every published number on Shapes."""
    captions = [shapes.captions(shapes.generate_scene(7, 3, split))[0] for split in Split]
    assert captions == GOLDEN_CAPTIONS


@given(SEEDS, SEEDS, SPLITS, st.integers(1, 8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_splits_keep_their_rules(seed: int, index: int, split: Split, most: int) -> None:
    scene = shapes.generate_scene(seed, index, split, ShapesConfig(max_objects=most))
    assert 1 <= len(scene.objects) <= most
    held_out = [item for item in scene.objects if (item.colour, item.shape) in HELD_OUT]
    assert bool(held_out) == (split is Split.COMPOSITIONS)
    kinds = [item.kind for item in scene.objects]
    assert [each for each in Split if shapes.split_admits(each, kinds[::-1])] == [split]


def test_train_and_test_share_no_multiset() -> None:
    train, test = (
        {frozenset(scene.kinds.items()) for scene in scenes(3000, split)} for split in (Split.TRAIN, Split.TEST)
    )
    assert len(train) > 1000
    assert len(test) > 500
    assert not train & test


def test_test_holds_about_15_percent_of_the_multisets() -> None:
    kinds = [
        kind for kind in itertools.product(shapes.SIZES, shapes.COLOURS, shapes.SHAPES) if kind[1:] not in HELD_OUT
    ]
    pairs = list(itertools.combinations_with_replacement(kinds, 2))
    share = balance(shapes.split_admits(Split.TEST, pair) for pair in pairs)
    assert 0.12 < share < 0.18
    singles = [kind for kind in kinds if shapes.split_admits(Split.TEST, [kind])]
    assert [{kind[i] for kind in singles} for i in range(3)] == [
        set(shapes.SIZES),
        set(shapes.COLOURS),
        set(shapes.SHAPES),
    ]


def test_training_shows_every_colour_and_shape() -> None:
    seen = {kind for scene in scenes(1000) for kind in scene.kinds}
    allowed = itertools.product(shapes.SIZES, shapes.COLOURS, shapes.SHAPES)
    assert seen == {kind for kind in allowed if kind[1:] not in HELD_OUT}
    assert HELD_OUT == shapes.HELD_OUT_PAIRS


def test_number_of_objects_is_even() -> None:
    for split in Split:
        counts = Counter(len(scene.objects) for scene in scenes(900, split))
        assert set(counts) == {1, 2, 3}
        assert min(counts.values()) > 240


def test_distinct_scenes() -> None:
    found = shapes.distinct_scenes(Split.TEST, 50, seed=1, start=7, config=ShapesConfig(max_objects=1))
    assert len({shapes.captions(scene)[0] for scene in found}) == 50 == len(found)
    assert found[0].index == 7


def test_distinct_scenes_says_when_there_are_not_enough() -> None:
    with pytest.raises(ValueError, match="found only 54 of 60"):  # six kinds in nine places
        shapes.distinct_scenes(Split.TEST, 60, config=ShapesConfig(max_objects=1))


@pytest.mark.parametrize("bounds", [(0, 3), (3, 2), (1, 9)])
def test_config_is_checked(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="min_objects"):
        ShapesConfig(*bounds)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**32, 0)])
def test_seed_and_index_are_checked(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to"):
        shapes.generate_scene(seed, index, Split.TRAIN)


# --- drawing ----------------------------------------------------------------------------------------------------


def test_images_differ_where_scenes_are_alike() -> None:
    images = {shapes.render(scene).tobytes() for scene in scenes(300, config=ShapesConfig(max_objects=1))}
    assert len(images) == 300


@pytest.mark.parametrize("size", [32, 64, 129, 512])
def test_boxes_are_tight_around_what_is_drawn(size: int) -> None:
    """Coverage is measured back from pixels; noise-free, a box holds the pixels that are at least half covered."""
    for scene in scenes(30 if size < 512 else 4, Split.COMPOSITIONS):
        image = shapes.render(scene, size).astype(float)
        assert image.shape == (size, size, 3)
        empty = render_background(scene.background, size).astype(float)
        inside_some_box, near = np.zeros((size, size), bool), np.zeros((size, size), bool)
        for item in scene.objects:
            left, top, right, bottom = shapes.object_box(item, size)
            assert 0 <= left < right <= size
            assert 0 <= top < bottom <= size
            around = np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
            assert not inside_some_box[top:bottom, left:right].any(), "boxes overlap"
            inside_some_box[top:bottom, left:right] = True
            paint = np.array(shapes.COLOUR_RGB[item.colour]) - empty[around]
            coverage = ((image[around] - empty[around]) * paint).sum(-1) / (paint**2).sum(-1)
            y, x = np.nonzero(coverage > 0.48)
            y_sure, x_sure = np.nonzero(coverage > 0.52)
            offset_x, offset_y = max(0, left - 1), max(0, top - 1)
            assert x.min() + offset_x <= left <= x_sure.min() + offset_x
            assert y.min() + offset_y <= top <= y_sure.min() + offset_y
            assert x_sure.max() + offset_x <= right - 1 <= x.max() + offset_x
            assert y_sure.max() + offset_y <= bottom - 1 <= y.max() + offset_y
            # The faint ends of pointed tips may reach further than the box.
            near[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
        assert (image == empty)[~near].all(), "something is drawn outside the boxes"


def test_size_names_the_drawn_extent() -> None:
    widths = defaultdict(list)
    for scene in scenes(200):
        for item in scene.objects:
            left, _, right, _ = shapes.object_box(item, 256)
            widths[item.size].append(right - left)
    assert max(widths["small"]) * 1.3 < min(widths["large"])


@pytest.mark.parametrize("size", [32, 64])
def test_colours_can_be_told_from_pixels(size: int) -> None:
    """The nearest named colour of the most strongly painted pixel is the object's own."""
    names, paints = list(shapes.COLOUR_RGB), np.array(list(shapes.COLOUR_RGB.values()), float)
    for scene in scenes(150, Split.COMPOSITIONS):
        image = shapes.render(scene, size).astype(float)
        for item in scene.objects:
            left, top, right, bottom = shapes.object_box(item, size)
            pixels = image[top:bottom, left:right].reshape(-1, 3)
            strongest = pixels[np.argmax(np.abs(pixels - 230).sum(-1))]
            assert names[int(np.argmin(np.abs(paints - strongest).sum(-1)))] == item.colour
    distances = [np.abs(one - two).sum() for one, two in itertools.combinations(paints, 2)]
    assert min(distances) > 80


def test_shapes_can_be_told_from_pixels() -> None:
    """Each shape fills the share of its box that geometry demands."""
    filled = defaultdict(list)
    for scene in scenes(150, Split.COMPOSITIONS):
        empty = render_background(scene.background, 256).astype(float)
        image = shapes.render(scene, 256).astype(float)
        for item in scene.objects:
            left, top, right, bottom = shapes.object_box(item, 256)
            box = np.s_[top:bottom, left:right]
            half = np.abs(np.array(shapes.COLOUR_RGB[item.colour]) - empty[box]).sum(-1) / 2
            filled[item.shape].append((np.abs(image[box] - empty[box]).sum(-1) > half).mean())
    means = {shape: np.mean(shares) for shape, shares in filled.items()}
    assert means["square"] > 0.99
    assert means["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert means["triangle"] == pytest.approx(0.5, abs=0.03)
    assert means["star"] == pytest.approx(0.43, abs=0.03)


@pytest.mark.parametrize("size", [31, 513])
def test_image_size_is_checked(size: int) -> None:
    with pytest.raises(ValueError, match="32 to 512"):
        shapes.render(scenes(1)[0], size)


# --- language ---------------------------------------------------------------------------------------------------


def test_captions_name_exactly_the_objects(many: list[Scene]) -> None:
    for scene in many:
        texts = shapes.captions(scene)
        assert len(set(texts)) == len(texts) == 5
        assert all(shapes.parse_caption(text) == Counter(item.kind for item in scene.objects) for text in texts)
        assert all(shapes.names_exactly(text, scene) for text in texts)


def test_captions_tell_the_places(many: list[Scene]) -> None:
    for scene in many:
        first, second, third, relative, grouped = shapes.captions(scene)
        for text in (first, second):
            mentions = re.sub("^there is ", "", text).split(" and ")
            assert [the(mention, scene) for mention in mentions] == sorted(scene.objects, key=cell_of)
        for mention in third.split(" and at the "):
            place, kind = mention.removeprefix("at the ").split(" there is ")
            the(f"{kind} at the {place}", scene)
        assert sorted(re.findall("(?:top|bottom|centre)(?: left| right| centre)?", grouped)) == sorted(
            item.place for item in scene.objects
        )
        if len(scene.objects) > 1:
            anchor, others = relative.split(" with ")
            related = re.findall(r"(a \w+ \w+ \w+) (to its right|below it)", others)
            assert len(related) == len(scene.objects) - 1
            for mention, relation in related:
                full = "to the right of" if relation == "to its right" else "below"
                assert any(
                    stands(item, full, other)
                    for other in find(anchor, scene)
                    for item in find(mention, scene)
                    if item is not other and (full == "below") == (item.row != other.row)
                )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a picture",
        "a red circle",
        "a small circle",
        "small red circle",
        "a small red",
        "a small red circle and a large",
        "a small red circle and blue",
        "two small red circle",
        "a small red circles",
        "a small crimson circle",
        "a red small circle",
        "zero small red circles",
        "a small red circle small blue square",
    ],
)
def test_parse_refuses(text: str) -> None:
    assert shapes.parse_caption(text) is None


def test_parse_counts() -> None:
    text = "A small red circle, two large blue stars and the small red circle."
    assert shapes.parse_caption(text) == Counter({("small", "red", "circle"): 2, ("large", "blue", "star"): 2})


def test_names_exactly_notices_each_difference() -> None:
    scene = next(scene for scene in scenes(50) if len(scene.kinds) == 3)
    text = shapes.captions(scene)[0]
    item = scene.objects[0]
    assert shapes.names_exactly(text, scene)
    assert not shapes.names_exactly(text.rpartition(" and ")[0], scene)
    assert not shapes.names_exactly(f"{text} and a {' '.join(item.kind)}", scene)
    for words in (shapes.SIZES, shapes.COLOURS, shapes.SHAPES):
        old = next(word for word in item.kind if word in words)
        new = next(word for word in words if word != old)
        assert not shapes.names_exactly(text.replace(old, new, 1), scene)


def test_questions_are_answered_right(many: list[Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in many:
        for question in shapes.questions(scene, rng_of(scene)):
            assert judge(question.text, scene) == question.answer, (question, scene)
            kinds[question.kind] += 1
    assert set(kinds) == QUESTION_KINDS
    assert min(kinds.values()) > 300


def test_answers_cannot_be_guessed() -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_form: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes(1500):
        for question in shapes.questions(scene, rng_of(scene)):
            answers[question.kind][question.answer] += 1
            if question.answer in ("yes", "no"):
                form = re.sub(rf"\b({'|'.join((*shapes.COLOURS, *shapes.SIZES))})\b ?", "", question.text)
                by_form[re.sub(NOUN_PHRASE.format(""), "X", form)][question.answer] += 1
    shares = {kind: max(counts.values()) / sum(counts.values()) for kind, counts in answers.items()}
    assert all(0.4 < counts["yes"] / sum(counts.values()) < 0.6 for counts in answers.values() if "yes" in counts)
    assert all(0.4 < c["yes"] / sum(c.values()) < 0.6 for c in by_form.values() if sum(c.values()) > 200)
    assert shares["colour"] < 0.25
    assert shares["shape"] < 0.35
    assert shares["position"] < 0.15
    assert shares["count"] < 0.4


def test_training_never_mentions_a_held_out_pair() -> None:
    pattern = "|".join(f"{colour} {shape}" for colour, shape in HELD_OUT)
    trained = scenes(600)
    for scene, other in itertools.pairwise(trained):
        rng = rng_of(scene)
        texts = [question.text for question in shapes.questions(scene, rng)]
        texts += [hypothesis.text for hypothesis in shapes.entailment(scene, rng)]
        texts.append(shapes.statement(scene, other, rng)[0])
        assert not re.search(pattern, " ; ".join(texts))


@pytest.mark.parametrize("size", [32, 64])
def test_phrases_fit_exactly_one_object(many: list[Scene], size: int) -> None:
    for scene in many[::3]:
        found = shapes.phrases(scene, size)
        assert {phrase.box_xyxy for phrase in found} == {shapes.object_box(item, size) for item in scene.objects}
        assert len({phrase.text for phrase in found}) == len(found)
        for phrase in found:
            if match := re.fullmatch(rf"the (\w+) ({RELATION}) (the .+)", phrase.text):
                anchor = the(match[3], scene)
                gaps = [item for item in find(match[1], scene) if item is not anchor]
                (item,) = [item for item in gaps if stands(item, match[2], anchor)]
            else:
                item = the(phrase.text, scene)
            assert shapes.object_box(item, size) == phrase.box_xyxy


@pytest.mark.parametrize("config", [None, ShapesConfig(max_objects=5)])
def test_statements_are_judged_right_and_balanced(config: ShapesConfig | None) -> None:
    labels, by_form = [], defaultdict(list)
    for left, right in itertools.pairwise(scenes(1500, config=config)):
        text, label = shapes.statement(left, right, rng_of(left))
        assert is_true(text, left, right) == label, (text, left, right)
        labels.append(label)
        by_form[text.split(" contain")[0].replace("right", "left")].append(label)
    assert 0.45 < balance(labels) < 0.55
    assert len(by_form) == 5  # the left (presence, more), only the left, both, neither, the two (total)
    assert all(len(given) > 80 and 0.4 < balance(given) < 0.6 for given in by_form.values())


def test_statements_work_for_crowded_compositions() -> None:
    for left, right in itertools.pairwise(scenes(300, Split.COMPOSITIONS, ShapesConfig(min_objects=3, max_objects=5))):
        text, label = shapes.statement(left, right, rng_of(left))
        assert is_true(text, left, right) == label


def test_entailment_labels(many: list[Scene]) -> None:
    labels: Counter[str] = Counter()
    by_form: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in many:
        found = shapes.entailment(scene, rng_of(scene))
        assert {hypothesis.label for hypothesis in found} == set(shapes.LABELS)
        for hypothesis in found:
            assert label_of(hypothesis.text, scene) == hypothesis.label, (hypothesis, scene)
            assert hypothesis.premise == shapes.captions(scene)[0]
            labels[hypothesis.label] += 1
            by_form[hypothesis.text.split()[-2]][hypothesis.label] += 1
    assert max(labels.values()) / labels.total() < 0.46
    assert len(set(by_form["or"].values())) == 1
    assert len(set(by_form["and"].values())) == 1


def test_all_text_is_in_the_vocabulary(many: list[Scene]) -> None:
    used: set[str] = set()
    for scene, other in itertools.pairwise(many):
        rng = rng_of(scene)
        video = shapes_clips.clip(scene, 2, rng, 32)
        asked = [*shapes.questions(scene, rng), *video.questions]
        texts = [
            *shapes.captions(scene),
            *video.captions,
            *video.scene_captions,
            *(q.text for q in asked),
            *(q.answer for q in asked),
        ]
        texts += [phrase.text for phrase in shapes.phrases(scene, 32)]
        texts += [hypothesis.text for hypothesis in shapes.entailment(scene, rng)]
        texts.append(shapes.statement(scene, other, rng)[0])
        used.update(" ".join(texts).split())
    assert used <= set(shapes.VOCABULARY)
    numbers = {"nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"}
    assert set(shapes.VOCABULARY) - used <= numbers


# --- clips ------------------------------------------------------------------------------------------------------


def middle_of_change(frame: np.ndarray, empty: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(np.abs(frame.astype(int) - empty).sum(-1) > 60)
    return float(x.mean()), float(y.mean())


def test_clip_shows_what_it_says() -> None:
    directions: Counter[str] = Counter()
    answers = []
    for scene in scenes(200):
        video = shapes_clips.clip(scene, 5, rng_of(scene))
        assert video.frames_THWC.shape == (5, 64, 64, 3)
        assert (video.frames_THWC[0] == shapes.render(scene)).all()
        item = scene.objects[video.mover]
        rest = Scene(
            scene.split,
            scene.seed,
            scene.index,
            tuple(other for other in scene.objects if other is not item),
            scene.background,
        )
        empty = shapes.render(rest)
        start, end = (middle_of_change(video.frames_THWC[i], empty) for i in (0, -1))
        moved = np.array(end) - start
        axis = int(np.argmax(np.abs(moved)))
        assert ("left" if moved[0] < 0 else "right", "up" if moved[1] < 0 else "down")[axis] == video.direction
        assert abs(moved[axis]) == pytest.approx(64 / 3, abs=1)
        assert abs(moved[1 - axis]) < 1
        assert 3 * int(end[1] * 3 / 64) + int(end[0] * 3 / 64) == cell_named(video.end_place)
        for text in video.captions:
            assert shapes.parse_caption(text) == scene.kinds
            assert text.startswith(f"a {' '.join(item.kind)}")
        facts = {
            "what moves": " ".join(item.kind),
            "what colour is the moving object": item.colour,
            "what shape is the moving object": item.shape,
            "which way does the moving object go": video.direction,
            "where does the moving object start": item.place,
            "where does the moving object end": video.end_place,
        }
        for question in video.questions:
            if question.text in facts:
                assert question.answer == facts.pop(question.text)
                continue
            if match := re.fullmatch("does the moving object go (.+)", question.text):
                right = match[1] == video.direction
            else:
                match = re.fullmatch("does (.+) move", question.text)
                assert match
                right = the(match[1], scene) is item
            assert question.answer == ("yes" if right else "no")
            answers.append(right)
        assert not facts
        directions[video.direction] += 1
    assert min(directions.values()) > 30
    assert 0.4 < balance(answers) < 0.6


def test_clip_never_touches_other_objects() -> None:
    for scene in scenes(60, config=ShapesConfig(min_objects=8, max_objects=8)):
        video = shapes_clips.clip(scene, 6, rng_of(scene))
        item = scene.objects[video.mover]
        for other in scene.objects:
            if other is not item:
                left, top, right, bottom = shapes.object_box(other)
                window = video.frames_THWC[:, top:bottom, left:right]
                assert (window == window[:1]).all()


def test_clip_needs_two_frames() -> None:
    with pytest.raises(ValueError, match="at least 2 frames"):
        shapes_clips.clip(scenes(1)[0], 1, np.random.default_rng(0))


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_shards_hold_the_scenes(tmp_path: Path, image_format: shapes.ImageFormat) -> None:
    shards = shapes.write_shards(
        tmp_path, Split.TEST, 25, shard_size=10, size=48, seed=3, start=20, image_format=image_format
    )
    assert [shard.name for shard in shards] == ["test-00002.tar", "test-00003.tar", "test-00004.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.name for shard in shards]
    index = 20
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert list(files) == [
            f"{number:09d}.{ending}"
            for number in range(index, index + len(files) // 3)
            for ending in (image_format, "json", "txt")
        ]
        for number in range(index, index + len(files) // 3):
            scene = shapes.generate_scene(3, number, Split.TEST)
            image = np.asarray(Image.open(io.BytesIO(files[f"{number:09d}.{image_format}"])))
            truth = shapes.render(scene, 48)
            error = np.abs(image.astype(int) - truth)
            assert error.mean() < (3 if image_format == "jpg" else 1e-9)
            record = json.loads(files[f"{number:09d}.json"])
            assert record == json.loads(json.dumps(shapes.ground_truth(scene, 48)))
            assert record["image_id"] == scene.image_id
            assert [item["box_xyxy"] for item in record["objects"]] == [
                list(shapes.object_box(item, 48)) for item in scene.objects
            ]
            assert all(judge(q["question"], scene) == q["answer"] for q in record["questions"])
            assert files[f"{number:09d}.txt"].decode() == record["captions"][0] == shapes.captions(scene)[0]
        index += len(files) // 3
    assert index == 45


def test_statements_refer_to_written_images(tmp_path: Path) -> None:
    options = {"seed": 4, "start": 20, "shard_size": 5, "image_format": "jpg"}
    shapes.write_shards(tmp_path, Split.TEST, 25, size=32, **options)  # type: ignore[arg-type]
    path = shapes.write_statements(tmp_path, Split.TEST, 12, **options)  # type: ignore[arg-type]
    assert path.name == "statements-test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 12
    for number, line in enumerate(lines):
        pictures = []
        for image in line["images"]:
            shard, _, member = image.partition(":")
            with tarfile.open(tmp_path / shard) as tar:
                assert tar.getmember(member).size
                truth = json.load(tar.extractfile(member.replace("jpg", "json")))  # type: ignore[arg-type]
            pictures.append(truth["image_id"])
        left, right = (shapes.generate_scene(4, 20 + 2 * number + side, Split.TEST) for side in (0, 1))
        assert pictures == [left.image_id, right.image_id]
        assert is_true(line["statement"], left, right) == line["label"]
        assert line["identifier"] == f"test-{20 + 2 * number}-0-0"
