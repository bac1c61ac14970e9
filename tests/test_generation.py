"""Searches are compared with plain loops over a teacher-forced decoder, and with trying every sequence there is.

Shape legend: B batch, M memory length, L length, D width, V vocabulary.
"""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych import generation
from triptych.generation import BeamSearch, Hypothesis, Sampling, SpecialIds, generate
from triptych.models.protocol import Encoded
from triptych.models.text import TextConfig, TextDecoder

PAD, BOS, EOS = 0, 1, 2
SPECIAL = SpecialIds(bos=BOS, eos=EOS, pad=PAD)
D, M = 16, 5


def tiny_decoder(vocab: int = 12, end_bias: float = 0.0, layers: int = 2, seed: int = 6) -> TextDecoder:
    """Random weights large enough for uneven distributions; ``end_bias`` makes texts shorter."""
    torch.manual_seed(seed)
    text = TextConfig(vocab_size=vocab, width=D, heads=2, ffn=24, max_positions=32)
    decoder = TextDecoder(text, layers).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
        decoder.head.bias[EOS] += end_bias
    return decoder


def tiny_memory(batch: int, seed: int = 0, masked: bool = True) -> Encoded:
    torch.manual_seed(100 + seed)
    mask_BM = torch.rand(batch, M) < 0.6 if masked else None
    if mask_BM is not None:
        mask_BM[:, 0] = True
    return Encoded(torch.randn(batch, M, D), mask_BM)


def log_probs(decoder: TextDecoder, memory: Encoded, ids: list[int]) -> list[float]:
    """Of the token after ``ids``, for a memory of one row, by running the whole text."""
    with torch.no_grad():
        logits_1LV = decoder.logits(decoder(torch.tensor([ids]), memory))
    return logits_1LV[0, -1].log_softmax(-1).tolist()


def row(memory: Encoded, index: int) -> Encoded:
    return memory.rows(slice(index, index + 1))


def assert_equal(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float = 1e-4) -> None:
    assert [[h.ids for h in hypotheses] for hypotheses in found] == [[h.ids for h in row] for row in expected]
    for hypotheses, wanted in zip(found, expected, strict=True):
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in wanted], abs=tolerance)


def naive_frozen(
    decoder: TextDecoder, memory: Encoded, search: BeamSearch, prompt: tuple[int, ...] = (BOS,)
) -> list[Hypothesis]:
    """Beam search of one row, beam by beam; finished beams stay as they are."""
    beams = [(list(prompt), 0.0, 0.0, False)]  # ids, sum, score, finished
    for step in range(1, search.max_length + 1):
        candidates = []
        for ids, total, score, finished in beams:
            if finished:
                candidates.append((ids, total, score, True))
                continue
            for token, gained in enumerate(log_probs(decoder, memory, ids)):
                if token == EOS and step <= search.min_length:
                    continue
                new = total + gained
                candidates.append(([*ids, token], new, new / ((5 + step) / 6) ** search.length_penalty, token == EOS))
        beams = sorted(candidates, key=lambda beam: -beam[2])[: search.beams]
        if all(finished for *_, finished in beams):
            break
    return [Hypothesis(ids, score) for ids, _, score, _ in beams]


def naive_official(
    decoder: TextDecoder, memory: Encoded, search: BeamSearch, prompt: tuple[int, ...] = (BOS,)
) -> list[Hypothesis]:
    """Specification 3.3 in plain loops: a beam that ends is noted down and extended all the same."""
    beams, found = [(list(prompt), 0.0)], []
    for step in range(search.max_length):
        candidates = []
        for ids, total in beams:
            for token, gained in enumerate(log_probs(decoder, memory, ids)):
                if not (token == EOS and step < search.min_length):
                    candidates.append(([*ids, token], total + gained))
        beams = sorted(candidates, key=lambda beam: -beam[1])[: search.beams]
        last = step == search.max_length - 1
        over = last or beams[0][0][-1] == EOS
        for ids, total in beams:
            if over or ids[-1] == EOS:
                found.append(Hypothesis(ids, total / ((5 + step + 1) / 6) ** search.length_penalty))
        if over:
            break
    return sorted(found, key=lambda hypothesis: -hypothesis.score)[: search.beams]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rule", ["frozen", "official"])
