"""What every registered network must do. A new one needs a line in ``CASES`` (``conftest.py``) and nothing else.

Shape legend: B batch, N image tokens, L text tokens, D width, E embedding width, V vocabulary, H heads, M keys.
"""

import copy
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.models import MODELS, build
from triptych.models.eve import Eve
from triptych.models.layers import Attention, record_attention, use_explicit_attention
from triptych.models.protocol import Encoded, Fused, VisionLanguageModel
from triptych.models.text import TextConfig
from triptych.training.parallel import compile_inference

B, L = 3, 7
LENGTHS = (7, 4, 1)


@dataclass(frozen=True)
class Inputs:
    pixels_BCHW: Tensor
    ids_BL: Tensor
    mask_BL: Tensor

    def row(self, index: int) -> "Inputs":
        """One row alone, without its padding."""
        length = int(self.mask_BL[index].sum())
        row = slice(index, index + 1)
        return Inputs(self.pixels_BCHW[row], self.ids_BL[row, :length], self.mask_BL[row, :length])

    def padded(self, extra: int) -> "Inputs":
        """More padding, of ids that would matter if they were seen."""
        junk = torch.randint(1, 60, (len(self.ids_BL), extra))
        unseen = torch.zeros_like(junk, dtype=torch.bool)
        return Inputs(self.pixels_BCHW, torch.cat([self.ids_BL, junk], 1), torch.cat([self.mask_BL, unseen], 1))


@pytest.fixture
def inputs(case: Any) -> Inputs:
    torch.manual_seed(1)
    mask_BL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    ids_BL = torch.randint(1, case.vocab, (B, L))
    return Inputs(torch.randn(B, 3, case.image_size, case.image_size), ids_BL, mask_BL)


@dataclass(frozen=True)
class Outputs:
    """Everything a network can say about a batch."""

    image: Encoded
    text: Encoded
    image_BE: Tensor
    text_BE: Tensor
    fused: Fused
    match_B2: Tensor
    masked_BLV: Tensor
    decoded_BLV: Tensor | None
    painted_BPY: Tensor | None

    def rows(self, row: int, length: int) -> list[Tensor]:
        """What is said of one row's real tokens."""
        found = [self.image.hidden_BLD[row], self.text.hidden_BLD[row, :length]]
        found += [level[row] for level in self.image.levels] + [level[row, :length] for level in self.text.levels]
        found += [self.image_BE[row], self.text_BE[row], self.fused.image_BND[row], self.fused.text_BLD[row, :length]]
        found += [self.fused.pooled_BP[row], self.match_B2[row], self.masked_BLV[row, :length]]
        found += [] if self.decoded_BLV is None else [self.decoded_BLV[row, :length]]
        return found if self.painted_BPY is None else [*found, self.painted_BPY[row]]

    def everything(self) -> list[Tensor]:
        found = [self.image.hidden_BLD, self.text.hidden_BLD, *self.image.levels, *self.text.levels]
        found += [self.image_BE, self.text_BE, self.fused.image_BND, self.fused.text_BLD, self.fused.pooled_BP]
        found += [self.match_B2, self.masked_BLV]
        return found + [extra for extra in (self.decoded_BLV, self.painted_BPY) if extra is not None]

    def scalar(self) -> Tensor:
        """A number that depends on all of it, with fixed random weights."""
        generator = torch.Generator().manual_seed(7)
        return torch.stack(
            [(x.float() * torch.randn(x.shape, generator=generator)).mean() for x in self.everything()]
        ).sum()


def run(model: VisionLanguageModel, x: Inputs) -> Outputs:
    """Every function of the protocol, the decoder reading the text over the fused state; and what paints, paints."""
    painted_BPY = None
    if getattr(model, "pixel_decoder", None) is not None:
        painted_BPY = paint_hidden(model, x)
    image, text = model.encode_image(x.pixels_BCHW), model.encode_text(x.ids_BL, x.mask_BL)
    fused = model.fuse(image, text)
    decoded_BLV = None
    if model.decoder is not None:
        decoded_BLV = model.decoder.logits(model.decoder(x.ids_BL, fused.states(), x.mask_BL))
    return Outputs(
        image,
        text,
        model.embed_image(image),
        model.embed_text(text),
        fused,
        model.match_logits(fused.pooled_BP),
        model.masked_logits(fused.text_BLD),
        decoded_BLV,
        painted_BPY,
    )


