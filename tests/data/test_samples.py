import pickle
import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from triptych.data import samples
from triptych.data.samples import BrokenSample, Record, all_texts, decode_image, load_image, pre_caption, read_bytes


def encode(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def record(image, **others):
    return Record("shard.tar:7", image, (), "7", **others)


def gradient(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 8, y * 12, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_decodes_to_rgb(format):
    decoded = decode_image(record(encode(gradient(), format)))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(gradient())).mean() < 8


def test_applies_the_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode_image(record(encode(gradient(), exif=exif)))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(gradient()), -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_picture():
    encoded = encode(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert decode_image(record(encoded)).size == (30, 20)


def test_palette_and_cmyk():
    red = Image.new("RGB", (4, 4), (200, 30, 30))
    palette = decode_image(record(encode(red.quantize(4), "GIF")))
    cmyk = decode_image(record(encode(red.convert("CMYK"), "JPEG")))
    for decoded in (palette, cmyk):
        assert decoded.mode == "RGB"
        assert np.abs(np.asarray(decoded).astype(int) - [200, 30, 30]).max() <= 6


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    expected = [[[10, 20, 30], [255, 255, 255]]]
    assert np.asarray(decode_image(record(encode(image)))).tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode_image(record(encode(palette, transparency=1)))).tolist() == expected


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(record(encode(Image.fromarray(grey)))))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


DAMAGED = {
    "empty": b"",
    "text": b"not an image",
    "cut jpeg": encode(gradient(), "JPEG")[:-60],
    "cut png": encode(gradient())[:60],
    "cut webp": encode(gradient(), "WEBP")[:-60],
}


@pytest.mark.parametrize("encoded", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_bytes_name_the_record(encoded):
    with pytest.raises(BrokenSample, match=r"^shard\.tar:7: (cannot decode|the image is of no known format)") as caught:
        decode_image(record(encoded))
    assert caught.value.key == "shard.tar:7"


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(samples, "MAX_PIXELS", 599)
    with pytest.raises(BrokenSample, match="30 x 20 pixels"):
        decode_image(record(encode(gradient())))


def test_no_image_and_known_problems():
    with pytest.raises(BrokenSample, match="has no image"):
        decode_image(record(None))
    with pytest.raises(BrokenSample, match="not JSON"):
        decode_image(record(encode(gradient()), problem="not JSON"))


def test_a_broken_sample_survives_pickling():
    error = pickle.loads(pickle.dumps(BrokenSample("key", "reason")))
    assert (error.key, error.reason, str(error)) == ("key", "reason", "key: reason")


def test_reads_paths_urls_and_tar_members(tmp_path):
    import fsspec

    encoded = encode(gradient())
    (tmp_path / "odd name [1]{a,b}.png").write_bytes(encoded)
    with fsspec.open("memory://samples/a.png", "wb") as file:
        file.write(encoded)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in ("x/a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(encoded)
            archive.addfile(member, BytesIO(encoded))
    locations = ["odd name [1]{a,b}.png", "images.tar:x/a.png", "images.tar:b.png"]
    for location in ["memory://samples/a.png", *(f"{tmp_path}/{name}" for name in locations)]:
        assert read_bytes(location) == encoded
        assert load_image(location, "key").size == (30, 20)
    (tmp_path / "text.tar").write_text("text " * 200)
    for location in ["images.tar:c.png", "none.tar:c.png", "none.png", "text.tar:a.png"]:
        with pytest.raises(BrokenSample, match="key: cannot read"):
            load_image(f"{tmp_path}/{location}", "key")
    with pytest.raises(BrokenSample, match="cannot read"):
        load_image("nonsense://a.png", "key")


def test_a_tar_is_searched_once_however_many_there_are(tmp_path, monkeypatch):
    searched = []

    def search(tar, read=samples.read_index):
        searched.append(tar)
        return read(tar)

    tars = [f"{tmp_path}/{number}.tar" for number in range(40)]
    for number, tar in enumerate(tars):
        with tarfile.open(tar, "w") as archive:
            for name in "ab":
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, BytesIO(bytes([number])))
    monkeypatch.setattr(samples, "read_index", search)
    monkeypatch.setattr(samples, "_indices", {})
    for tar in tars * 2:
        assert read_bytes(f"{tar}:b") == bytes([tars.index(tar)])
    assert searched == tars
    monkeypatch.setattr(samples, "_INDEXED", 6)
    read_bytes(f"{tars[0]}:a")  # nothing new, so nothing is forgotten
    assert len(samples._indices) == 40
    samples._indices.pop(tars[0])
    read_bytes(f"{tars[0]}:a")
    assert list(samples._indices) == [tars[38], tars[39], tars[0]]
    monkeypatch.setattr(samples, "_INDEXED", 1)  # less than one tar holds
    read_bytes(f"{tars[1]}:a")
    assert list(samples._indices) == [tars[1]]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A man, riding (fast)!", "a man riding fast"),
        ('It\'s "THE" dog: #1; *really*~?', "its the dog 1 really"),
        ("black-and-white/grey", "black and white grey"),
        ("  many \t  spaces \n\n here \n", "many spaces here"),
        ("one\ttab stays", "one\ttab stays"),
        ("<PERSON> and <person>", "person and person"),
        ("...", ""),
        ("", ""),
    ],
)
def test_pre_caption(text, cleaned):
    assert pre_caption(text) == cleaned


def test_pre_caption_cuts_words():
    assert pre_caption("a b c d", max_words=3) == "a b c"
    assert len(pre_caption("w " * 50).split()) == 30


def test_all_texts_of_a_record() -> None:
    extra = {
        "question": "what?",
        "answers": ["one", "two"],
        "questions": [{"question": "where?", "answer": "there"}, "broken"],
        "phrases": [{"text": "the dog", "box_xyxy": [0, 0, 1, 1]}],
        "entailment": [{"hypothesis": "it runs", "label": "neutral"}],
        "width": 3,
    }
    record = Record("k", None, ("a dog",), "1", extra)
    assert all_texts(record) == ["a dog", "what?", "one", "two", "where?", "there", "the dog", "it runs"]
    assert all_texts(Record("k", None, (), "1")) == []
