"""CIFAR's folders: both binary and both pickled layouts, what is missing or damaged, and that no code runs."""

import pickle
import struct

import numpy as np
import pytest

from triptych.data.cifar import open_cifar
from triptych.data.samples import decode_image
from triptych.data.sources import open_source

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COARSE, FINE = ["fish", "people"], ["boy", "ray", "trout"]


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def text(value):
    return b"U" + bytes([len(value)]) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def python2_pickle(values):
    """As Python 2 wrote them: texts are byte strings, arrays are NumPy 1's."""

    def item(value):
        if isinstance(value, np.ndarray):
            raw = value.tobytes()
            array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
            dtype = b"cnumpy\ndtype\n(" + text(value.dtype.str[1:]) + b"K\x00K\x01tR(K\x03" + text("|")
            dtype += b"NNN" + number(-1) + number(-1) + b"K\x00tb"
            shape = b"(" + b"".join(map(number, value.shape)) + b"t"
            return array + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        return number(value) if isinstance(value, int) else text(value)

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in values.items()) + b"u."


def ten(labels, seed, binary):
    flat = pixels(len(labels), seed).reshape(len(labels), -1)
    if binary:
        return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, flat, strict=True))
    return python2_pickle({"batch_label": "a batch", "labels": labels, "data": flat})


def hundred(coarse, fine, seed, binary):
    flat = pixels(len(fine), seed).reshape(len(fine), -1)
    if binary:
        return b"".join(bytes([c, f]) + row.tobytes() for c, f, row in zip(coarse, fine, flat, strict=True))
    return python2_pickle({"data": flat, "coarse_labels": coarse, "fine_labels": fine})