def paint_hidden(model: VisionLanguageModel, x: Inputs) -> Tensor:
    """Every patch, painted from every second one and the text."""
    grid = (x.pixels_BCHW.shape[2] // model.patch, x.pixels_BCHW.shape[3] // model.patch)
    kept_BK = torch.arange(0, grid[0] * grid[1], 2).expand(len(x.pixels_BCHW), -1)
    visible = model.encode_visible(x.pixels_BCHW, kept_BK)
    return model.paint(model.fuse(visible, model.encode_text(x.ids_BL, x.mask_BL)), kept_BK, grid)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_model_has_a_case_and_a_tiny_size(cases: dict[str, Any]) -> None:
    assert {case.model_type for case in cases.values()} == set(MODELS)
    for model_type, family in MODELS.items():
        assert family.model.model_type == model_type
        assert all(isinstance(config, family.config) for config in family.sizes.values())
        with torch.device("meta"):
            tiny = build(model_type, "tiny")
        assert sum(p.numel() for p in tiny.parameters()) < 5e6


def test_the_list_of_models_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        MODELS["other"] = MODELS["mplug"]  # type: ignore[index]
    for family in MODELS.values():
        with pytest.raises(TypeError):
            family.sizes["tiny"] = None  # type: ignore[index]


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match=r"no model is called 'blip'; there are .*mplug"):
        build("blip", "tiny")
    with pytest.raises(ValueError, match=r"mplug has no size 'huge'; it has base, large, small, tiny"):
        build("mplug", "huge")
    with pytest.raises(ValueError, match="mplug needs a MPlugConfig, not a TextConfig"):
        build("mplug", TextConfig())


def test_shapes(model: VisionLanguageModel, case: Any, inputs: Inputs) -> None:
    out = run(model, inputs)
    N, D = (case.image_size // case.patch) ** 2 + 1, model.width
    assert out.image.hidden_BLD.shape[:2] == (B, N)
    assert len(out.image) == len(out.text) == B
    assert out.text.hidden_BLD.shape[:2] == (B, L)
    assert out.image_BE.shape == out.text_BE.shape == (B, model.embed_dim)
    assert out.fused.image_BND.shape == (B, N, D)
    assert out.fused.text_BLD.shape == (B, L, D)
    assert out.fused.pooled_BP.shape == (B, model.pooled_width)
    assert out.fused.states().hidden_BLD.shape == (B, N + L, D)
    assert torch.equal(out.fused.states().real_BL(), torch.cat([torch.ones(B, N).bool(), inputs.mask_BL], 1))
    assert out.match_B2.shape == (B, 2)
    assert out.masked_BLV.shape == (B, L, case.vocab)
    assert out.decoded_BLV is None or out.decoded_BLV.shape == (B, L, case.vocab)
    for embedding_BE in (out.image_BE, out.text_BE):
        torch.testing.assert_close(embedding_BE.norm(dim=-1), torch.ones(B))
    assert model.temperature.shape == ()
    assert 0 < model.temperature.item() < 1


def test_backward_reaches_every_parameter(case: Any, model: VisionLanguageModel, inputs: Inputs) -> None:
    out = run(model, inputs)
    grads = gradients(model, out.scalar() + (out.image_BE @ out.text_BE.T / model.temperature).diagonal().sum())
    assert set(grads) == {name for name, _ in model.named_parameters() if name.partition(".")[0] != case.beside}
    assert all(grad.isfinite().all() for grad in grads.values())
    zero = [name for name, grad in grads.items() if not grad.any()]
    assert zero == []


def test_every_head_teaches_the_encoders(model: VisionLanguageModel, inputs: Inputs) -> None:
    """Fused heads both of them, embeddings each its own."""
    image, text = model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)
    fused = model.fuse(image, text)
    heads = {
        "image": (model.embed_image(image), {"image"}),
        "text": (model.embed_text(text), {"text"}),
        "match": (model.match_logits(fused.pooled_BP), {"image", "text"}),
        "masked": (model.masked_logits(fused.text_BLD), {"image", "text"}),
    }
    if model.decoder is not None:
        decoded_BLV = model.decoder.logits(model.decoder(inputs.ids_BL, fused.states(), inputs.mask_BL))
        heads["decoder"] = (decoded_BLV, {"image", "text"})
    for name, (out, expected) in heads.items():
        grads = torch.autograd.grad(
            (out * torch.randn_like(out)).sum(),
            [image.hidden_BLD, text.hidden_BLD],
            retain_graph=True,
            allow_unused=True,
        )
        reached = {side for side, grad in zip(("image", "text"), grads, strict=True) if grad is not None and grad.any()}
        assert reached == expected, name