@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("prompt", [None, (BOS, 7), (BOS, 5, EOS, 3)])
def test_beam_search_equals_a_plain_loop(beams: int, rule: str, prompt: tuple[int, ...] | None, cached: bool) -> None:
    """Rows end at different steps; a row's result must be that of the row alone."""
    decoder, memory = tiny_decoder(end_bias=2.0), tiny_memory(6)
    search = BeamSearch(beams=beams, max_length=7, rule=rule)
    naive = naive_frozen if rule == "frozen" else naive_official
    expected = [naive(decoder, row(memory, index), search, prompt or (BOS,)) for index in range(6)]
    prompt_BL = None if prompt is None else torch.tensor([prompt] * 6)
    found = generate(decoder, memory, search, SPECIAL, prompt_BL=prompt_BL, cached=cached)
    assert_equal(found, expected)
    assert len({len(hypotheses[0].ids) for hypotheses in found}) > 1, "all rows ended together: nothing was tested"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    beams=st.integers(1, 6),
    lengths=st.tuples(st.integers(0, 3), st.integers(1, 6)),
    penalty=st.sampled_from([0.0, 0.6, 2.0]),
    end_bias=st.floats(-2, 4),
    rule=st.sampled_from(["frozen", "official"]),
    batch=st.integers(1, 4),
)
def test_cached_equals_uncached(
    seed: int, beams: int, lengths: tuple[int, int], penalty: float, end_bias: float, rule: str, batch: int
) -> None:
    decoder, memory = tiny_decoder(vocab=9, end_bias=end_bias, layers=1, seed=seed), tiny_memory(batch, seed)
    search = BeamSearch(beams, min(lengths), max(lengths), penalty, rule=rule)
    cached = generate(decoder, memory, search, SPECIAL)
    assert_equal(cached, generate(decoder, memory, search, SPECIAL, cached=False))
    assert len(cached) == batch
    for hypotheses in cached:
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert 1 <= len(hypotheses) <= beams
        assert all(math.isfinite(score) for score in scores)
        assert all(hypothesis.ids[0] == BOS for hypothesis in hypotheses)


@pytest.mark.parametrize("rule", ["frozen", "official"])
def test_rows_do_not_depend_on_the_others(rule: str) -> None:
    decoder, memory = tiny_decoder(end_bias=2.0), tiny_memory(5)
    search = BeamSearch(beams=3, max_length=8, rule=rule)
    together = generate(decoder, memory, search, SPECIAL)
    alone = [generate(decoder, row(memory, index), search, SPECIAL)[0] for index in range(5)]
    assert_equal(together, alone)
    order = [3, 0, 4, 4, 1]
    assert_equal(generate(decoder, memory.rows(torch.tensor(order)), search, SPECIAL), [together[i] for i in order])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rule", ["frozen", "official"])
def test_greedy_takes_the_likeliest_token_every_time(rule: str, cached: bool) -> None:
    decoder, memory = tiny_decoder(end_bias=1.0), tiny_memory(6)
    found = generate(decoder, memory, BeamSearch(beams=1, max_length=9, rule=rule), SPECIAL, cached=cached)
    for index, (hypothesis,) in enumerate(found):
        ids, total = [BOS], 0.0
        while len(ids) < 10 and (len(ids) == 1 or ids[-1] != EOS):
            scores = log_probs(decoder, row(memory, index), ids)
            if len(ids) == 1:
                scores[EOS] = -math.inf
            best = max(range(len(scores)), key=scores.__getitem__)
            ids, total = [*ids, best], total + scores[best]
        assert hypothesis.ids == ids
        assert hypothesis.score == pytest.approx(total / ((5 + len(ids) - 1) / 6) ** 0.6, abs=1e-4)


def every_sequence(decoder: TextDecoder, memory: Encoded, search: BeamSearch, vocab: int) -> list[Hypothesis]:
    """All texts of at most ``max_length`` tokens: those that end, and those that are cut off."""
    found = []
    words = [token for token in range(vocab) if token != EOS]
    for length in range(search.max_length + 1):
        for body in itertools.product(words, repeat=length):
            if length == search.max_length:
                text = [BOS, *body]
            elif length >= search.min_length:
                text = [BOS, *body, EOS]
            else:
                continue
            ids_1L = torch.tensor([text])
            with torch.no_grad():
                table_LV = decoder.logits(decoder(ids_1L[:, :-1], memory))[0].log_softmax(-1)
            total = float(table_LV.gather(1, ids_1L[0, 1:, None]).sum())
            tokens = len(text) - 1
            found.append(Hypothesis(text, total / ((5 + tokens) / 6) ** search.length_penalty))
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


