"""What turns pixels into patches."""

import dataclasses

import pytest
import torch

from triptych.models.vision import ConvolutionStem, VisionConfig, VisionTransformer

CONFIG = VisionConfig(width=32, layers=1, heads=2, patch=12, image_size=48)


def test_a_stem_has_one_state_a_patch() -> None:
    torch.manual_seed(0)
    pixels_BCHW = torch.randn(2, 3, 48, 36)
    assert ConvolutionStem(32, 12)(pixels_BCHW).shape == (2, 32, 4, 3)
    model = VisionTransformer(dataclasses.replace(CONFIG, stem="convolution"))
    assert model(pixels_BCHW).shape == (2, 4 * 3 + 1, 32)


def test_a_stem_looks_beyond_its_patch_and_a_linear_map_does_not() -> None:
    """One pixel beside a patch changes the state of that patch only through convolutions that overlap."""
    torch.manual_seed(0)
    before = torch.randn(1, 3, 48, 48)
    after = before.clone()
    after[0, :, 5, 12] += 10.0  # the first column of the second patch
    for stem, reaches in (("patch", False), ("convolution", True)):
        embed = VisionTransformer(dataclasses.replace(CONFIG, stem=stem)).patch_embedding
        changed_HW = (embed(after) - embed(before)).abs().amax(dim=(0, 1)) > 0
        assert changed_HW[0, 1]
        assert bool(changed_HW[0, 0]) == reaches
        assert not changed_HW[2:].any()


def test_a_stem_passes_on_the_scale_of_its_pixels() -> None:
    torch.manual_seed(0)
    states = ConvolutionStem(128, 12)
    states.reset_parameters()
    out = states(torch.randn(8, 3, 96, 96))
    assert 0.5 < float(out.detach().std()) < 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "convolution", "patch": 6}, "multiple of 4"),
        ({"stem": "lettuce"}, "stem must be one of patch, convolution"),
    ],
)
def test_a_wrong_stem_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
