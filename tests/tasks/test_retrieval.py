"""Retrieval: what is encoded, ranking by embeddings, re-ranking, and recalls against a brute-force ranking."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from triptych.data.samples import Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug
from triptych.tasks.retrieval import Collection, RetrievalConfig, encode_collection, evaluate_retrieval, pairs_to_match

PIXELS = Preprocessing(16, HALF, HALF)
WORDS = ("red", "blue", "green", "small", "large", "star", "circle", "square")
PICTURES, CAPTIONS = 9, 2
CONFIG = RetrievalConfig(candidates=4, batch=7)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([" ".join(WORDS)] * 3, 80)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    return build_model(tokenizer)


def pictures() -> Iterator[tuple[list[Record], Tensor]]:
    """Nine pictures with two captions each, in batches of four."""
    generator = torch.Generator().manual_seed(1)
    pixels_BCHW = torch.randint(0, 256, (PICTURES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    texts = [f"{WORDS[i % 8]} {WORDS[i // 8]}" + " star" * (i % 3) for i in range(PICTURES * CAPTIONS)]  # all different
    records = [Record(str(i), None, tuple(texts[CAPTIONS * i : CAPTIONS * (i + 1)]), str(i)) for i in range(PICTURES)]
    for start in range(0, PICTURES, 4):
        yield records[start : start + 4], pixels_BCHW[start : start + 4]


@pytest.fixture(scope="module")
def collection(model: MPlug, tokenizer: Tokenizer) -> Collection:
    return encode_collection(model, tokenizer, PIXELS, pictures(), CONFIG)


def match_all(model: MPlug, tokenizer: Tokenizer, collection: Collection) -> Tensor:
    """[texts, pictures]: the matching score of every pair, one at a time."""
    pixels_BCHW = PIXELS.normalize(torch.cat([pixels for _, pixels in pictures()]))
    rows = []
    with torch.inference_mode():
        for text in collection.text:
            encoded = model.encode_text(*tokenizer.encode_batch([text], max_length=None, end=False))
            images = [model.encode_image(pixels_BCHW[i : i + 1]) for i in range(PICTURES)]
            rows.append([float(model.match_logits(model.fuse(image, encoded).pooled_BP)[0, 1]) for image in images])
    return torch.tensor(rows)


def recalls(scores_TI: Tensor, owners: np.ndarray) -> dict[str, float]:
    """Recalls by sorting everything."""
    found: dict[str, float] = {}
    rank_T = (scores_TI > scores_TI[torch.arange(len(owners)), owners][:, None]).sum(1)
    best_I = [max(float(scores_TI[t, i]) for t in np.flatnonzero(owners == i)) for i in range(scores_TI.shape[1])]
    rank_I = (scores_TI > torch.tensor(best_I)).sum(0)
    for k in (1, 5, 10):
        found[f"t2i_r{k}"] = 100 * float((rank_T < k).float().mean())
        found[f"i2t_r{k}"] = 100 * float((rank_I < k).float().mean())
    return found


def test_everything_is_encoded_once(collection: Collection) -> None:
    assert len(collection.records) == PICTURES
    assert len(collection.text) == PICTURES * CAPTIONS
    assert collection.image_of_text_T.tolist() == [i for i in range(PICTURES) for _ in range(CAPTIONS)]
    torch.testing.assert_close(collection.image_IE.norm(dim=1), torch.ones(PICTURES))
    assert sum(len(chunk) for chunk in collection.images) == PICTURES


def test_ranking_by_embeddings_alone(model: MPlug, collection: Collection) -> None:
    report = evaluate_retrieval(model, collection, dataclasses.replace(CONFIG, candidates=0))
    expected = recalls(collection.text_TE @ collection.image_IE.T, collection.image_of_text_T)
    for name in ("t2i_r1", "t2i_r5", "i2t_r1", "i2t_r5"):
        assert report.scores[name] == pytest.approx(expected[name]), name


def test_reranking_everything_is_ranking_by_matching(
    model: MPlug, tokenizer: Tokenizer, collection: Collection
) -> None:
    config = dataclasses.replace(CONFIG, candidates=100)
    report = evaluate_retrieval(model, collection, config)
    scores_TI = match_all(model, tokenizer, collection)
    for name, value in recalls(scores_TI, collection.image_of_text_T).items():
        assert report.scores[name] == pytest.approx(value), name
    assert (report.images_of_text[:, 0] == scores_TI.argmax(1).numpy()).all()
    assert (report.texts_of_image[:, 0] == scores_TI.argmax(0).numpy()).all()


def test_reranking_orders_the_nearest_only(model: MPlug, tokenizer: Tokenizer, collection: Collection) -> None:
    counted: list[int] = []
    report = evaluate_retrieval(model, collection, CONFIG, counted.append)
    assert sum(counted) == pairs_to_match(collection, CONFIG) == 18 * 4 + 9 * 4
    similarity_TI = collection.text_TE @ collection.image_IE.T
    nearest_TK = similarity_TI.topk(4, dim=1).indices
    matching_TI = match_all(model, tokenizer, collection)
    for text, images in enumerate(report.images_of_text.tolist()):
        assert set(images) == set(nearest_TK[text].tolist())
        assert images == sorted(images, key=lambda image: -float(matching_TI[text, image]))


def test_the_similarity_can_be_added(model: MPlug, tokenizer: Tokenizer, collection: Collection) -> None:
    config = dataclasses.replace(CONFIG, candidates=100, add_similarity=True)
    report = evaluate_retrieval(model, collection, config)
    total_TI = match_all(model, tokenizer, collection) + collection.text_TE @ collection.image_IE.T
    assert (report.images_of_text[:, 0] == total_TI.argmax(1).numpy()).all()


@pytest.mark.parametrize("candidates", [0, 4])
def test_bf16_does_not_coarsen_the_similarity(model: MPlug, tokenizer: Tokenizer, candidates: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encode_collection(model, tokenizer, PIXELS, pictures(), CONFIG)
        report = evaluate_retrieval(model, encoded, dataclasses.replace(CONFIG, candidates=candidates))
    nearest_TK = (encoded.text_TE @ encoded.image_IE.T).topk(4, dim=1).indices
    found_TK = np.sort(report.images_of_text[:, :4])
    assert (found_TK == nearest_TK.sort(dim=1).values.numpy()).all()


def test_grey_pictures_tell_nothing(model: MPlug, tokenizer: Tokenizer) -> None:
    encoded = encode_collection(model, tokenizer, PIXELS, pictures(), CONFIG, blank=True)
    torch.testing.assert_close(encoded.image_IE, encoded.image_IE[:1].expand_as(encoded.image_IE))
    report = evaluate_retrieval(model, encoded, CONFIG)
    assert report.scores["t2i_r1"] == 0  # ties count against the model


def test_nothing_to_retrieve_is_an_error(model: MPlug, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        encode_collection(model, tokenizer, PIXELS, iter(()), CONFIG)


def test_shared_scores_are_those_of_one_matrix(model: MPlug, tokenizer: Tokenizer, collection: Collection) -> None:
    """As BridgeTower: what neither direction matched scores less than anything, and one matrix serves both."""
    config = dataclasses.replace(CONFIG, candidates=3, shared_scores=True)
    similarity_TI = collection.text_TE @ collection.image_IE.T
    images_TK, texts_IK = similarity_TI.topk(3, dim=1).indices, similarity_TI.T.topk(3, dim=1).indices
    seen_TI = torch.zeros_like(similarity_TI, dtype=torch.bool).scatter(1, images_TK, True)
    seen_TI |= torch.zeros_like(similarity_TI.T, dtype=torch.bool).scatter(1, texts_IK, True).T
    scores_TI = match_all(model, tokenizer, collection)
    owners_T = collection.image_of_text_T
    text_hits = [
        bool(seen_TI[t, owner]) and int(((scores_TI[t] >= scores_TI[t, owner]) & seen_TI[t]).sum()) == 1
        for t, owner in enumerate(owners_T)
    ]
    report = evaluate_retrieval(model, collection, config)
    assert report.scores["t2i_r1"] == pytest.approx(100 * np.mean(text_hits))
    own_I = [np.flatnonzero(owners_T == i) for i in range(PICTURES)]
    image_hits = [
        any(bool(seen_TI[t, i]) and scores_TI[t, i] == scores_TI[seen_TI[:, i], i].max() for t in own_I[i])
        for i in range(PICTURES)
    ]
    assert report.scores["i2t_r1"] == pytest.approx(100 * np.mean(image_hits))
