"""What can be said of a Shapes scene: captions, questions, phrases, two-image statements and entailments.

All text is lower-case words without punctuation, from `VOCABULARY`. Whatever has to be judged true or false
is drawn so that the words alone do not give the answer away: the truth value is tossed first, and the true
and the false text come from the same template and the same distribution of words. A (colour, shape) pair that
training never shows is never mentioned in a training scene's text either.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from triptych.data.shapes_render import (
    COLOURS,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    Box,
    Kind,
    Object,
    Scene,
    object_box,
)

T = TypeVar("T")

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
    *("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
"""As many as a pair of scenes may hold (two times `MAX_OBJECTS`)."""
RELATIONS = ("to the left of", "to the right of", "above", "below")
OPPOSITE = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
DIRECTIONS = ("left", "right", "up", "down")
LABELS = ("entailment", "neutral", "contradiction")

_GLUE = (
    "a above an and are as at below both bottom centre colour contain contains does down end ends from go "
    "have heavy how image images in is it its larger left many more move moves moving neither no object objects "
    "of only or picture right same shape shows size start starts stay stays still than that the there to top "
    "total up way what where which while with yes"
)
VOCABULARY: tuple[str, ...] = tuple(
    sorted({*_GLUE.split(), *SIZES, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *NUMBERS})
)
"""Every word that any text or answer of this module and of `triptych.data.shapes` uses."""

_WORDS = frozenset(VOCABULARY)

Attributes = tuple[str, ...]
ATTRIBUTES: Attributes = ("size", "colour", "shape")
_SUBSETS: tuple[Attributes, ...] = tuple(
    subset for length in (1, 2, 3) for subset in itertools.combinations(ATTRIBUTES, length)
)
_FOILED_SUBSETS: tuple[Attributes, ...] = (("size", "colour"), ("colour", "shape"), ATTRIBUTES)
_VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one right answer.

    `kind` is existence, colour, shape, size, count, position, relation, comparison, verification, or (for
    clips) motion.
    """

    text: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A referring expression that fits exactly one object, and that object's box."""

    text: str
    box_xyxy: Box


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sentence, and whether image and `premise` entail it, contradict it or leave it open (`LABELS`)."""

    text: str
    label: str
    premise: str


@dataclass(frozen=True, slots=True)
class Description:
    """What a noun phrase says of an object; None where it says nothing."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None

    def matches(self, item: Object) -> bool:
        """Whether everything said is true of `item`."""
        return (
            self.size in (None, item.size)
            and self.colour in (None, item.colour)
            and self.shape in (None, item.shape)
            and self.place in (None, item.place)
        )

    def count(self, scene: Scene) -> int:
        """How many objects of `scene` match."""
        return sum(map(self.matches, scene.objects))

    def text(self, plural: bool = False) -> str:
        """The phrase without an article, e.g. "small red circle", "objects", "star at the top left"."""
        noun = (self.shape or "object") + ("s" if plural else "")
        where = f"at the {self.place}" if self.place else None
        return " ".join(word for word in (self.size, self.colour, noun, where) if word)

    def indefinite(self) -> str:
        """The phrase with "a" or "an"."""
        text = self.text()
        return f"an {text}" if text.startswith("o") else f"a {text}"


# --- captions -----------------------------------------------------------------------------------------------


def captions(scene: Scene) -> tuple[str, ...]:
    """Five paraphrases; each names every object with size, colour and shape, the first in reading order."""
    placed = [f"{' '.join(item.kind)} at the {item.place}" for item in scene.objects]
    reverse = [f"at the {item.place} there is a {' '.join(item.kind)}" for item in reversed(scene.objects)]
    return (
        " and ".join(f"a {text}" for text in placed),
        "there is " + " and ".join(f"a {text}" for text in placed),
        " and ".join(reverse),
        _relation_caption(scene) if len(scene.objects) > 1 else f"the picture shows a {placed[0]}",
        _grouped_caption(scene),
    )


def _relation_caption(scene: Scene) -> str:
    """The others relative to the first: in reading order they are in its row to its right, or below."""
    first, *others = scene.objects
    parts = [f"a {' '.join(item.kind)} {'to its right' if item.row == first.row else 'below it'}" for item in others]
    return f"a {' '.join(first.kind)} with " + " and ".join(parts)


def _grouped_caption(scene: Scene) -> str:
    """The objects counted by kind, e.g. "two large red stars at the top left and the centre"."""
    parts = []
    for kind, count in scene.kinds.items():
        places = " and ".join(f"the {item.place}" for item in scene.objects if item.kind == kind)
        parts.append(f"{NUMBERS[count]} {' '.join(kind)}{'s' if count > 1 else ''} at {places}")
    return " and ".join(parts)


