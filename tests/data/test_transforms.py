import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from triptych.data.augmentations import RandAugment
from triptych.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Preprocessing,
    normalize,
    to_tensor,
)


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("resize", ["squash", "crop", "port"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (7, 300), (40, 60), (32, 32)])
def test_all_transforms_give_uint8_squares(resize, size):
    preprocessing = Preprocessing(32, resize=resize)
    image = noise(*size)
    transforms = [
        preprocessing.test_transform(),
        preprocessing.train_transform(),
        preprocessing.train_transform(scale=(0.5, 1.0), augment=None),
        preprocessing.train_transform(scale=(0.5, 1.0), augment=RandAugment()),
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


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (33, 40), (40, 40), (20, 90), (41, 30)])
def test_crop_is_the_official_transform_of_clip(size):
    image = noise(*size)
    # torchvision's rule: the shorter side fits, the longer is cut down to whole pixels, the crop's corner rounded
    short = min(size)
    height, width = (int(32 * side / short) for side in size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    expected = resized[top : top + 32, left : left + 32].astype(int)
    result = Preprocessing(32, resize="crop").test_transform()(image).permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() <= 1


PORT_SIZES = [(480, 640), (427, 640), (640, 427), (100, 100), (288, 288), (300, 100), (100, 450), (289, 577), (31, 33)]


@pytest.mark.parametrize("image_size", [288, 294, 384])
def test_port_is_what_transformers_makes(image_size):
    transformers = pytest.importorskip("transformers")
    edge = {"shortest_edge": image_size}
    processor = transformers.BridgeTowerImageProcessor(size=edge, crop_size=edge)
    preprocessing = Preprocessing(image_size, resize="port")
    for size in PORT_SIZES:
        image = noise(*size)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        result = preprocessing.normalize(preprocessing.test_transform()(image)[None])
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_port_in_training_is_the_crop_and_narrow_pictures_have_something_left():
    image = noise(300, 7)
    port, crop = Preprocessing(64, resize="port"), Preprocessing(64, resize="crop")
    trained = port.train_transform(scale=None, augment=None, flip=False)(image)
    assert torch.equal(trained, crop.test_transform()(image))
    pixels_CHW = port.test_transform()(image)
    assert pixels_CHW[:, :, 16:48].float().std() > 10
    assert not pixels_CHW[:, :, :16].any()
    assert not pixels_CHW[:, :, 48:].any()


def test_no_flip_no_crop_no_augment_is_the_test_transform():
    preprocessing = Preprocessing(16)
    image = noise(20, 30)
    plain = preprocessing.train_transform(scale=None, augment=None, flip=False)
    assert torch.equal(plain(image), preprocessing.test_transform()(image))


def test_flip_mirrors_half_of_the_pictures():
    image = noise(16, 16)
    transform = Preprocessing(16).train_transform(scale=None, augment=None, flip=True)
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
    transform = Preprocessing(64).train_transform((0.2, 1.0), augment=None, flip=False)
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
    narrow = Preprocessing(8).train_transform((0.9, 1.0), augment=None)
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


def test_bad_settings():
    with pytest.raises(ValueError, match="scale"):
        Preprocessing(8).train_transform(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="image_size"):
        Preprocessing(0)
    with pytest.raises(ValueError, match="resize"):
        Preprocessing(8, resize="pad")
    with pytest.raises(ValueError, match="std"):
        Preprocessing(8, std=(0, 1, 1))


@pytest.mark.parametrize("resize", ["squash", "crop", "port"])
def test_preprocessing_round_trip(resize):
    preprocessing = Preprocessing(224, HALF, HALF, resize)
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
