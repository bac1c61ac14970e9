import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from triptych.data.augmentations import (
    DISTORTIONS,
    OPERATIONS,
    ColourJitter,
    RandAugment,
    RandomAugment,
    augment,
    distort,
)


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(size=64):
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([x * 3, y * 3, (x + y) * 2], axis=-1).astype(np.uint8))


def test_colour_operations():
    pixels = np.asarray(noise(64, 64)) // 2
    image = Image.fromarray(pixels)
    brighter = np.asarray(augment(image, "Brightness", 7)).astype(float)
    assert np.abs(brighter - np.clip(pixels * 1.36, 0, 255)).max() <= 1
    stretched = np.asarray(augment(image, "AutoContrast", 7))
    low, high = pixels.min(axis=(0, 1)).astype(float), pixels.max(axis=(0, 1))
    assert np.abs(stretched - (pixels - low) * 255 / (high - low)).max() <= 1
    equal = np.asarray(augment(image, "Equalize", 7))
    for channel in range(3):  # order is kept, values spread
        order = np.argsort(pixels[..., channel], axis=None, kind="stable")
        assert (np.diff(equal[..., channel].ravel()[order].astype(int)) >= 0).all()
        assert equal[..., channel].max() > 240
    centre = pixels[3:6, 3:6, 0].astype(float)
    blurred = (centre.sum() + 4 * centre[1, 1]) / 13
    sharp = np.asarray(augment(image, "Sharpness", 7))[4, 4, 0]
    assert abs(sharp - np.clip(blurred + 1.36 * (centre[1, 1] - blurred), 0, 255)) <= 1.5
    assert augment(image, "Identity", 7) is image


@pytest.mark.parametrize("sign", [1, -1])
def test_translation_is_seven_pixels_at_level_seven(sign):
    pixels = np.asarray(noise(20, 30))
    for operation, axis in (("TranslateX", 1), ("TranslateY", 0)):
        moved = np.asarray(augment(Image.fromarray(pixels), operation, 7, sign))
        # the official translation shows at x what stood at x + offset
        shown = np.roll(pixels, -7 * sign, axis)
        outside = np.arange(pixels.shape[axis])
        outside = outside + 7 * sign >= pixels.shape[axis] if sign == 1 else outside < 7
        expected = shown.copy()
        if axis == 1:
            expected[:, outside] = 128
        else:
            expected[outside] = 128
        assert np.array_equal(moved, expected)


def bilinear(pixels, x, y):
    left, upper = int(np.floor(x)), int(np.floor(y))
    right, lower = x - left, y - upper
    top = pixels[upper, left] * (1 - right) + pixels[upper, left + 1] * right
    bottom = pixels[upper + 1, left] * (1 - right) + pixels[upper + 1, left + 1] * right
    return top * (1 - lower) + bottom * lower


@pytest.mark.parametrize("sign", [1, -1])
def test_shear_and_rotation_against_their_formulas(sign):
    image = smooth()
    pixels = np.asarray(image).astype(float)
    f, angle = sign * 0.21, np.radians(sign * 21)
    cos, sin = np.cos(angle), np.sin(angle)
    # where the official code's OpenCV matrices, inverted, find the pixel that is shown at (x, y)
    sources = {
        "ShearX": lambda x, y: (x - f * y, y),
        "ShearY": lambda x, y: (x, y - f * x),
        "Rotate": lambda x, y: (32 + cos * (x - 32) - sin * (y - 32), 32 + sin * (x - 32) + cos * (y - 32)),
    }
    for operation, source in sources.items():
        result = np.asarray(augment(image, operation, 7, sign)).astype(float)
        inside = 0
        for x, y in [(30, 20), (5, 33), (40, 45), (1, 1), (60, 3), (3, 60)]:
            from_x, from_y = source(x, y)
            if 0 <= from_x <= 62 and 0 <= from_y <= 62:
                inside += 1
                assert np.abs(result[y, x] - bilinear(pixels, from_x, from_y)).max() <= 1.01
            elif not (-1 <= from_x <= 64 and -1 <= from_y <= 64):
                assert (result[y, x] == 128).all()
        assert inside >= 3


def test_random_augment_draws_as_often_as_it_should():
    image = noise(8, 8)
    torch.manual_seed(0)
    bright = RandomAugment(count=1, operations=("Brightness",))
    assert 160 < sum(bright(image) is not image for _ in range(400)) < 240
    twice = RandomAugment(count=2, operations=("TranslateX",), probability=1)
    moved = np.asarray(Image.new("RGB", (40, 1), "white"))
    results = {np.asarray(twice(Image.fromarray(moved)))[0, :, 0].tobytes() for _ in range(50)}
    assert len(results) == 4  # right-right, right-left, left-right, left-left
    assert len(OPERATIONS) == 10