def test_parts_divide_the_parameters(case: Any, model: VisionLanguageModel) -> None:
    """Every parameter is in some part, in one where there are towers, and a part can be trained without the others."""
    of_attribute: dict[str, set[str]] = {}
    for part, names in model.parts.items():
        for name in names:
            of_attribute.setdefault(name, set()).add(part)
    assert model.model_type == "eve" or all(len(parts) == 1 for parts in of_attribute.values())
    assert set(of_attribute) <= {name for name, _ in model.named_children()} | {"temperature"}
    attributes = {name: name.partition(".")[0] for name, _ in model.named_parameters()}
    owners = {name: of_attribute.get(attribute, set()) for name, attribute in attributes.items()}
    assert {attributes[name] for name, parts in owners.items() if not parts} == {case.beside} - {None}
    for part in model.parts:
        model.train_only(part)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained or part == "fusion"
        assert all(part in owners[name] for name in trained)
    model.train_only(*model.parts)
    assert all(p.requires_grad for name, p in model.named_parameters() if owners[name])
    model.train_only("image", "text", "fusion", "fused_image")
    assert all(p.requires_grad for name, p in model.named_parameters() if "fusion" in owners[name])


@pytest.mark.parametrize("reader", ["decoder", "fused_image"])
def test_who_reads_fused_images_trains_what_makes_them(model: VisionLanguageModel, inputs: Inputs, reader: Any) -> None:
    """And where nobody does, only what the image alone depends on stays as it is."""
    model.train_only("image", "text", "fusion", reader)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("fusion.")}
    model.train_only("image", "text", "fusion")
    left = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("fusion.")}
    model.requires_grad_(True)
    fused = model.fuse(model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL))
    grads = gradients(model, fused.image_BND.square().sum() + fused.text_BLD.square().sum())
    assert whole == {name for name in grads if name.startswith("fusion.")}
    grads = gradients(
        model,
        model.fuse(model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL))
        .pooled_BP.square()
        .sum(),
    )
    assert left == {name for name in grads if name.startswith("fusion.")}


def test_a_part_trained_alone_is_all_that_its_work_needs(model: VisionLanguageModel, inputs: Inputs) -> None:
    """Otherwise a process would wait for gradients that never come."""
    model.train_only("image", "text", "fusion", "pooled", "embedding", "matching")
    image, text = model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)
    scale = (model.embed_image(image) @ model.embed_text(text).T / model.temperature).logsumexp(1)
    loss = scale.sum() + model.match_logits(model.pool(image, text)).square().sum()
    assert set(gradients(model, loss)) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_both_sides_matter_after_fusion(model: VisionLanguageModel, inputs: Inputs) -> None:
    image, text = model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)
    pooled_BP = model.fuse(image, text).pooled_BP
    other = torch.tensor([1, 2, 0])
    assert (model.fuse(image.rows(other), text).pooled_BP - pooled_BP).abs().amax(1).min() > 1e-3
    assert (model.fuse(image, text.rows(other)).pooled_BP - pooled_BP).abs().amax(1).min() > 1e-3


def test_state_dict_survives_a_file(
    make_model: Callable[[int], VisionLanguageModel], model: VisionLanguageModel, inputs: Inputs
) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make_model(5)
    expected = run(model, inputs).scalar()
    assert run(other, inputs).scalar() != expected
    other.load_state_dict(torch.load(file, weights_only=True))
    assert run(other, inputs).scalar() == expected