def parse_caption(text: str) -> Counter[Kind] | None:
    """The multiset of (size, colour, shape) that `text` names, or None where it cannot be made sense of.

    Every mention must be complete and begin with an article or a number that agrees ("a small red circle",
    "two large blue stars"); every word must be in `VOCABULARY`. What stands between mentions is not judged.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if any(word not in _WORDS for word in words):
        return None
    kinds: Counter[Kind] = Counter()
    at = 0
    while at < len(words):
        if words[at] in SIZES:
            count = _count_before(words, at)
            colour, noun = (*words[at + 1 : at + 3], "", "")[:2]
            shape = noun.removesuffix("s") if count > 1 else noun
            if count == 0 or colour not in COLOURS or shape not in SHAPES or (count > 1 and shape == noun):
                return None
            kinds[words[at], colour, shape] += count
            at += 3
        elif words[at] in COLOURS or words[at].removesuffix("s") in SHAPES:
            return None
        else:
            at += 1
    return kinds or None


def _count_before(words: Sequence[str], at: int) -> int:
    """The number that the article or numeral in front of word `at` stands for; 0 where there is none."""
    determiner = words[at - 1] if at else ""
    if determiner in ("a", "the"):
        return 1
    return NUMBERS.index(determiner) if determiner in NUMBERS else 0


def names_exactly(text: str, scene: Scene) -> bool:
    """Whether `text` names exactly the objects of `scene`, each as often as it occurs."""
    return parse_caption(text) == scene.kinds


# --- choosing words -----------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, uniformly."""
    return items[int(rng.random() * len(items))]


def toss(rng: np.random.Generator) -> bool:
    """A fair coin."""
    return bool(rng.random() < 0.5)


def unique_descriptions(scene: Scene, item: Object, attributes: Attributes = ATTRIBUTES) -> list[Description]:
    """All descriptions by some of `attributes` that fit `item` alone in `scene`, shortest first."""
    candidates = [_describe(item, subset) for subset in _subsets(attributes)]
    return [candidate for candidate in candidates if candidate.count(scene) == 1]


@cache
def _subsets(attributes: Attributes) -> tuple[Attributes, ...]:
    return tuple(subset for subset in ((), *_SUBSETS) if set(subset) <= set(attributes))


def _describe(item: Object, attributes: Attributes) -> Description:
    return Description(**{name: getattr(item, name) for name in attributes})


def _reference(scene: Scene, item: Object, rng: np.random.Generator, attributes: Attributes, place: bool) -> str | None:
    """A random unique way to refer to `item` by `attributes`, or by its place if that is allowed."""
    options = unique_descriptions(scene, item, attributes)
    if place:
        options.append(Description(place=item.place))
    return f"the {pick(rng, options).text()}" if options else None


def _foils(scenes: Sequence[Scene], item: Object, attributes: Attributes) -> list[Description]:
    """Descriptions by `attributes` that fit nothing in `scenes`, as close to `item` as there are any.

    A foil pairs a held-out colour and shape just where `item` does (as long as there is one), so that the
    pair itself tells nothing. There always is a foil for size and colour, for colour and shape, and for all
    three.
    """
    present = {_values(other, attributes) for scene in scenes for other in scene.objects}
    for ring in _neighbours(attributes, _values(item, attributes)):
        absent = [values for values in ring if values not in present]
        if absent:
            return [Description(**dict(zip(attributes, values, strict=True))) for values in absent]
    return []


def _values(item: Object, attributes: Attributes) -> tuple[str, ...]:
    return tuple(getattr(item, name) for name in attributes)


