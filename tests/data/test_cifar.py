"""CIFAR's folders: what torchvision reads of them, what is missing or damaged, and that no other pickle is opened."""

import hashlib
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from triptych.data.samples import decode_image
from triptych.data.sources import open_source

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = ["boy", "ray", "trout"]


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def batch(key, labels, seed):
    return {"data": pixels(len(labels), seed).reshape(len(labels), -1), key: labels}


def write(folder, monkeypatch, dataset, train, test, meta):
    """An official folder of few pictures, whose checksums torchvision takes for the official ones."""
    folder.mkdir()
    sums = {}
    for name, content in {**train, **test, dataset.meta["filename"]: meta}.items():
        encoded = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(encoded)
        sums[name] = hashlib.md5(encoded).hexdigest()
    monkeypatch.setattr(dataset, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(dataset, "test_list", [[name, sums[name]] for name in test])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[dataset.meta["filename"]]})
    return folder


@pytest.fixture
def ten(tmp_path, monkeypatch):
    train = {f"data_batch_{number}": batch("labels", [number, 9], number) for number in range(1, 6)}
    test = {"test_batch": batch("labels", [0, 3, 2], 6)}
    return write(tmp_path / "cifar-10-batches-py", monkeypatch, CIFAR10, train, test, {"label_names": TEN})


def test_cifar_10(ten):
    source = open_source(ten, splits=["test"])
    assert source.formats == {str(ten): "cifar"}
    records = list(source)
    assert [record.extra for record in records] == [
        {"split": "test", "label": name} for name in ("airplane", "cat", "bird")
    ]
    assert [record.image_id for record in records] == ["test:0", "test:1", "test:2"]
    assert records[1].key == f"{ten}/test:1"
    shown = np.stack([np.asarray(decode_image(record)) for record in records])
    assert np.array_equal(shown.transpose(0, 3, 1, 2), pixels(3, 6))
    train = list(open_source(f"{ten}/", splits=["train"]))
    assert [record.extra["label"] for record in train[::2]] == TEN[1:6]
    assert open_source(ten).count() == 13


def test_cifar_100(tmp_path, monkeypatch):
    train, test = {"train": batch("fine_labels", [1, 0], 1)}, {"test": batch("fine_labels", [2], 2)}
    folder = write(tmp_path / "cifar-100-python", monkeypatch, CIFAR100, train, test, {"fine_label_names": FINE})
    records = list(open_source(folder))
    assert [record.extra for record in records] == [
        {"split": "train", "label": "ray"},
        {"split": "train", "label": "boy"},
        {"split": "test", "label": "trout"},
    ]
    assert np.array_equal(np.asarray(decode_image(records[2])).transpose(2, 0, 1), pixels(1, 2)[0])


def test_what_is_missing_is_named_with_what_to_download(ten, tmp_path):
    advice = rf"download {{}} from https://www\.cs\.toronto\.edu/~kriz/cifar\.html and unpack it in {tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"meta does not exist: {advice.format('cifar-100-python.tar.gz')}"):
        open_source(tmp_path / "cifar-100-python")
    (ten / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4 does not exist: download cifar-10-python"):
        open_source(ten)
    with pytest.raises(ValueError, match="has the splits train, test, not val"):
        open_source(ten, splits=["val"])
    with pytest.raises(ValueError, match="is no folder of CIFAR for Python: keep the names cifar-10-batches-py"):
        open_source(tmp_path, format="cifar")
    with pytest.raises(ValueError, match="cifar-100-binary is no folder of CIFAR for Python"):
        open_source(tmp_path / "cifar-100-binary")


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("name", ["test_batch", "data_batch_1", "batches.meta"])
def test_what_is_not_the_official_file_is_never_unpickled(ten, name, capsys):
    (ten / name).write_bytes(pickle.dumps({"data": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match=r"is damaged or not the official one .* unpack cifar-10-python\.tar\.gz"):
        list(open_source(ten, splits=["test"]))
    assert capsys.readouterr().out == ""


def test_a_list_of_another_name_is_no_folder_of_cifar(tmp_path):
    file = tmp_path / "cifar-10-captions.jsonl"
    file.write_text('{"image": "a.jpg", "caption": "a frog"}\n')
    assert open_source(file).formats[str(file)] == "captions"