def test_copies_are_independent(model: VisionLanguageModel, inputs: Inputs) -> None:
    before = run(model, inputs).scalar()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert run(model, inputs).scalar() == before


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_finite_and_near_fp32(how: str, model: VisionLanguageModel, inputs: Inputs) -> None:
    with torch.no_grad():
        expected = run(model, inputs).everything()
        if how == "weights":
            bf16 = copy.deepcopy(model).to(torch.bfloat16)
            found = run(bf16, dataclasses.replace(inputs, pixels_BCHW=inputs.pixels_BCHW.bfloat16())).everything()
            assert {x.dtype for x in found} == {torch.bfloat16}
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = run(model, inputs).everything()
    for value, wanted in zip(found, expected, strict=True):
        assert value.isfinite().all()
        assert (value.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_backward(how: str, model: VisionLanguageModel, inputs: Inputs) -> None:
    expected = gradients(model, run(model, inputs).scalar())
    if how == "weights":
        model.to(torch.bfloat16)
        inputs = dataclasses.replace(inputs, pixels_BCHW=inputs.pixels_BCHW.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = run(model, inputs).scalar()
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    total = torch.cat([grad.float().flatten() for grad in found.values()])
    wanted = torch.cat([grad.flatten() for grad in expected.values()])
    assert total.isfinite().all()
    assert (total - wanted).norm() < 0.1 * wanted.norm()


def test_padding_of_the_text_changes_nothing(model: VisionLanguageModel, inputs: Inputs) -> None:
    with torch.no_grad():
        expected, found = run(model, inputs), run(model, inputs.padded(5))
    for row, length in enumerate(LENGTHS):
        for value, wanted in zip(found.rows(row, length), expected.rows(row, length), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_padding_of_the_image_changes_nothing(model: VisionLanguageModel, inputs: Inputs) -> None:
    """Images of several shapes can be fused in one batch."""
    with torch.no_grad():
        image, text = model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)
        N = image.hidden_BLD.shape[1]
        padded = image.pad(N + 3)
        junk = [torch.cat([x[:, :N], 9 * torch.randn_like(x[:, N:])], 1) for x in (padded.hidden_BLD, *padded.levels)]
        expected = model.fuse(image, text)
        found = model.fuse(Encoded(junk[0], padded.mask_BL, tuple(junk[1:])), text)
        torch.testing.assert_close(found.image_BND[:, :N], expected.image_BND, rtol=1e-4, atol=1e-5)
        for row, length in enumerate(LENGTHS):
            wanted_LD = expected.text_BLD[row, :length]
            torch.testing.assert_close(found.text_BLD[row, :length], wanted_LD, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other(model: VisionLanguageModel, inputs: Inputs) -> None:
    with torch.no_grad():
        together = run(model, inputs)
        for row, length in enumerate(LENGTHS):
            alone = run(model, inputs.row(row))
            for value, wanted in zip(alone.rows(0, length), together.rows(row, length), strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["plain", "padded images", "clips", "recomputing"])
def test_a_part_of_what_fusing_gives_is_the_same(how: str, model: VisionLanguageModel, inputs: Inputs) -> None:
    """The pooled state or the text states alone, with rows of images; values and gradients."""
    rows_B = torch.tensor([2, 0, 2])
    pixels = inputs.pixels_BCHW
    if how == "clips":
        pixels = torch.stack([pixels, pixels.flip(0)], dim=1)

    def found(of: Callable[[Encoded, Encoded], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image, text = model.encode_image(pixels), model.encode_text(inputs.ids_BL, inputs.mask_BL)
        out = of(image.pad(image.hidden_BLD.shape[1] + 3) if how == "padded images" else image, text)
        return out, gradients(model, (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum())

    with checkpointing(model) if how == "recomputing" else nullcontext():
        for part, whole in (
            (model.pool, lambda image, text: model.fuse(image, text, rows_B).pooled_BP),
            (model.fuse_text, lambda image, text: model.fuse(image, text, rows_B).text_BLD),
        ):
            value, grads = found(lambda image, text, part=part: part(image, text, rows_B))
            expected, expected_grads = found(whole)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
            # A bias of keys has no gradient but rounding: no softmax notices what all scores have in common.
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4)


def test_image_rows_equal_copied_images(model: VisionLanguageModel, inputs: Inputs) -> None:
    rows = torch.tensor([2, 0, 2, 1, 2])
    texts = torch.tensor([0, 1, 2, 0, 1])

    def fused(shared: bool) -> dict[str, Tensor]:
        image = model.encode_image(inputs.pixels_BCHW)
        text = model.encode_text(inputs.ids_BL, inputs.mask_BL).rows(texts)
        image.hidden_BLD.retain_grad()
        found = model.fuse(image, text, rows) if shared else model.fuse(image.rows(rows), text)
        assert found.image_BND.shape[0] == found.text_BLD.shape[0] == len(rows)
        masks = {"mask": found.states().real_BL().float()}
        values = {"image": found.image_BND, "text": found.text_BLD, "pooled": found.pooled_BP}
        loss = torch.stack([(x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in values.values()]).sum()
        grads = gradients(model, loss)
        assert image.hidden_BLD.grad is not None
        return {**masks, **values, **grads, "image grad": image.hidden_BLD.grad}

    assert_same(fused(shared=True), fused(shared=False))


def test_explicit_attention_equals_the_fused_kernel(model: VisionLanguageModel, inputs: Inputs) -> None:
    def values(explicit: bool) -> dict[str, Tensor]:
        use_explicit_attention(model, explicit)
        out = run(model, inputs)
        grads = gradients(model, out.scalar())
        return {**{str(number): value for number, value in enumerate(out.everything())}, **grads}

    assert_same(values(explicit=True), values(explicit=False))
    assert not any(module.explicit for module in model.modules() if isinstance(module, Attention))


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "checkpointing")]
    assert parts
    for part in parts:
        part.checkpointing = True
    yield
    for part in parts:
        part.checkpointing = False


def test_gradient_checkpointing_gives_the_same_gradients(model: VisionLanguageModel, inputs: Inputs) -> None:
    """With dropout, which must come out the same in the second computation; and it must really compute twice."""
    model.train()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(count)

    def once(context: Callable[[], Any]) -> tuple[dict[str, Tensor], int]:
        nonlocal calls
        calls = 0
        torch.manual_seed(3)
        with context():
            return gradients(model, run(model, inputs).scalar()), calls

    expected, once_each = once(nullcontext)
    found, twice_each = once(lambda: checkpointing(model))
    assert twice_each == 2 * once_each
    assert_same(found, expected)
    torch.manual_seed(4)
    assert any((grad != expected[name]).any() for name, grad in gradients(model, run(model, inputs).scalar()).items())


def blocks(model: nn.Module) -> list[nn.Module]:
    """The Transformer blocks: the entries of every list called ``blocks`` or ``layers``."""
    lists = [part for name, part in model.named_modules() if name.rpartition(".")[2] in {"blocks", "layers"}]
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]


@pytest.mark.usefixtures("once_a_network")
def test_compiled_blocks_compute_the_same(model: VisionLanguageModel, inputs: Inputs) -> None:
    assert {id(a) for a in model.modules() if isinstance(a, Attention)} == {
        id(a) for block in blocks(model) for a in block.modules() if isinstance(a, Attention)
    }
    out = run(model, inputs)
    expected = {"loss": out.scalar(), **gradients(model, out.scalar())}
    torch.compiler.reset()
    names = list(model.state_dict())
    for block in blocks(model):
        block.compile(backend="aot_eager")  # needs no C++ compiler
    out = run(model, inputs)
    assert_same({"loss": out.scalar(), **gradients(model, out.scalar())}, expected)
    assert list(model.state_dict()) == names
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="packing weights into compiled code needs a C++ compiler")
@pytest.mark.usefixtures("once_a_network")
def test_a_model_compiled_for_inference_computes_the_same(model: VisionLanguageModel, inputs: Inputs) -> None:
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    compile_inference(compiled)
    names = list(model.state_dict())
    with torch.inference_mode():
        for some in (inputs, inputs.row(1)):
            image, text = compiled.encode_image(some.pixels_BCHW), compiled.encode_text(some.ids_BL, some.mask_BL)
            found = compiled.fuse(image, text)
            image, text = model.encode_image(some.pixels_BCHW), model.encode_text(some.ids_BL, some.mask_BL)
            expected = model.fuse(image, text)
            assert_same({"pooled": found.pooled_BP}, {"pooled": expected.pooled_BP})
            assert_same({"image": found.image_BND}, {"image": expected.image_BND})
            image, text = compiled.encode_image(some.pixels_BCHW), compiled.encode_text(some.ids_BL, some.mask_BL)
            assert_same({"alone": compiled.pool(image, text)}, {"alone": expected.pooled_BP})
            assert_same({"text": compiled.fuse_text(image, text)}, {"text": expected.text_BLD})
    assert list(compiled.state_dict()) == names
    torch.compiler.reset()


@pytest.mark.parametrize("size", [(16, 16), (48, 24), (40, 64)])
def test_other_resolutions(size: tuple[int, int], model: VisionLanguageModel, case: Any, inputs: Inputs) -> None:
    pixels_BCHW = torch.randn(B, 3, *size)
    out = run(model, dataclasses.replace(inputs, pixels_BCHW=pixels_BCHW))
    N = (size[0] // case.patch) * (size[1] // case.patch) + 1
    assert out.image.hidden_BLD.shape[1] == out.fused.image_BND.shape[1] == N
    unused = ("temperature", case.beside)
    used = {name for name, _ in model.named_parameters() if name.partition(".")[0] not in unused}
    assert set(gradients(model, out.scalar())) == used


def test_images_that_do_not_fit_the_patches_are_refused(model: VisionLanguageModel, case: Any) -> None:
    with pytest.raises(ValueError, match="33 x 32 pixels: both sides must be multiples of the patch, 8"):
        model.encode_image(torch.randn(1, 3, 33, 32))


def test_too_long_texts_are_refused(model: VisionLanguageModel, case: Any) -> None:
    model.encode_text(torch.ones(1, case.max_text, dtype=torch.long))
    with pytest.raises(ValueError, match="a text of 25 tokens is longer than the 24 positions"):
        model.encode_text(torch.ones(1, case.max_text + 1, dtype=torch.long))


def test_attention_is_recorded(model: VisionLanguageModel, inputs: Inputs) -> None:
    with torch.no_grad():
        expected = run(model, inputs).everything()
        with record_attention(model) as maps:
            found = run(model, inputs).everything()
            assert maps == {}
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    names = {name for name, module in model.named_modules() if isinstance(module, Attention)}
    assert set(maps) == names
    N = inputs.pixels_BCHW.shape[-1] ** 2 // 64 + 1
    for name, probabilities_BHLM in maps.items():
        assert probabilities_BHLM.shape[:2] == (B, 2), name
        lengths = {N, L, N + L} if "pixel_decoder" not in name else {N}
        assert {probabilities_BHLM.shape[2], probabilities_BHLM.shape[3]} <= lengths, name
        assert (probabilities_BHLM >= 0).all()
        torch.testing.assert_close(probabilities_BHLM.sum(-1), torch.ones(probabilities_BHLM.shape[:3]))
    padding_BL = ~inputs.mask_BL
    for probabilities_BHLM in maps.values():
        if probabilities_BHLM.shape[-1] == L:
            assert not probabilities_BHLM.transpose(1, 3)[padding_BL].any()
    for module in model.modules():
        if isinstance(module, Attention):
            assert not module.explicit
            assert module.probabilities_BHLM is None


def test_recording_leaves_no_trace_after_an_exception(model: VisionLanguageModel, inputs: Inputs) -> None:
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    attentions[0].explicit = True

    def fail_inside() -> None:
        with record_attention(model):
            run(model, inputs)
            assert all(module.explicit for module in attentions)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert [module.explicit for module in attentions] == [True] + [False] * (len(attentions) - 1)
    assert all(module.probabilities_BHLM is None for module in attentions)


def test_only_layers_that_ran_are_recorded(model: VisionLanguageModel, inputs: Inputs) -> None:
    with torch.no_grad(), record_attention(model) as maps:
        model.text_states(model.encode_text(inputs.ids_BL, inputs.mask_BL))
    everything = {name for name, module in model.named_modules() if isinstance(module, Attention)}
    assert maps
    assert set(maps) < everything


def test_a_clip_is_its_frames_one_after_the_other(model: VisionLanguageModel, inputs: Inputs) -> None:
    frames_BFCHW = torch.stack([inputs.pixels_BCHW, inputs.pixels_BCHW.flip(0), inputs.pixels_BCHW.flip(-1)], dim=1)
    clip = model.encode_image(frames_BFCHW)
    alone = [model.encode_image(frames_BFCHW[:, number]) for number in range(3)]
    assert clip.frames == 3
    torch.testing.assert_close(clip.hidden_BLD, torch.cat([frame.hidden_BLD for frame in alone], dim=1))
    for number, level_BLD in enumerate(clip.levels):
        torch.testing.assert_close(level_BLD, torch.cat([frame.levels[number] for frame in alone], dim=1))
    assert clip.rows(slice(1, 2)).frames == clip.detach().frames == clip.to("cpu").frames == 3


def test_a_clip_is_embedded_as_the_mean_of_its_frames(model: VisionLanguageModel, inputs: Inputs) -> None:
    frames_BFCHW = torch.stack([inputs.pixels_BCHW, inputs.pixels_BCHW.flip(0)], dim=1)
    first, second = (model.encode_image(frames_BFCHW[:, number]) for number in range(2))
    levels = tuple((a + b) / 2 for a, b in zip(first.levels, second.levels, strict=True))
    mean = Encoded((first.hidden_BLD + second.hidden_BLD) / 2, None, levels)
    if isinstance(model, Eve):  # what it encodes are embeddings: the mean is that of states
        mean_BD = (model.image_states(first).hidden_BLD[:, 0] + model.image_states(second).hidden_BLD[:, 0]) / 2
        expected_BE = nn.functional.normalize(model.image_projection(mean_BD), dim=-1)
    else:
        expected_BE = model.embed_picture(mean)
    torch.testing.assert_close(model.embed_image(model.encode_image(frames_BFCHW)), expected_BE)
    still_BFCHW = inputs.pixels_BCHW[:, None].expand(-1, 4, -1, -1, -1)
    once = model.embed_image(model.encode_image(inputs.pixels_BCHW))
    torch.testing.assert_close(model.embed_image(model.encode_image(still_BFCHW)), once)


def test_texts_fuse_with_clips(model: VisionLanguageModel, inputs: Inputs) -> None:
    clip = model.encode_image(torch.stack([inputs.pixels_BCHW, inputs.pixels_BCHW.flip(0)], dim=1))
    text = model.encode_text(inputs.ids_BL, inputs.mask_BL)
    rows_B = torch.tensor([2, 0, 0])
    fused, expected = model.fuse(clip, text, rows_B), model.fuse(clip.rows(rows_B), text)
    torch.testing.assert_close(fused.pooled_BP, expected.pooled_BP)
    first = model.fuse(model.encode_image(inputs.pixels_BCHW), text)
    assert not torch.allclose(model.fuse(clip, text).pooled_BP, first.pooled_BP)


def test_a_decoder_may_read_another_table(model: VisionLanguageModel, inputs: Inputs) -> None:
    decoder = model.decoder
    if decoder is None:
        pytest.skip("this network has no decoder")
    memory = model.fuse(
        model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)
    ).states()
    with torch.no_grad():
        plain_BLD = decoder(inputs.ids_BL, memory)
        same_BLD = decoder(inputs.ids_BL, memory, word_VD=decoder.embeddings.word.weight)
        assert torch.equal(same_BLD, plain_BLD)
        table_XD = torch.randn(3, decoder.config.width)
        rows_BL = inputs.ids_BL % 3
        found_BLD = decoder(rows_BL, memory, word_VD=table_XD)
        decoder.embeddings.word.weight[:3] = table_XD
        torch.testing.assert_close(found_BLD, decoder(rows_BL, memory))