def test_distortions_of_colour():
    pixels = np.asarray(noise(30, 20)).astype(float)
    image, share = noise(30, 20), 7 / 30
    factor = 0.1 + 1.8 * share
    grey = np.asarray(image.convert("L")).astype(float)
    lighter = np.floor(np.clip(pixels + 110 * share, 0, 255))
    expected = {
        "Posterize": pixels // 128 * 128,
        "Solarize": np.where(pixels < 256 * share, pixels, 255 - pixels),
        "SolarizeAdd": np.where(lighter < 128, lighter, 255 - lighter),
        "Brightness": pixels * factor,
        "Color": grey[..., None] + factor * (pixels - grey[..., None]),
        "Contrast": grey.mean() + factor * (pixels - grey.mean()),
    }
    for distortion, wanted in expected.items():
        result = np.asarray(distort(image, distortion, 7)).astype(float)
        assert np.abs(result - np.clip(wanted, 0, 255)).max() < 1.5, distortion  # rounded greys, cut fractions
    assert np.array_equal(distort(image, "Equalize", 7), ImageOps.equalize(image))
    assert np.array_equal(distort(image, "AutoContrast", 7), ImageOps.autocontrast(image))
    assert np.array_equal(distort(image, "Sharpness", 7), ImageEnhance.Sharpness(image).enhance(factor))


@pytest.mark.parametrize("sign", [1, -1])
def test_distortions_of_geometry(sign):
    pixels = np.asarray(noise(60, 80)).astype(int)
    share = sign * 9 / 30
    cos, sin = np.cos(np.radians(30 * share)), np.sin(np.radians(30 * share))
    # where the pixel at (x, y) comes from, both counted from corners as Pillow does
    sources = {
        "ShearX": lambda x, y: (x + 0.3 * share * y, y),
        "ShearY": lambda x, y: (x, y + 0.3 * share * x),
        "TranslateX": lambda x, y: (x + 100 * share, y),
        "TranslateY": lambda x, y: (x, y + 100 * share),
        "Rotate": lambda x, y: (40 + cos * (x - 40) - sin * (y - 30), 30 + sin * (x - 40) + cos * (y - 30)),
    }
    for distortion, source in sources.items():
        result = np.asarray(distort(Image.fromarray(pixels.astype(np.uint8)), distortion, 9, sign)).astype(int)
        agreeing = 0
        for y in range(60):
            for x in range(80):
                from_x, from_y = (int(np.floor(place)) for place in source(x + 0.5, y + 0.5))
                inside = 0 <= from_x < 80 and 0 <= from_y < 60
                agreeing += bool((result[y, x] == (pixels[from_y, from_x] if inside else 0)).all())
        assert agreeing > 0.99 * 60 * 80, distortion  # a source on the border of two pixels may be either


def test_rand_augment_draws_every_distortion_always():
    image = noise(8, 8)
    assert len(DISTORTIONS) == 14
    assert not {"Identity", "Invert"} & set(DISTORTIONS)
    transform = pickle.loads(pickle.dumps(RandAugment(count=1, level=9)))
    wanted = {
        np.asarray(distort(image, distortion, 9, sign)).tobytes() for distortion in DISTORTIONS for sign in (1, -1)
    }
    torch.manual_seed(0)
    assert {np.asarray(transform(image)).tobytes() for _ in range(600)} == wanted
    torch.manual_seed(1)
    first = np.asarray(RandAugment()(image))
    torch.manual_seed(1)
    assert np.array_equal(RandAugment()(image), first)


def test_colour_jitter_multiplies_by_up_to_its_numbers():
    image = Image.new("RGB", (8, 8), (100, 100, 100))  # grey: neither contrast nor saturation changes it
    transform = pickle.loads(pickle.dumps(ColourJitter()))
    torch.manual_seed(0)
    levels = [int(np.asarray(transform(image))[0, 0, 0]) for _ in range(200)]
    assert 59 <= min(levels) < 70
    assert 130 < max(levels) <= 140
    coloured, plain = noise(8, 8), ColourJitter(0.0, 0.0, 0.0)
    assert np.array_equal(plain(coloured), coloured)
    torch.manual_seed(1)
    first = np.asarray(ColourJitter()(coloured))
    torch.manual_seed(1)
    assert np.array_equal(ColourJitter()(coloured), first)
    for one in (ColourJitter(0.0, 0.4, 0.0), ColourJitter(0.0, 0.0, 0.4)):
        assert not np.array_equal(one(coloured), coloured)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"contrast must be in 0\.\.1"):
        ColourJitter(contrast=1.5)
    with pytest.raises(ValueError, match=r"level must be in 0\.\.10"):
        RandomAugment(level=11)
    with pytest.raises(ValueError, match=r"level must be in 0\.\.30"):
        RandAugment(level=31)
    with pytest.raises(ValueError, match="operations"):
        RandomAugment(operations=("Solarize",))