@pytest.mark.parametrize(("length_penalty", "min_length"), [(0.0, 0), (0.6, 1), (3.0, 1), (1.0, 2)])
@pytest.mark.parametrize("cached", [True, False])
def test_enough_beams_find_the_best_of_all_sequences(length_penalty: float, min_length: int, cached: bool) -> None:
    """With room for every sequence the search is exhaustive, so its whole ranking must be right, not the best alone."""
    vocab = 5
    decoder, memory = tiny_decoder(vocab, end_bias=0.5, layers=1), tiny_memory(2)
    search = BeamSearch(beams=4**4 * 2, min_length=min_length, max_length=4, length_penalty=length_penalty)
    found = generate(decoder, memory, search, SPECIAL, cached=cached)
    for index in range(2):
        expected = every_sequence(decoder, row(memory, index), search, vocab)
        assert len(found[index]) == len(expected)
        assert [h.score for h in found[index]] == pytest.approx([h.score for h in expected], abs=1e-4)
        assert found[index][0].ids == expected[0].ids
        assert {tuple(h.ids) for h in found[index]} == {tuple(h.ids) for h in expected}


def test_more_beams_than_tokens_are_no_trouble() -> None:
    decoder, memory = tiny_decoder(vocab=4), tiny_memory(2)
    for rule in ("frozen", "official"):
        found = generate(decoder, memory, BeamSearch(beams=9, min_length=2, max_length=3, rule=rule), SPECIAL)
        assert all(math.isfinite(hypothesis.score) for hypotheses in found for hypothesis in hypotheses)


def words_follow_the_end(found: list[list[Hypothesis]]) -> bool:
    return any(EOS in h.ids[1:-1] for hypotheses in found for h in hypotheses)


def test_only_the_official_rule_extends_finished_beams() -> None:
    seen = {"frozen": False, "official": False}
    for seed in range(10):
        decoder, memory = tiny_decoder(end_bias=1.5, layers=1, seed=seed), tiny_memory(3, seed)
        for rule in seen:
            seen[rule] |= words_follow_the_end(generate(decoder, memory, BeamSearch(4, 1, 8, rule=rule), SPECIAL))
    assert seen == {"frozen": False, "official": True}


@pytest.mark.parametrize("rule", ["frozen", "official"])
@pytest.mark.parametrize(("minimum", "maximum"), [(0, 1), (0, 6), (3, 6), (5, 5)])
def test_lengths_are_kept(minimum: int, maximum: int, rule: str) -> None:
    """``minimum`` tokens before an end token may come, ``maximum`` tokens with it."""
    search = BeamSearch(4, minimum, maximum, rule=rule)
    lengths = set()
    for end_bias in (20.0, -20.0):
        decoder = tiny_decoder(end_bias=end_bias)
        for hypotheses in generate(decoder, tiny_memory(3), search, SPECIAL):
            best = hypotheses[0].ids[1:]
            lengths.add(len(best))
            assert len(best) <= maximum
            assert EOS not in best[:minimum]
            assert (best[-1] == EOS) == (end_bias > 0 and minimum < maximum)
    assert lengths == {min(minimum + 1, maximum), maximum}


def test_a_larger_length_penalty_prefers_longer_texts() -> None:
    decoder, memory = tiny_decoder(end_bias=1.0), tiny_memory(12)

    def mean_length(length_penalty: float) -> float:
        found = generate(decoder, memory, BeamSearch(6, 1, 10, length_penalty), SPECIAL)
        return sum(len(hypotheses[0].ids) for hypotheses in found) / 12

    assert mean_length(-2.0) <= mean_length(0.6) < mean_length(4.0)
    assert BeamSearch(length_penalty=0.6).penalty(7) == pytest.approx(2**0.6)