def write_ten(root, binary):
    folder, suffix = root / f"cifar-10-batches-{'bin' if binary else 'py'}", ".bin" if binary else ""
    folder.mkdir()
    for batch in range(1, 6):
        (folder / f"data_batch_{batch}{suffix}").write_bytes(ten([batch, 9], batch, binary))
    (folder / f"test_batch{suffix}").write_bytes(ten([0, 3, 2], 6, binary))
    if binary:
        (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(python2_pickle({"label_names": TEN, "num_vis": 3072}))
    return folder


def write_hundred(root, binary):
    folder, suffix = root / f"cifar-100-{'binary' if binary else 'python'}", ".bin" if binary else ""
    folder.mkdir()
    (folder / f"train{suffix}").write_bytes(hundred([0, 1], [1, 0], 1, binary))
    (folder / f"test{suffix}").write_bytes(hundred([0], [2], 2, binary))
    if binary:
        (folder / "coarse_label_names.txt").write_text("\n".join(COARSE))
        (folder / "fine_label_names.txt").write_text("\n".join(FINE))
    else:
        names = {"fine_label_names": FINE, "coarse_label_names": COARSE}
        (folder / "meta").write_bytes(python2_pickle(names))
    return folder


@pytest.mark.parametrize("binary", [True, False])
def test_cifar_10(tmp_path, binary):
    folder = write_ten(tmp_path, binary)
    source = open_source(folder, splits=["test"])
    assert source.formats == {str(folder): "cifar"}
    records = list(source)
    assert [record.extra for record in records] == [
        {"split": "test", "label": name} for name in ("airplane", "cat", "bird")
    ]
    suffix = ".bin" if binary else ""
    assert [record.image_id for record in records] == [f"test_batch{suffix}:{n}" for n in range(3)]
    assert records[1].key == f"{folder}/test_batch{suffix}:1"
    shown = np.stack([np.asarray(decode_image(record)) for record in records])
    assert np.array_equal(shown.transpose(0, 3, 1, 2), pixels(3, 6))
    train = list(open_source(f"{folder}/", splits=["train"]))
    assert [record.extra["label"] for record in train[::2]] == TEN[1:6]
    assert open_source(folder).count() == 13


@pytest.mark.parametrize("binary", [True, False])
def test_cifar_100(tmp_path, binary):
    records = list(open_source(write_hundred(tmp_path, binary)))
    assert [record.extra for record in records] == [
        {"split": "train", "coarse_label": "fish", "label": "ray"},
        {"split": "train", "coarse_label": "people", "label": "boy"},
        {"split": "test", "coarse_label": "fish", "label": "trout"},
    ]
    assert np.array_equal(np.asarray(decode_image(records[2])).transpose(2, 0, 1), pixels(1, 2)[0])


def test_what_is_missing_is_named_with_what_to_download(tmp_path):
    advice = rf"download {{}} from https://www\.cs\.toronto\.edu/~kriz/cifar\.html and unpack it in {tmp_path}"
    for name, archive in [
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        ("cifar-100-python", "cifar-100-python.tar.gz"),
    ]:
        with pytest.raises(FileNotFoundError, match=f"{name}/.* does not exist: {advice.format(archive)}"):
            open_source(tmp_path / name)
    folder = write_ten(tmp_path, binary=True)
    (folder / "data_batch_4.bin").unlink()
    assert open_source(folder, splits=["test"]).count() == 3
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin does not exist: download cifar-10-binary"):
        open_source(folder)
    with pytest.raises(ValueError, match="has the splits train, test, not val"):
        open_source(folder, splits=["val"])
    with pytest.raises(ValueError, match="is no folder of CIFAR: keep the names cifar-10-batches-bin"):
        open_source(tmp_path, format="cifar")


def read_all(folder):
    return [record for shard in open_cifar(str(folder)) for record in shard.read()]


def test_damaged_binary_files(tmp_path):
    folder = write_ten(tmp_path, binary=True)
    file = folder / "test_batch.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"test_batch\.bin is damaged.* not records of 3073"):
            read_all(folder)
    file.write_bytes(b"\x0a" + whole[1:])
    broken = [record for record in read_all(folder) if record.problem]
    assert [(record.key, record.problem) for record in broken] == [(f"{file}:0", "label 10 is none of the 10 classes")]
    file.write_bytes(whole)
    (folder / "batches.meta.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt is damaged: it has no list of names"):
        open_cifar(str(folder))


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


def test_pickles_run_no_code(tmp_path, capsys):
    folder = write_ten(tmp_path, binary=False)
    file = folder / "test_batch"
    flat = pixels(2, 0).reshape(2, -1)
    reasons = {
        pickle.dumps({"data": Harmful()}, protocol=2): "tries to load '__builtin__.print'",
        pickle.dumps({"labels": [1, 2], "data": flat}): "tries to load 'numpy",
        b"\x80\x02cnumpy\nload\nU\x01xR.": "tries to load 'numpy.load'",
        ten([1, 2], 0, False)[:-2000]: "not a pickle of CIFAR",
        b"": "not a pickle of CIFAR",
        b"\x80\x02K\x01.": "of a int",
        b"\x80\x02cnumpy\nndarray\n}U\x04nameU\x01xsb.": "not a pickle of CIFAR",
        python2_pickle({"labels": [1, 2]}): "'data' are not rows of 3072 bytes",
        python2_pickle({"labels": [1, 2], "data": flat.astype(np.int64)}): "'data' are not rows of 3072 bytes",
        python2_pickle({"labels": [1, 2], "data": flat[:, :-1]}): "'data' are not rows of 3072 bytes",
        python2_pickle({"labels": [1], "data": flat}): "'labels' must be 2 whole numbers",
        python2_pickle({"labels": ["1", "2"], "data": flat}): "'labels' must be 2 whole numbers",
    }
    for content, reason in reasons.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"test_batch is .*{reason}"):
            read_all(folder)
    (folder / "batches.meta").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"batches\.meta is not a pickle of CIFAR: it tries to load"):
        open_cifar(str(folder))
    assert capsys.readouterr().out == ""