@cache
def _neighbours(attributes: Attributes, values: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The other values of `attributes`, grouped by how many of them differ from `values` (1, 2, 3).

    Where `values` pair a held-out colour and shape, values that do not come last; otherwise values that do
    are left out.
    """
    rings: list[list[tuple[str, ...]]] = [[], [], [], []]
    held_out = _held_out(attributes, values)
    for other in itertools.product(*(_VALUES[name] for name in attributes)):
        differing = sum(a != b for a, b in zip(values, other, strict=True))
        if differing and _held_out(attributes, other) == held_out:
            rings[differing - 1].append(other)
        elif differing and held_out:
            rings[-1].append(other)
    return tuple(map(tuple, rings))


def _held_out(attributes: Attributes, values: tuple[str, ...]) -> bool:
    named = dict(zip(attributes, values, strict=True))
    return (named.get("colour"), named.get("shape")) in HELD_OUT_PAIRS


def _relations(item: Object, other: Object) -> list[str]:
    """The relations in which `item` clearly stands to `other`: by whole columns and rows."""
    found = []
    if item.column != other.column:
        found.append(RELATIONS[0] if item.column < other.column else RELATIONS[1])
    if item.row != other.row:
        found.append(RELATIONS[2] if item.row < other.row else RELATIONS[3])
    return found


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


# --- questions ----------------------------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Up to one question of each sort that `scene` allows, about 9. Whether yes or no is right is tossed."""
    found = (ask(scene, rng) for ask in _ASKERS)
    return [question for question in found if question is not None]


def _ask_existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    item, attributes = pick(rng, scene.objects), pick(rng, _SUBSETS)
    foils = _foils((scene,), item, attributes)
    if not foils:
        return None
    wanted = toss(rng)
    description = _describe(item, attributes) if wanted else pick(rng, foils)
    return Question(f"is there {description.indefinite()}", _yes_no(wanted), "existence")


def _ask_attribute(scene: Scene, rng: np.random.Generator, attribute: str) -> Question | None:
    item = pick(rng, scene.objects)
    others = tuple(name for name in ATTRIBUTES if name != attribute)
    reference = _reference(scene, item, rng, others, place=True)
    return Question(f"what {attribute} is {reference}", getattr(item, attribute), attribute)


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_attribute(scene, rng, "colour")


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_attribute(scene, rng, "shape")


def _ask_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_attribute(scene, rng, "size")


def _ask_total(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("how many objects are there", NUMBERS[len(scene.objects)], "count")


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """Count by one or two attributes. The count is drawn first; large ones, rarely possible, weigh more."""
    by_count: dict[int, list[Description]] = {}
    for attributes in _SUBSETS[:-1]:
        for description in {_describe(item, attributes): None for item in scene.objects}:
            by_count.setdefault(description.count(scene), []).append(description)
    foils = _foils((scene,), pick(rng, scene.objects), pick(rng, _SUBSETS[:-1]))
    if foils:
        by_count[0] = foils
    counts = sorted(by_count)
    weights = np.cumsum([max(1, count * count / 2) for count in counts])
    count = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    text = pick(rng, by_count[count]).text(plural=True)
    return Question(f"how many {text} are there", NUMBERS[count], "count")


def _ask_position(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = pick(rng, scene.objects)
    reference = _reference(scene, item, rng, ATTRIBUTES, place=False)
    return Question(f"where is {reference}", item.place, "position") if reference else None


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    item, other = _pick_two(rng, scene.objects)
    reference = _reference(scene, item, rng, ATTRIBUTES, place=False)
    anchor = _reference(scene, other, rng, ATTRIBUTES, place=False)
    if reference is None or anchor is None:
        return None
    relation, wanted = pick(rng, _relations(item, other)), toss(rng)
    asked = relation if wanted else OPPOSITE[relation]
    return Question(f"is {reference} {asked} {anchor}", _yes_no(wanted), "relation")


def _pick_two(rng: np.random.Generator, items: Sequence[T]) -> tuple[T, T]:
    """Two different elements in random order."""
    first = int(rng.random() * len(items))
    second = (first + 1 + int(rng.random() * (len(items) - 1))) % len(items)
    return items[first], items[second]


def _ask_number_comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    attribute = pick(rng, ATTRIBUTES)
    more = Description(**{attribute: getattr(pick(rng, scene.objects), attribute)})
    others = [Description(**{attribute: value}) for value in _VALUES[attribute]]
    fewer = [other for other in others if other.count(scene) < more.count(scene)]
    if not fewer:
        return None
    wanted, one, two = toss(rng), more.text(plural=True), pick(rng, fewer).text(plural=True)
    one, two = (one, two) if wanted else (two, one)
    return Question(f"are there more {one} than {two}", _yes_no(wanted), "comparison")


def _ask_size_comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    large = [item for item in scene.objects if item.size == "large"]
    small = [item for item in scene.objects if item.size == "small"]
    if not large or not small:
        return None
    one = _reference(scene, pick(rng, large), rng, ("colour", "shape"), place=True)
    two = _reference(scene, pick(rng, small), rng, ("colour", "shape"), place=True)
    wanted = toss(rng)
    one, two = (one, two) if wanted else (two, one)
    return Question(f"is {one} larger than {two}", _yes_no(wanted), "comparison")


def _ask_same(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asked only of scenes where both answers are possible: most pairs of objects differ in colour."""
    attribute = pick(rng, ATTRIBUTES)
    pairs: dict[bool, list[tuple[Object, Object]]] = {True: [], False: []}
    for item, other in itertools.permutations(scene.objects, 2):
        pairs[getattr(item, attribute) == getattr(other, attribute)].append((item, other))
    if not pairs[True] or not pairs[False]:
        return None
    wanted = toss(rng)
    item, other = pick(rng, pairs[wanted])
    text = f"does the object at the {item.place} have the same {attribute} as the object at the {other.place}"
    return Question(text, _yes_no(wanted), "comparison")


def _ask_verification(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Colour and shape are verified of objects told apart by size or place: no text pairs the two."""
    item, attribute, wanted = pick(rng, scene.objects), pick(rng, (*ATTRIBUTES, "place")), toss(rng)
    told_by = {"size": ("colour", "shape"), "place": ATTRIBUTES}.get(attribute, ("size",))
    reference = _reference(scene, item, rng, told_by, place=attribute != "place")
    if reference is None:
        return None
    true = getattr(item, attribute)
    false = pick(rng, [value for value in _VALUES.get(attribute, PLACES) if value != true])
    article = {"shape": "a ", "place": "at the "}.get(attribute, "")
    return Question(f"is {reference} {article}{true if wanted else false}", _yes_no(wanted), "verification")


_ASKERS: tuple[Callable[[Scene, np.random.Generator], Question | None], ...] = (
    _ask_existence,
    _ask_colour,
    _ask_shape,
    _ask_size,
    _ask_total,
    _ask_count,
    _ask_position,
    _ask_relation,
    _ask_number_comparison,
    _ask_size_comparison,
    _ask_same,
    _ask_verification,
)


# --- phrases ------------------------------------------------------------------------------------------------


def phrases(scene: Scene, size: int = 64) -> list[Phrase]:
    """Referring expressions for every object with its tight box in an image of `size` pixels.

    For each object: its shortest and its full description where those are unique, the full one with its
    place, and its shape with a relation to another object where that is unique.
    """
    found = []
    for item in scene.objects:
        unique = unique_descriptions(scene, item)
        texts = [description.text() for description in (*unique[:1], *unique[-1:])]
        texts.append(f"{' '.join(item.kind)} at the {item.place}")
        relational = _relational_phrase(scene, item)
        box = object_box(item, size)
        found += [Phrase(f"the {text}", box) for text in dict.fromkeys((*texts, *relational))]
    return found


def _relational_phrase(scene: Scene, item: Object) -> list[str]:
    for other in scene.objects:
        anchors = unique_descriptions(scene, other) if other is not item else []
        for relation in _relations(item, other) if anchors else []:
            # An object of the same shape in the anchor's own column or row would be a borderline case.
            rivals = [o for o in scene.objects if o.shape == item.shape and o is not item and o is not other]
            if all(OPPOSITE[relation] in _relations(rival, other) for rival in rivals):
                return [f"{item.shape} {relation} the {anchors[0].text()}"]
    return []


# --- statements about two images ----------------------------------------------------------------------------


def statement(left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A statement about a pair of images, and whether it is true (a fair coin)."""
    wanted, start = toss(rng), int(rng.random() * len(_STATEMENTS))
    for state in (*_STATEMENTS[start:], *_STATEMENTS[:start]):
        texts = state(left, right, rng)
        if texts is not None:
            return texts[not wanted], wanted
    raise AssertionError("a presence statement is always possible")


Texts = tuple[str, str]
"""A true and a false statement of the same form."""


def _state_presence(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    (side, here), (_, there) = _sides(left, right, rng)
    item, attributes = pick(rng, here.objects), pick(rng, _FOILED_SUBSETS)
    elsewhere = [_describe(other, attributes) for other in there.objects]
    false = [other for other in elsewhere if not other.count(here)] or _foils((here,), item, attributes)
    start = f"the {side} image contains"
    return f"{start} {_describe(item, attributes).indefinite()}", f"{start} {pick(rng, false).indefinite()}"


def _sides(left: Scene, right: Scene, rng: np.random.Generator) -> tuple[tuple[str, Scene], tuple[str, Scene]]:
    sides = (("left", left), ("right", right))
    return sides if toss(rng) else sides[::-1]


def _state_only(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    (side, here), (opposite, there) = _sides(left, right, rng)
    attributes = pick(rng, _SUBSETS)
    only = [d for d in (_describe(item, attributes) for item in here.objects) if not d.count(there)]
    if not only:
        return None
    text = pick(rng, only).indefinite()
    return f"only the {side} image contains {text}", f"only the {opposite} image contains {text}"


def _state_both(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    attributes = pick(rng, _SUBSETS)
    descriptions = [_describe(item, attributes) for item in (*left.objects, *right.objects)]
    shared = [d for d in descriptions if d.count(left) and d.count(right)]
    single = [d for d in descriptions if not (d.count(left) and d.count(right))]
    if not shared or not single:
        return None
    true, false = pick(rng, shared).indefinite(), pick(rng, single).indefinite()
    return f"both images contain {true}", f"both images contain {false}"


def _state_neither(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    item, attributes = pick(rng, (*left.objects, *right.objects)), pick(rng, _SUBSETS)
    foils = _foils((left, right), item, attributes)
    if not foils:
        return None
    true, false = pick(rng, foils).indefinite(), _describe(item, attributes).indefinite()
    return f"neither image contains {true}", f"neither image contains {false}"


def _state_more(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    descriptions = [Description(), *_single_attribute(left, right, rng)]
    differing = [d for d in descriptions if d.count(left) != d.count(right)]
    if not differing:
        return None
    description = pick(rng, differing)
    forms = [
        f"the {one} image contains more {description.text(plural=True)} than the {two} image"
        for one, two in (("left", "right"), ("right", "left"))
    ]
    true = 0 if description.count(left) > description.count(right) else 1
    return forms[true], forms[1 - true]


def _single_attribute(left: Scene, right: Scene, rng: np.random.Generator) -> list[Description]:
    """The values of one random attribute that occur in either image."""
    attribute = pick(rng, ATTRIBUTES)
    return list({_describe(item, (attribute,)): None for item in (*left.objects, *right.objects)})


def _state_total(left: Scene, right: Scene, rng: np.random.Generator) -> Texts | None:
    """The false number is the true one of another value: no number is true more often than another."""
    counts = {d: d.count(left) + d.count(right) for d in _single_attribute(left, right, rng)}
    pairs = [(one, two) for one, two in itertools.permutations(counts, 2) if counts[one] != counts[two]]
    if not pairs:
        return None
    one, two = pick(rng, pairs)
    texts = [
        f"the two images contain {NUMBERS[count]} {one.text(plural=count > 1)} in total"
        for count in (counts[one], counts[two])
    ]
    return texts[0], texts[1]


_STATEMENTS: tuple[Callable[[Scene, Scene, np.random.Generator], Texts | None], ...] = (
    _state_presence,
    _state_only,
    _state_both,
    _state_neither,
    _state_more,
    _state_total,
)


# --- entailment ---------------------------------------------------------------------------------------------


def entailment(scene: Scene, rng: np.random.Generator) -> list[Hypothesis]:
    """Three or four hypotheses with every label among them; `premise` is the scene's first caption.

    Weight cannot be seen: "there is a star that is small or heavy" is entailed where a star is small, open
    where all stars are large, and contradicted where there is no star. Each form of sentence comes with each
    of its labels equally often, so that the words alone give little away.
    """
    premise = captions(scene)[0]
    item, attributes = pick(rng, scene.objects), pick(rng, (("colour",), ("shape",), ("colour", "shape")))
    foils = _foils((scene,), item, attributes)
    if not foils:  # a scene with every colour or every shape
        attributes = ("colour", "shape")
        foils = _foils((scene,), item, attributes)
    base, absent = _describe(item, attributes), pick(rng, foils)
    matching = [other for other in scene.objects if base.matches(other)]
    true, false = _predicates(item, matching, rng)
    if toss(rng):
        forms = ((base, true, 0), (base, false, 1), (absent, true if toss(rng) else false, 2))
        return [
            Hypothesis(f"there is {d.indefinite()} that is {said} or heavy", LABELS[label], premise)
            for d, said, label in forms
        ]
    return [
        Hypothesis(f"there is {base.indefinite()} that is {true}", LABELS[0], premise),
        Hypothesis(f"there is {base.indefinite()} that is {false}", LABELS[2], premise),
        Hypothesis(f"there is {base.indefinite()} that is {true} and heavy", LABELS[1], premise),
        Hypothesis(f"there is {base.indefinite()} that is {false} and heavy", LABELS[2], premise),
    ]


def _predicates(item: Object, matching: Sequence[Object], rng: np.random.Generator) -> tuple[str, str]:
    """A size or place that is true of `item`, and one that is true of none in `matching`."""
    sizes = [size for size in SIZES if all(other.size != size for other in matching)]
    if sizes and toss(rng):
        return item.size, sizes[0]
    places = [place for place in PLACES if all(other.place != place for other in matching)]
    return f"at the {item.place}", f"at the {pick(rng, places)}"