@pytest.mark.parametrize("search", [BeamSearch(3, 1, 6), BeamSearch(3, 1, 6, rule="official"), Sampling(1, 6, seed=5)])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_of_the_memory_changes_nothing(search: BeamSearch | Sampling, cached: bool) -> None:
    decoder, memory = tiny_decoder(end_bias=1.0), tiny_memory(4)
    padded = memory.pad(M + 4)
    padded.hidden_BLD[:, M:] = 5 * torch.randn(4, 4, D)
    expected = generate(decoder, memory, search, SPECIAL, cached=cached)
    assert_equal(generate(decoder, padded, search, SPECIAL, cached=cached), expected)
    unmasked = dataclasses.replace(padded, mask_BL=None)
    assert generate(decoder, unmasked, search, SPECIAL, cached=cached) != expected


@pytest.mark.parametrize("search", [BeamSearch(2, 1, 5), BeamSearch(2, 1, 5, rule="official"), Sampling(1, 5)])
def test_an_empty_batch_gives_nothing(search: BeamSearch | Sampling) -> None:
    assert generate(tiny_decoder(), tiny_memory(0), search, SPECIAL) == []


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("cached", [True, False])
def test_bf16(how: str, cached: bool) -> None:
    decoder, memory = tiny_decoder(end_bias=1.0), tiny_memory(4)
    search = BeamSearch(1, 1, 6)
    expected = generate(decoder, memory, search, SPECIAL)
    if how == "weights":
        found = generate(decoder.to(torch.bfloat16), memory.to(torch.bfloat16), search, SPECIAL, cached=cached)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = generate(decoder, memory, search, SPECIAL, cached=cached)
    assert all(math.isfinite(hypothesis.score) for (hypothesis,) in found)
    agreeing = sum(a[0].ids == b[0].ids for a, b in zip(found, expected, strict=True))
    assert agreeing >= 2
    for (ours,), (wanted,) in zip(found, expected, strict=True):
        if ours.ids == wanted.ids:
            assert ours.score == pytest.approx(wanted.score, abs=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_decoder_is_restored(training: bool) -> None:
    decoder, memory = tiny_decoder().train(training), tiny_memory(2)
    search = BeamSearch(2, 1, 4)
    found = generate(decoder, memory, search, SPECIAL)
    assert decoder.training == training
    assert all(module.training == training for module in decoder.modules())
    assert_equal(found, generate(decoder.eval(), memory, search, SPECIAL))  # no dropout either way
    decoder.train(training)
    with pytest.raises(ValueError, match="longer than the 32 positions"):
        generate(decoder, memory, BeamSearch(2, 39, 40), SPECIAL)
    assert decoder.training == training


def test_generating_leaves_no_graph() -> None:
    decoder, memory = tiny_decoder(), tiny_memory(2)
    hidden_BLD = memory.hidden_BLD.requires_grad_()
    generate(decoder, Encoded(hidden_BLD, memory.mask_BL), BeamSearch(2, 1, 4), SPECIAL)
    decoder(torch.tensor([[BOS]] * 2), Encoded(hidden_BLD, memory.mask_BL)).sum().backward()
    assert hidden_BLD.grad is not None


def test_a_seed_makes_sampling_reproducible() -> None:
    decoder, memory = tiny_decoder(), tiny_memory(4)

    def draw(seed: int | None, cached: bool = True) -> list[list[Hypothesis]]:
        return generate(decoder, memory, Sampling(1, 8, seed=seed), SPECIAL, cached=cached)

    first = draw(1)
    torch.manual_seed(99)
    assert draw(1) == first
    assert_equal(draw(1, cached=False), first)
    assert draw(2) != first
    torch.manual_seed(3)
    unseeded = draw(None)
    assert draw(None) != unseeded
    torch.manual_seed(3)
    assert draw(None) == unseeded


def test_a_seed_leaves_the_global_generator_alone() -> None:
    decoder, memory = tiny_decoder(), tiny_memory(2)
    before = torch.get_rng_state()
    generate(decoder, memory, Sampling(1, 4, seed=1), SPECIAL)
    assert torch.equal(torch.get_rng_state(), before)


def first_tokens(search: Sampling, draws: int = 4000) -> tuple[list[float], Counter[int]]:
    """The true distribution of the first token, and how often each was drawn."""
    decoder, memory = tiny_decoder(vocab=8), tiny_memory(1)
    rows = torch.zeros(draws, dtype=torch.long)
    found = generate(decoder, memory.rows(rows), search, SPECIAL)
    probabilities = [math.exp(x) for x in log_probs(decoder, memory, [BOS])]
    return probabilities, Counter(hypothesis.ids[1] for (hypothesis,) in found)


def assert_distribution(drawn: Counter[int], expected: dict[int, float]) -> None:
    total, mass = sum(drawn.values()), sum(expected.values())
    assert set(drawn) <= {token for token, p in expected.items() if p > 0}
    for token, p in expected.items():
        share = p / mass
        assert abs(drawn[token] - total * share) < 5 * math.sqrt(total * share * (1 - share)) + 8


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_follows_the_distribution(temperature: float) -> None:
    probabilities, drawn = first_tokens(Sampling(0, 1, top_p=1.0, temperature=temperature, seed=0))
    assert_distribution(drawn, {token: p ** (1 / temperature) for token, p in enumerate(probabilities)})


def test_top_k_keeps_the_likeliest() -> None:
    probabilities, drawn = first_tokens(Sampling(0, 1, top_p=1.0, top_k=3, seed=0))
    best = sorted(range(8), key=lambda token: -probabilities[token])[:3]
    assert_distribution(drawn, {token: probabilities[token] for token in best})
    assert set(drawn) == set(best)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    probabilities, drawn = first_tokens(Sampling(0, 1, top_p=top_p, seed=0))
    kept: dict[int, float] = {}
    for token in sorted(range(8), key=lambda token: -probabilities[token]):
        kept[token] = probabilities[token]
        if sum(kept.values()) >= top_p:
            break
    assert_distribution(drawn, kept)
    assert set(drawn) == set(kept)


def test_top_p_of_one_drops_nothing() -> None:
    """Not even the tail after which the rounded sum is already 1."""
    logits_BV = torch.cat([torch.zeros(1, 3), torch.full((1, 5), -20.0)], 1)
    assert (generation._nucleus(logits_BV, Sampling(top_p=1.0)) > 0).all()


def test_finished_samples_are_padded_and_cut() -> None:
    """Rows that end early wait for the others; their text stops at the end token and their score is the mean."""
    decoder, memory = tiny_decoder(end_bias=1.5), tiny_memory(8)
    found = generate(decoder, memory, Sampling(1, 12, top_p=1.0, seed=4), SPECIAL)
    lengths = {len(hypothesis.ids) for (hypothesis,) in found}
    assert len(lengths) > 2
    for index, (hypothesis,) in enumerate(found):
        ids = hypothesis.ids
        assert EOS not in ids[1:-1]
        assert ids[-1] == EOS or len(ids) == 13
        assert ids[1] != EOS
        gained = []
        for end in range(1, len(ids)):
            scores = torch.tensor(log_probs(decoder, row(memory, index), ids[:end]))
            if end == 1:
                scores[EOS] = -math.inf
            gained.append(float(scores[ids[end]]))
        assert hypothesis.score == pytest.approx(sum(gained) / len(gained), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamSearch(beams=0), "beams must be at least 1, not 0"),
        (lambda: BeamSearch(min_length=5, max_length=4), "not 5 and 4"),
        (lambda: BeamSearch(min_length=0, max_length=0), "not 0 and 0"),
        (lambda: BeamSearch(min_length=-1), "not -1 and 25"),
        (lambda: BeamSearch(rule="fast"), "rule must be .*, not 'fast'"),  # type: ignore[arg-type]
        (lambda: Sampling(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (lambda: Sampling(top_p=1.1), r"top_p must be in \(0, 1\]"),
        (lambda: Sampling(temperature=0.0), "temperature positive"),
        (lambda: Sampling(top_k=-1), "top_k must not be negative: -1"),
        (lambda: Sampling(min_length=5, max_length=4), "not 5 and 4"),
        (lambda: Sampling(max_length=0), "not 1 and 0"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prompt_must_have_a_row_for_each_memory() -> None:
    for rows, length in ((1, 2), (4, 2), (2, 0)):
        prompt_BL = torch.full((rows, length), BOS)
        with pytest.raises(ValueError, match=rf"prompt of \[{rows}, {length}\] ids for a memory of 2 rows"):
            generate(tiny_decoder(), tiny_memory(2), BeamSearch(2, 1, 4), SPECIAL, prompt_BL=prompt_BL)
