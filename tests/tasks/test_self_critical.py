"""Self-critical training: the gradient against a search with gradients, rewards, settings, and that it helps."""

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.configs import from_json, to_json
from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.samples import BrokenSample, Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch, Sampling
from triptych.metrics.captions import CiderD
from triptych.models.mplug import MPlug
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.self_critical import ReferencedBatch, SelfCritical, SelfCriticalConfig
from triptych.training.loop import TrainConfig, Trainer
from triptych.training.optim import OptimConfig
from triptych.training.parallel import set_checkpointing

PIXELS = Preprocessing(16, HALF, HALF)
REFERENCES = (("a red circle", "the circle is red"), ("two large blue stars",), ("a green square", "one square"))
CORPUS = [
    Record(str(n), b"", captions, str(n)) for n, captions in enumerate((*REFERENCES, ("a star",), ("two stars",)))
]
SEARCH = BeamSearch(3, 2, 6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([text for record in CORPUS for text in record.captions] * 3, 70)


@pytest.fixture
def model(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    model = build_model(tokenizer)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # candidates that differ from picture to picture
        words = [index for text in ("a", "red", "circle", "two", "stars") for index in ids_of(tokenizer, text)]
        model.decoder.head.bias[words] += 4
    return model


@pytest.fixture
def batch() -> ReferencedBatch:
    torch.manual_seed(1)
    return ReferencedBatch(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), REFERENCES)


@pytest.fixture
def make(model: MPlug, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., SelfCritical]:
    """A task in evaluation mode, that is without dropout, that has studied the corpus."""

    def build(context: str = "image", prompt: str = "", **changes: Any) -> SelfCritical:
        captioning = CaptioningConfig(context, prompt, SEARCH)  # type: ignore[arg-type]
        config = SelfCriticalConfig(captioning, **{"explore": SEARCH, **changes})
        task = SelfCritical(model, tokenizer, PIXELS, config).eval()
        task.study(CORPUS, tmp_path / "frequencies.json.gz")
        return task

    return build


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text], max_length=None, end=False)[0][0, 1:].tolist()


def gradients(task: SelfCritical, loss: Tensor) -> dict[str, Tensor]:
    task.zero_grad()
    loss.backward()
    return {name: own.grad.clone() for name, own in task.named_parameters() if own.grad is not None}


def search_with_gradients(task: SelfCritical, pixels: Tensor) -> list[tuple[list[int], Tensor]]:
    """Beams of one picture and their summed log-probabilities, with the graph of every step; nothing is cached."""
    memory = task.model.encode_image(PIXELS.normalize(pixels))
    decoder, eos, penalty = task.model.decoder, task.special.eos, SEARCH.penalty
    beams: list[tuple[list[int], Tensor, float]] = [([task.special.bos], torch.zeros(()), 0.0)]
    for step in range(1, SEARCH.max_length + 1):
        found = []
        for ids, total, score in beams:
            if ids[-1] == eos:
                found.append((ids, total, score))
                continue
            log_prob_V = decoder.logits(decoder(torch.tensor([ids]), memory)[0, -1]).log_softmax(-1)
            for token, gained in enumerate(log_prob_V):
                if token != eos or step > SEARCH.min_length:
                    after = total + gained
                    found.append(([*ids, token], after, after.item() / penalty(step)))
        beams = sorted(found, key=lambda beam: -beam[2])[: SEARCH.beams]
    return [(ids, total) for ids, total, _ in beams]


def cider(task: SelfCritical, ids: list[int], picture: int, start: int = 1) -> float:
    """Of one candidate, with the scorer of the evaluation on the whole corpus."""
    scorer = CiderD({record.image_id: record.captions for record in CORPUS})
    return float(scorer.scores([str(picture)], [task.tokenizer.decode(ids[start:])])[0])


