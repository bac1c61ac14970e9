import json
import math
import os
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.metrics.captions import (
    CiderD,
    JavaMetricsUnavailableError,
    java_metrics,
    plain_cider,
    read_coco_references,
    read_coco_results,
    score_captions,
)
from triptych.metrics.ptb import ptb_tokenize

SHARED = Path(os.environ.get("TRIPTYCH_SHARED", Path(__file__).parents[3] / "shared"))

# Outputs recorded from Stanford's tokenizer inside pycocoevalcap, for sentences written here.
TOKENS = [
    ("A heron wades, slowly, past two reeds.", "a heron wades slowly past two reeds"),
    ("Don't feed it; it's Tom's parrot!", "do n't feed it it 's tom 's parrot"),
    ("They'll cannot-ise what we cannot name", "they 'll cannot-ise what we can not name"),
    ("I'm gonna say he wanna, gotta, lemme go", "i 'm gon na say he wan na got ta lem me go"),
    ("'Twas the boys' kite, rock 'n' roll style", "'t was the boys kite rock 'n' roll style"),
    ("An o'clock joke by O'Brien for y'all", "an o'clock joke by o'brien for y' all"),
    ("A well-known T-shirt on a jack-o-lantern", "a well-known t-shirt on a jack-o-lantern"),
    ("Mr. Lee met Dr. Ray on Elm St. at noon.", "mr. lee met dr. ray on elm st. at noon"),
    ("A map of the U.S. and the U.K.", "a map of the u.s. and the u.k."),
    ("Lamps etc. stand near Acme Inc.", "lamps etc. stand near acme inc."),
    ("A door marked no. 7 says no.", "a door marked no. 7 says no"),
    ("J. Moss painted plan J. The end", "j. moss painted plan j the end"),
    ("3,000 geese, 1/2 a loaf, 5:30 pm, 10:15am", "3,000 geese 1/2 a loaf 5:30 pm 10:15 am"),
    ("A $5.50 cup, 20% off, #3 on the list", "a $ 5.50 cup 20 % off # 3 on the list"),
    ("The '90s and the 1980s; a 21st-floor flat", "the '90s and the 1980s a 21st-floor flat"),
    ("B&B sign, salt & pepper, sofa/bed and/or cot", "b&b sign salt & pepper sofa/bed and/or cot"),
    ("A \"ship\" (toy) [red] says 'ahoy'...", "a ship -lrb- toy -rrb- -lsb- red -rsb- says ahoy"),
    ("Wow!! Really?! Yes! Yes?", "wow !! really ?! yes yes"),
    ("“Curly” café – naïve… it’s", "curly café naïve it 's"),
    ("Two lines\nof one caption", "two lines of one caption"),
    ("No space.after the stop.", "no space.after the stop"),
    ("A smiling :) cup @ 40° C", "a smiling :-rrb- cup @ 40 ° c"),
    ("A fox 😀 by www.example.com", "a fox by www.example.com"),
    ("", ""),
    ("...", ""),
]


@pytest.mark.parametrize(("caption", "tokens"), TOKENS)
def test_tokens_are_those_of_the_reference_tokenizer(caption: str, tokens: str) -> None:
    assert ptb_tokenize([caption]) == [tokens.split()]


def test_the_next_caption_can_end_the_sentence() -> None:
    assert ptb_tokenize(["plan J.", "A man"]) == [["plan", "j"], ["a", "man"]]
    assert ptb_tokenize(["plan J.", "men"]) == [["plan", "j."], ["men"]]


@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_text_gives_clean_tokens(texts: list[str]) -> None:
    tokenized = ptb_tokenize(texts)
    assert len(tokenized) == len(texts)
    assert all(token and not any(c.isspace() for c in token) for tokens in tokenized for token in tokens)


# ---------------------------------------------------------------------------------------------------- the scores

REFERENCES: dict[Hashable, list[str]] = {
    "boat": ["a red boat on the lake", "a small boat floats on water"],
    7: ["two dogs run on grass", "dogs run"],
    "hat": ["the hat is green"],
}
PREDICTIONS: dict[Hashable, str] = {
    "boat": "a red boat on water",
    7: "two dogs run on the grass",
    "hat": "a green hat",
}


