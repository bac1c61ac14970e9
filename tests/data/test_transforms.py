import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from triptych.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    OPERATIONS,
    Preprocessing,
    RandomAugment,
    augment,
    normalize,
    to_tensor,
)


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(size=64):
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([x * 3, y * 3, (x + y) * 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (7, 300), (40, 60), (32, 32)])
def test_all_transforms_give_uint8_squares(resize, size):
    preprocessing = Preprocessing(32, resize=resize)
    image = noise(*size)
    transforms = [
        preprocessing.test_transform(),
        preprocessing.train_transform(),
        preprocessing.train_transform(scale=(0.5, 1.0), augment=False),
        preprocessing.train_transform(scale=None, flip=False),
    ]
    for transform in transforms:
        pixels_CHW = pickle.loads(pickle.dumps(transform))(image)
        assert pixels_CHW.shape == (3, 32, 32)
        assert pixels_CHW.dtype == torch.uint8
        assert pixels_CHW.is_contiguous()


def test_squash_is_bicubic_as_in_pillow():
    image = noise(50, 70)  # larger than the result in one direction, smaller in the other
    expected = np.asarray(image.resize((60, 60), Image.Resampling.BICUBIC)).astype(int)
    result = Preprocessing(60).test_transform()(image).permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() <= 1


def test_squash_keeps_everything_and_crop_the_centre():
    left, right = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    image = Image.new("RGB", (96, 32))
    image.paste(left, (0, 0))
    image.paste(right, (32, 0))
    squashed = Preprocessing(24).test_transform()(image)
    assert squashed[0, 12, 4] > 250
    assert squashed[2, 12, 20] > 250
    cropped = Preprocessing(24, resize="crop").test_transform()(image)
    assert cropped[0].max() < 10


def test_no_flip_no_crop_no_augment_is_the_test_transform():
    preprocessing = Preprocessing(16)
    image = noise(20, 30)
    plain = preprocessing.train_transform(scale=None, augment=False, flip=False)
    assert torch.equal(plain(image), preprocessing.test_transform()(image))


def test_flip_mirrors_half_of_the_pictures():
    image = noise(16, 16)
    transform = Preprocessing(16).train_transform(scale=None, augment=False, flip=True)
    torch.manual_seed(0)
    straight, mirrored = to_tensor(image), to_tensor(ImageOps.mirror(image))
    kinds = [
        1 if torch.equal(result := transform(image), mirrored) else -int(not torch.equal(result, straight))
        for _ in range(400)
    ]
    assert -1 not in kinds
    assert 160 < sum(kinds) < 240


def test_random_crop_has_the_given_area_and_shape():
    # the picture's colours are its coordinates, so the corners of the result tell the crop
    y, x = np.mgrid[:240, :240]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    torch.manual_seed(0)
    transform = Preprocessing(64).train_transform((0.2, 1.0), augment=False, flip=False)
    areas, shapes = [], []
    for _ in range(100):
        pixels = transform(image).double().numpy()
        width, height = np.ptp(pixels[0, 32]) + 1, np.ptp(pixels[1, :, 32]) + 1
        areas.append(width * height / 240**2)
        shapes.append(width / height)
    assert 0.17 < min(areas) < 0.3
    assert 0.75 < max(areas) <= 1.02
    assert 0.7 < min(shapes) < 0.85
    assert 1.18 < max(shapes) < 1.43
    narrow = Preprocessing(8).train_transform((0.9, 1.0), augment=False)
    assert narrow(noise(1, 500)).shape == (3, 8, 8)


def test_transforms_depend_on_torch_seed_alone():
    transform = Preprocessing(16).train_transform()
    torch.manual_seed(3)
    first = [transform(noise(30, 20, seed)) for seed in range(5)]
    np.random.seed(9)
    torch.manual_seed(3)
    again = [transform(noise(30, 20, seed)) for seed in range(5)]
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, [transform(noise(30, 20, seed)) for seed in range(5)]))


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


def test_bad_settings():
    with pytest.raises(ValueError, match="level"):
        RandomAugment(level=11)
    with pytest.raises(ValueError, match="operations"):
        RandomAugment(operations=("Solarize",))
    with pytest.raises(ValueError, match="scale"):
        Preprocessing(8).train_transform(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="image_size"):
        Preprocessing(0)
    with pytest.raises(ValueError, match="resize"):
        Preprocessing(8, resize="pad")
    with pytest.raises(ValueError, match="std"):
        Preprocessing(8, std=(0, 1, 1))


def test_preprocessing_round_trip():
    preprocessing = Preprocessing(224, HALF, HALF, "crop")
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    with pytest.raises(ValueError, match="nonsense"):
        Preprocessing.from_dict({"image_size": 3, "nonsense": 1})


def test_normalize():
    pixels_BCHW = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    before = pixels_BCHW.clone()
    expected = (pixels_BCHW.double() / 255 - torch.tensor(CLIP_MEAN).double().view(3, 1, 1)) / torch.tensor(
        CLIP_STD
    ).double().view(3, 1, 1)
    result = normalize(pixels_BCHW)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, atol=1e-6)
    assert torch.equal(pixels_BCHW, before)
    half = Preprocessing(4, HALF, HALF).normalize(pixels_BCHW, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.abs().max() <= 1
    assert torch.equal(half, normalize(pixels_BCHW, HALF, HALF).bfloat16())
    with pytest.raises(ValueError, match="uint8"):
        normalize(result)