def test_the_gradient_is_that_of_a_search_with_gradients(
    make: Callable[..., SelfCritical], batch: ReferencedBatch
) -> None:
    task = make()
    terms, rewards = [], []
    for picture in range(3):
        beams = search_with_gradients(task, batch.pixels[picture : picture + 1])
        own = [cider(task, ids, picture) for ids, _ in beams]
        rewards += own
        for (ids, total), reward in zip(beams, own, strict=True):
            score = total / ((5 + len(ids) - 1) / 6) ** 0.6
            terms.append(-(score / len(ids)) * (reward - sum(own) / 3))
    slow = gradients(task, torch.stack(terms).mean())
    loss = task(batch)["self_critical"]
    quick = gradients(task, loss)
    assert len(set(rewards)) > 3  # or there would be nothing to compare
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-6)
    assert task.measures["reward"].item() == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
    assert quick.keys() == slow.keys()
    assert any(name.startswith("model.vision") for name in quick)
    for name, grad in slow.items():
        torch.testing.assert_close(quick[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("normalise", ["official", "sum", "mean"])
@pytest.mark.parametrize("baseline", ["mean", "others", "greedy"])
def test_baselines_and_normalisations(
    make: Callable[..., SelfCritical], batch: ReferencedBatch, baseline: str, normalise: str
) -> None:
    task = make(baseline=baseline, normalise=normalise)
    memory = task.model.encode_image(PIXELS.normalize(batch.pixels))
    greedy = Captioning(task.model, task.tokenizer, PIXELS, CaptioningConfig(search=BeamSearch(1, 2, 6)))
    terms = []
    for picture, found in enumerate(task.hypotheses(batch.pixels)):
        rewards = [cider(task, hypothesis.ids, picture) for hypothesis in found]
        first = greedy.hypotheses(batch.pixels[picture : picture + 1])[0][0]
        for index, hypothesis in enumerate(found):
            others = [reward for other, reward in enumerate(rewards) if other != index]
            choices = {"mean": sum(rewards) / 3, "others": sum(others) / 2, "greedy": cider(task, first.ids, picture)}
            ids_1L, t = torch.tensor([hypothesis.ids]), len(hypothesis.ids) - 1
            hidden_LD = task.model.decoder(ids_1L[:, :-1], memory.rows(slice(picture, picture + 1)))[0]
            total = -F.cross_entropy(task.model.decoder.logits(hidden_LD), ids_1L[0, 1:], reduction="sum")
            divisor = {"official": ((5 + t) / 6) ** 0.6 * (t + 1), "sum": 1, "mean": t}[normalise]
            terms.append(-total / divisor * (rewards[index] - choices[baseline]))
    assert task(batch)["self_critical"].item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)


@pytest.mark.parametrize("context", ["image", "fused"])
def test_samples_and_a_prompt(make: Callable[..., SelfCritical], batch: ReferencedBatch, context: str) -> None:
    task = make(context, "a picture of", explore=Sampling(1, 5, top_p=1.0), count=4, baseline="others")
    memory = task._memory(PIXELS.normalize(batch.pixels))
    torch.manual_seed(3)
    ids_R = task.explore(memory)
    begin = [task.special.bos, *(ids_of(task.tokenizer, "a picture of") if context == "image" else [])]
    assert len(ids_R) == 12
    assert all(ids[: len(begin)] == begin and 1 <= len(ids) - len(begin) <= 5 for ids in ids_R)
    assert len({tuple(ids) for ids in ids_R}) > 6
    expected = [cider(task, ids, row // 4, len(begin)) for row, ids in enumerate(ids_R)]
    assert task.rewards(ids_R, REFERENCES).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    terms = []
    for row, ids in enumerate(ids_R):
        decoder, own, t = task.model.decoder, memory.rows(slice(row // 4, row // 4 + 1)), len(ids) - len(begin)
        logits_LV = decoder.logits(decoder(torch.tensor([ids[:-1]]), own)[0, len(begin) - 1 :])
        total = -F.cross_entropy(logits_LV, torch.tensor(ids[len(begin) :]), reduction="sum")
        terms.append(total / (((5 + t) / 6) ** 0.6 * len(ids)))
    torch.testing.assert_close(task.scores(ids_R, memory), torch.stack(terms), rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    task.model.train_only(*task.uses)
    task(batch)["self_critical"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_autocast_and_recomputation_leave_the_gradient(
    make: Callable[..., SelfCritical], batch: ReferencedBatch
) -> None:
    task = make()
    exact = gradients(task, task(batch)["self_critical"])
    set_checkpointing(task, True)
    again = gradients(task, task(batch)["self_critical"])
    set_checkpointing(task, False)
    for name, grad in exact.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-8, msg=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids_R = task.explore(task._memory(PIXELS.normalize(batch.pixels)))
        memory = task._memory(PIXELS.normalize(batch.pixels))
        rough = gradients(task, task.scores(ids_R, memory).sum())
    exact = gradients(task, task.scores(ids_R, task._memory(PIXELS.normalize(batch.pixels))).sum())
    assert rough.keys() == exact.keys()
    for name in ("model.decoder.head.transform.weight", "model.decoder.blocks.0.ffn.expand.weight"):
        assert F.cosine_similarity(rough[name].flatten(), exact[name].flatten(), dim=0) > 0.99, name


def test_the_search_is_not_disturbed_by_training(make: Callable[..., SelfCritical], batch: ReferencedBatch) -> None:
    task = make().train()
    ids_R = task.explore(task.model.encode_image(PIXELS.normalize(batch.pixels)))
    assert task.model.decoder.training
    assert ids_R == task.explore(task.model.encode_image(PIXELS.normalize(batch.pixels)))  # no dropout in the decoder


def test_a_batch_has_all_references(make: Callable[..., SelfCritical]) -> None:
    pipeline = make().training_pipeline(lambda image: torch.zeros(3, 16, 16, dtype=torch.uint8), 1, 1)
    image = gzip.decompress(PICTURE)
    examples = [pipeline.prepare(Record("k", image, ("A Dog.", "two"), "7"), 0) for _ in range(2)]
    made = pipeline.collate(examples).to("cpu")
    assert made.references == (("A Dog.", "two"), ("A Dog.", "two"))
    assert len(made) == 2
    with pytest.raises(BrokenSample, match="k: it has no caption"):
        pipeline.prepare(Record("k", image, (), "7"), 0)


PICTURE = gzip.compress(b"P6 1 1 255\n\x00\x00\x00")


# ------------------------------------------------------------------------------------------------- what it is told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "median"}, "baseline must be one of mean, others, greedy, not 'median'"),
        ({"normalise": "length"}, "normalise must be one of official, sum, mean, not 'length'"),
        ({"explore": Sampling(seed=3)}, "explore.seed 3 .* leave it None"),
        ({"explore": BeamSearch(1)}, "'mean' needs at least 2 candidates, not 1"),
        ({"explore": Sampling(), "count": 0, "baseline": "greedy"}, "'greedy' needs at least 1 candidates, not 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfCriticalConfig(**changes)


def test_more_beams_than_words(model: MPlug, tokenizer: Tokenizer) -> None:
    config = SelfCriticalConfig(explore=BeamSearch(200, 1, 4))
    with pytest.raises(ValueError, match=f"200 beams for a vocabulary of {tokenizer.vocab_size} words"):
        SelfCritical(model, tokenizer, PIXELS, config)


@pytest.mark.parametrize("explore", [BeamSearch(3, 1, 9), Sampling(2, 9)])
def test_settings_survive_json(explore: BeamSearch | Sampling) -> None:
    config = SelfCriticalConfig(CaptioningConfig("fused"), explore, baseline="others")
    assert from_json(SelfCriticalConfig, json.loads(json.dumps(to_json(config))), "here") == config


def test_the_result_is_a_captioner(make: Callable[..., SelfCritical], batch: ReferencedBatch) -> None:
    task = make(prompt="a")
    assert task.name == "caption"
    assert task.own_state() == {}
    settings = from_json(CaptioningConfig, to_json(task.config), "here")
    assert Captioning(task.model, task.tokenizer, PIXELS, settings).caption(batch.pixels) == task.caption(batch.pixels)


# -------------------------------------------------------------------------------------------- document frequencies


def test_the_training_data_are_studied_once(
    make: Callable[..., SelfCritical], batch: ReferencedBatch, tmp_path: Path
) -> None:
    task, file = make(), tmp_path / "own.gz"
    task.study((record for record in (*CORPUS, Record("none", b"", (), "none"))), file)
    assert task.frequencies is not None
    assert task.frequencies.pictures == len(CORPUS)
    rewards = task(batch), task.measures["reward"]
    resumed = make()
    resumed.study(iter(()), file)  # what a resumed run reads is the file
    assert (resumed(batch), resumed.measures["reward"]) == rewards


def test_data_that_cannot_be_studied(make: Callable[..., SelfCritical], batch: ReferencedBatch, tmp_path: Path) -> None:
    task = make()
    with pytest.raises(ValueError, match="9: a second record of the picture '1'"):
        task.study([*CORPUS, Record("9", b"", ("a",), "1")], tmp_path / "twice.gz")
    with pytest.raises(ValueError, match="no pictures"):
        task.study([Record("9", b"", (), "1")], tmp_path / "none.gz")
    assert not list(tmp_path.glob("twice*")) + list(tmp_path.glob("none*"))
    task.frequencies = None
    with pytest.raises(ValueError, match="call study"):
        task(batch)


# ----------------------------------------------------------------------------------------------------- that it helps

NOUNS = ("circle", "square", "star", "cross")


def expected_reward(task: SelfCritical, batch: ReferencedBatch) -> float:
    """Mean over 50 samples of each picture."""
    torch.manual_seed(5)
    with torch.no_grad():
        memory = task.eval()._memory(PIXELS.normalize(batch.pixels))
        many = dataclasses.replace(task.self_critical, explore=Sampling(1, 4, top_p=1.0), count=50)
        task.self_critical, own = many, task.self_critical
        rewards = task.rewards(task.explore(memory), batch.references)
        task.self_critical = own
    return float(rewards.mean())


@pytest.mark.parametrize(
    "settings",
    [
        {"explore": BeamSearch(4, 1, 4)},
        {"explore": Sampling(1, 4, top_p=1.0), "count": 8, "baseline": "others", "normalise": "sum"},
    ],
    ids=["official", "samples"],
)
def test_captions_become_better(
    build_model: Callable[[Tokenizer], MPlug], tmp_path: Path, settings: dict[str, Any]
) -> None:
    texts = [f"a {noun}" for noun in NOUNS]
    tokenizer = train_wordpiece(texts * 3, 60)
    pixels = torch.stack([torch.full((3, 16, 16), 80 * n, dtype=torch.uint8) for n in range(4)])
    batch = ReferencedBatch(pixels, tuple((text,) for text in texts))
    task = SelfCritical(build_model(tokenizer), tokenizer, PIXELS, SelfCriticalConfig(**settings)).train()
    task.study([Record(text, b"", (text,), text) for text in texts], tmp_path / "f.gz")
    optimizer = torch.optim.Adam(task.parameters(), 0.01)
    for step in range(40):  # it learns what captions are like, of pictures shuffled against them
        words = Tokens(*tokenizer.encode_batch([texts[(n + step) % 4] for n in range(4)], max_length=None, end=True))
        loss = Captioning.forward(task, ImageTextBatch(pixels, words, torch.arange(4)))["caption"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = expected_reward(task, batch)
    optimizer = torch.optim.Adam(task.parameters(), 0.006)
    for step in range(60):
        torch.manual_seed(step)
        loss = task.train()(batch)["self_critical"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert expected_reward(task, batch) > before + 0.5


class Again:
    """The same batch for ever."""

    skipped_count = 0

    def __init__(self, batch: ReferencedBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[ReferencedBatch]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_the_reward_is_in_the_log(make: Callable[..., SelfCritical], batch: ReferencedBatch, tmp_path: Path) -> None:
    task = make()
    task.model.train_only(*task.uses)
    config = TrainConfig(steps=2, batch_size=3, accumulate=2, precision="fp32", ema=0.5)
    Trainer(task, Again(batch), tmp_path / "run", config, OptimConfig(lr=1e-3, vision_lr=None)).run()
    first, second = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["loss"] == first["losses"]["self_critical"]
    assert 0 < first["reward"] < 10
    assert second["reward"] == pytest.approx(float(task.measures["reward"]), rel=0.5)