def test_a_copy_of_the_reference_is_perfect() -> None:
    references = {k: [f"{v[0]} today", *v] for k, v in REFERENCES.items()}
    scores = score_captions(references, {k: v[0] for k, v in references.items()})
    assert list(scores) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert [scores[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1, 1, 1, 1])
    assert scores["ROUGE_L"] == pytest.approx(1)


def test_bleu_and_rouge_by_hand() -> None:
    scores = score_captions({0: ["a b c d", "a b"]}, {0: "a b x"})
    # Lengths 2 and 4 are equally close to 3: the shorter counts, so no brevity penalty.
    assert scores["Bleu_1"] == pytest.approx(2 / 3)
    assert scores["Bleu_2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    precision, recall = 2 / 3, 1.0
    assert scores["ROUGE_L"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_short_candidates_pay_the_brevity_penalty() -> None:
    scores = score_captions({0: ["a b c d"]}, {0: "a b"})
    assert scores["Bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))


def naive_cider(references: dict[Hashable, list[str]], image: Hashable, candidate: str, plain: bool) -> float:
    """The formula of the CIDEr paper, one n-gram at a time."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        tokens = text.split()
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        weights = {}
        for gram, count in grams(text, n).items():
            images = sum(any(gram in grams(r, n) for r in group) for group in references.values())
            weights[gram] = count * math.log(len(references) / max(1, images))
        return weights

    def similarity(reference: str, n: int) -> float:
        ours, theirs = vector(candidate, n), vector(reference, n)
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum((w if plain else min(w, theirs.get(g, 0))) * theirs.get(g, 0) for g, w in ours.items())
        shift = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
        return (dot / norm if norm else 0.0) * (1 if plain else math.exp(-(shift**2) / 72))

    group = references[image]
    return 10 * sum(similarity(reference, n) for reference in group for n in (1, 2, 3, 4)) / (4 * len(group))


TEXT = st.lists(st.sampled_from(["red", "dog", "cat", "on", "grass"]), max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), TEXT), max_size=6),
)
def test_cider_follows_the_formula(groups: list[list[str]], wanted: list[tuple[int, str]]) -> None:
    references: dict[Hashable, list[str]] = dict(enumerate(groups))
    images = [number % len(groups) for number, _ in wanted]
    texts = [text for _, text in wanted]
    expected = [naive_cider(references, image, text, plain=False) for image, text in zip(images, texts, strict=True)]
    assert CiderD(references).scores(images, texts).tolist() == pytest.approx(expected, abs=1e-9)
    predictions: dict[Hashable, str] = {image: groups[image][0] for image in range(len(groups))}
    expected_plain = [naive_cider(references, image, text, plain=True) for image, text in predictions.items()]
    assert plain_cider(references, predictions) == pytest.approx(sum(expected_plain) / len(groups), abs=1e-9)


def test_front_function_prints_the_mean_of_cider_d() -> None:
    per_image = CiderD(REFERENCES).scores(list(PREDICTIONS), list(PREDICTIONS.values()))
    assert score_captions(REFERENCES, PREDICTIONS)["CIDEr"] == pytest.approx(per_image.mean())
    assert (per_image > 0).all()


def test_cider_rewards_do_not_depend_on_the_batch() -> None:
    scorer = CiderD(REFERENCES)
    together = scorer.scores(["hat", "boat", "boat"], ["unseen words here", "a boat", "a red boat"])
    alone = [
        scorer.scores([image], [text])[0]
        for image, text in [("hat", "unseen words here"), ("boat", "a boat"), ("boat", "a red boat")]
    ]
    assert together.tolist() == pytest.approx(alone)


def test_allow_missing_scores_only_the_predicted_images() -> None:
    some = {k: v for k, v in PREDICTIONS.items() if k != "hat"}
    kept = {k: v for k, v in REFERENCES.items() if k != "hat"}
    assert score_captions(REFERENCES, some, allow_missing=True) == score_captions(kept, some)


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        (REFERENCES, {**PREDICTIONS, "ghost": "a"}, "without references: 'ghost'"),
        (REFERENCES, {"boat": "a"}, "without a prediction: 7, 'hat'"),
        ({n: ["a"] for n in range(9)}, {0: "a"}, "1, 2, 3, 4, 5 and 3 more"),
        (REFERENCES, {}, "no predictions"),
        ({}, {1: "a"}, "without references: 1"),
        ({1: []}, {1: "a"}, "without reference captions: 1"),
        ({1: "a cat"}, {1: "a"}, "not one string: 1"),
        ({1: ["a cat"]}, {1: ["a"]}, "one string an image: 1"),
    ],
)
def test_bad_input_is_named(references: Any, predictions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_captions(references, predictions)


def test_rewards_for_unknown_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no references for image 'ghost'"):
        CiderD(REFERENCES).scores(["ghost"], ["a"])
    with pytest.raises(ValueError, match="2 images for 1 candidates"):
        CiderD(REFERENCES).scores(["hat", "hat"], ["a"])
    with pytest.raises(ValueError, match="no references"):
        CiderD({})


def test_java_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(JavaMetricsUnavailableError, match="no `java` on PATH"):
        java_metrics(REFERENCES, PREDICTIONS)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(JavaMetricsUnavailableError, match=r"triptych-vl\[java-metrics\]"):
        java_metrics(REFERENCES, PREDICTIONS)


# -------------------------------------------------------------------------------------------------------- readers


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_readers_keep_the_order_of_the_files(tmp_path: Path) -> None:
    annotations = [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate([(2, "b"), (9, "a"), (2, "c")])]
    references = write(tmp_path / "r.json", {"images": [{"id": 9}, {"id": 4}, {"id": 2}], "annotations": annotations})
    assert list(read_coco_references(references).items()) == [("9", ["a"]), ("2", ["b", "c"])]
    results = write(tmp_path / "p.json", [{"image_id": 2, "caption": "x"}, {"image_id": 9, "caption": "y"}])
    assert read_coco_results(results) == {"2": "x", "9": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "annotations"),
        ({"images": [], "annotations": [{"caption": "a"}]}, r'annotations\[0\]: needs "image_id"'),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}, r'annotations\[0\]: needs "caption"'),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}, "'2' is not among"),
        ({"images": [{}], "annotations": []}, r"images\[0\]"),
        ({"images": 3, "annotations": []}, "must be a list"),
    ],
)
def test_bad_reference_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"r.json.*{message}"):
        read_coco_references(write(tmp_path / "r.json", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "JSON list"),
        (["a"], "entry 0"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "entry 1: a second caption for image '1'"),
        ([{"image_id": 1, "caption": None}], "entry 0.*caption"),
    ],
)
def test_bad_result_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"p.json.*{message}"):
        read_coco_results(write(tmp_path / "p.json", content))


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: not a JSON file"):
        read_coco_results(broken)


# ----------------------------------------------------------------------------------------------- the real captions


def leave_last_out(annotations: Sequence[dict[str, Any]]) -> tuple[dict[Hashable, list[str]], dict[Hashable, str]]:
    groups: dict[int, list[str]] = {}
    for entry in sorted(annotations, key=lambda entry: (entry["image_id"], entry["id"])):
        groups.setdefault(entry["image_id"], []).append(entry["caption"])
    return {k: v[:-1] for k, v in groups.items()}, {k: v[-1] for k, v in groups.items()}


def test_coco_val2017_scores_are_those_of_the_reference_scorer() -> None:
    folder = SHARED / "data" / "metrics"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set TRIPTYCH_SHARED to the shared data folder")
    content = json.loads((folder / "coco_captions_val2017.json").read_text(encoding="utf-8"))
    expected = json.loads((folder / "expected.json").read_text())["coco_val2017_human_leave_one_out"]
    references, predictions = leave_last_out(content["annotations"])
    scores = score_captions(references, predictions)
    assert len(predictions) == 5000
    assert [scores[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected["BLEU"], abs=1e-9)
    assert scores["CIDEr"] == pytest.approx(expected["CIDEr_D"], abs=1e-9)
    assert scores["ROUGE_L"] == pytest.approx(expected["ROUGE_L"], abs=1e-5)
