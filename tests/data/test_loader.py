import json
import multiprocessing
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.data import loader as loader_module
from triptych.data.loader import Loader, mix, read_once, seeded
from triptych.data.samples import BrokenSample, decode_image
from triptych.data.sources import open_source
from triptych.data.transforms import Preprocessing

TRANSFORM = Preprocessing(8).train_transform()


def prepare(record, seed):
    """The record's number, its captions, and its augmented pixels."""
    with seeded(seed):
        pixels_CHW = TRANSFORM(decode_image(record))
    return record.image_id, record.captions, pixels_CHW


def prepare_key(record, seed):
    return record.key


def prepare_seed(record, seed):
    decode_image(record)
    return seed


def prepare_nothing(record, seed):
    raise BrokenSample(record.key, "never")


def prepare_wrongly(record, seed):
    raise KeyError("a bug")


def collate(examples):
    ids, captions, pixels = zip(*examples, strict=True)
    return list(ids), list(captions), torch.stack(pixels)


def png(number):
    file = BytesIO()
    Image.new("RGB", (12, 10), (number, 255 - number, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, numbers, broken=()):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            caption = json.dumps({"image_id": number, "captions": [f"{number} a", f"{number} b"]}).encode()
            contents = {"png": png(number), "json": caption}
            if number in broken:  # every other one by its picture, the rest by its text
                contents["png" if number % 2 else "json"] = b"\x89broken"
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


BROKEN = {0, 7, 8, 13, 22, 23, 29}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 records, 7 of them broken, in 6 shards, of which one is empty."""
    folder = tmp_path_factory.mktemp("shards")
    for index, numbers in enumerate([range(7), range(7, 9), range(9, 18), [], range(18, 27), range(27, 30)]):
        write_tar(folder / f"{index}.tar", numbers, BROKEN)
    return open_source(folder / "{0..5}.tar")


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """The same 30 records as references."""
    folder = tmp_path_factory.mktemp("lists")
    lines = []
    for number in range(30):
        (folder / f"{number}.png").write_bytes(b"broken" if number in BROKEN and number % 2 else png(number))
        captions = [f"{number} a", f"{number} b"]
        line = json.dumps({"image": f"{number}.png", "captions": captions, "image_id": number})
        lines.append("{" if number in BROKEN and number % 2 == 0 else line)
    (folder / "list.jsonl").write_text("\n".join(lines))
    return open_source(folder / "list.jsonl")


@pytest.fixture(params=["shards", "lists"])
def source(request):
    return request.getfixturevalue(request.param)


def make(source, **options):
    options = {"batch_size": 4, "seed": 5, "window": 2, **options}
    return Loader(source, options.pop("prepare", prepare), options.pop("collate", collate), **options)


def take(loader, batches):
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(batches)]
    iterator.close()
    return taken


def ids(batches):
    return [number for batch in batches for number in batch[0]]


def same(batches, others):
    return len(batches) == len(others) and all(
        one[:2] == other[:2] and torch.equal(one[2], other[2]) for one, other in zip(batches, others, strict=True)
    )


def test_batches_do_not_depend_on_the_number_of_workers(source):
    loaders = [make(source, workers=workers) for workers in (0, 1, 2)]
    results = [take(loader, 14) for loader in loaders]
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert all(len(batch[0]) == 4 for batch in results[0])
    assert loaders[0].state_dict() == loaders[1].state_dict() == loaders[2].state_dict()
    assert loaders[0].skipped == loaders[1].skipped == loaders[2].skipped


def test_exact_resume_at_every_batch(source):
    """Through two epochs: across windows, epochs and broken records, which 23 good records in batches of 4 are."""
    whole = make(source)
    iterator = iter(whole)
    batches, states = [], [json.dumps(whole.state_dict())]
    for _ in range(14):
        batches.append(next(iterator))
        states.append(json.dumps(whole.state_dict()))
    assert len(set(states)) == 15
    for start, state in enumerate(states[:-1]):
        resumed = make(source)
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert same(take(resumed, 14 - start), batches[start:])
        assert json.dumps(resumed.state_dict()) == states[-1]
        assert resumed.skipped_count == whole.skipped_count


@pytest.mark.parametrize(("saving", "resuming"), [(2, 0), (0, 2), (1, 2), (2, 1)])
def test_exact_resume_with_other_workers(shards, saving, resuming):
    batches = take(make(shards), 12)
    for start in (1, 5, 7):
        saver = make(shards, workers=saving)
        assert same(take(saver, start), batches[:start])
        resumed = make(shards, workers=resuming)
        resumed.load_state_dict(saver.state_dict())
        assert same(take(resumed, 12 - start), batches[start:])


def test_resume_with_another_batch_size(shards):
    loader = make(shards)
    head = ids(take(loader, 3))
    other = make(shards, batch_size=6)
    other.load_state_dict(loader.state_dict())
    assert head + ids(take(other, 4)) == ids(take(make(shards), 9))


def test_each_epoch_is_a_permutation_of_the_good_records(source):
    loader = make(source, batch_size=23)
    first, second, third = (batch[0] for batch in take(loader, 3))
    good = sorted(str(number) for number in range(30) if number not in BROKEN)
    assert sorted(first) == sorted(second) == sorted(third) == good
    assert first != second != third
    assert first != good
    assert take(make(source, batch_size=23, seed=6), 1)[0][0] != first


def test_augmentation_differs_between_epochs_and_samples(shards):
    batches = take(make(shards, batch_size=23, shuffle=False), 2)
    assert ids(batches[:1]) == ids(batches[1:])
    assert sum(map(torch.equal, batches[0][2], batches[1][2])) < 12  # of 23; the pictures are of one colour
    constant = make(shards, batch_size=23, prepare=prepare_seed, collate=list)
    assert len({seed for batch in take(constant, 2) for seed in batch}) == 46


def test_without_shuffling_the_order_is_that_of_the_source(source):
    assert ids(take(make(source, shuffle=False, batch_size=23), 1)) == [str(n) for n in range(30) if n not in BROKEN]


def test_broken_records_are_counted_and_listed(source):
    loader = make(source, batch_size=23)
    take(loader, 1)
    assert loader.skipped_count <= 7
    take(loader, 2)
    assert 14 <= loader.skipped_count <= 21
    assert len({key for key, _ in loader.skipped}) == 7
    reasons = " ".join(reason for _, reason in loader.skipped)
    assert "no known format" in reasons
    assert loader.skipped_count == len(loader.skipped)  # none is left out below the cap


def test_the_list_of_broken_records_is_bounded(lists, monkeypatch):
    monkeypatch.setattr(loader_module, "LISTED", 3)
    loader = make(lists)
    take(loader, 20)
    assert len(loader.skipped) == 3
    assert loader.skipped_count > 15


@pytest.mark.parametrize("world", [2, 3, 6, 7, 40])
def test_ranks_are_disjoint_and_cover_everything(source, world):
    """With more ranks than shards, records are dealt instead of shards."""
    seen = Counter()
    for rank in range(world):
        # each record once: the positions of the first epoch, whatever this rank's share
        order = make(source, rank=rank, world=world)._order
        for epoch in (0, 1):
            for window, part in enumerate(order.windows(source, epoch)):
                seen.update((epoch, record.key) for record in order.read(source, part, epoch, window))
    assert len(seen) == 60
    assert set(seen.values()) == {1}


def test_ranks_give_disjoint_batches(source):
    batches = [ids(take(make(source, rank=rank, world=2, batch_size=1), 7)) for rank in (0, 1)]
    assert not set(batches[0]) & set(batches[1])
    assert all(len(set(part)) == 7 for part in batches)


def test_per_caption_gives_each_caption_once_and_apart(source):
    loader = make(source, per_caption=True, batch_size=46)
    (numbers, captions, _), (_, again, _) = take(loader, 2)
    expected = sorted(f"{number} {letter}" for number in range(30) if number not in BROKEN for letter in "ab")
    assert sorted(caption for (caption,) in captions) == expected
    assert captions != again
    beside = sum(one == other for one, other in pairwise(numbers))
    assert beside < 12  # 23 if the captions of a picture stayed together
    loader = make(source, per_caption=True)
    state = (take(loader, 5), loader.state_dict())[1]
    other = make(source, per_caption=True, workers=1)
    other.load_state_dict(state)
    assert same(take(other, 5), take(loader, 5))


def test_windows_are_read_as_they_are_needed(shards):
    read = []

    class Spy:
        def __init__(self, shard):
            self.shard, self.name = shard, shard.name

        def read(self):
            read.append(self.name)
            return self.shard.read()

    spied = type(shards)(tuple(map(Spy, shards.shards)))
    loader = make(spied, window=1, batch_size=1)
    take(loader, 1)
    assert len(read) <= 3
    take(loader, 14)
    state = loader.state_dict()
    read.clear()
    resumed = make(spied, window=1, batch_size=1)
    resumed.load_state_dict(state)
    take(resumed, 1)
    assert len(read) <= 3


def test_the_states_of_other_orders_are_refused(shards):
    state = make(shards).state_dict()
    for options in ({"seed": 6}, {"window": 3}, {"world": 2}, {"shuffle": False}, {"per_caption": True}):
        with pytest.raises(ValueError, match=f"saved with {{'{next(iter(options))}'"):
            make(shards, **options).load_state_dict(state)
    with pytest.raises(ValueError, match="shards"):
        make(type(shards)(shards.shards[:4])).load_state_dict(state)


def test_an_iterator_ends_when_the_loader_moves(shards):
    loader = make(shards)
    old = iter(loader)
    next(old)
    state = loader.state_dict()
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="iterated anew"):
        next(old)
    assert loader.state_dict() == state


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_without_a_usable_record_is_an_error(source, workers):
    with pytest.raises(ValueError, match=r"no usable record among the last 3\d"):
        take(make(source, prepare=prepare_nothing, workers=workers), 1)


def test_a_long_run_of_broken_records_is_an_error(lists, monkeypatch):
    monkeypatch.setattr(loader_module, "LONGEST_BROKEN_RUN", 11)
    with pytest.raises(ValueError, match="among the last 11; the last: never"):
        take(make(lists, prepare=prepare_nothing), 1)


def test_a_rank_without_records_is_an_error(tmp_path):
    write_tar(tmp_path / "0.tar", [1])
    with pytest.raises(ValueError, match="no records for rank 1 of 2"):
        take(make(open_source(tmp_path / "0.tar"), rank=1, world=2), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_taken_for_broken_records(shards, workers):
    with pytest.raises(KeyError, match="a bug"):
        take(make(shards, prepare=prepare_wrongly, workers=workers), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_an_error(tmp_path, workers):
    write_tar(tmp_path / "0.tar", range(9))
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:700])
    with pytest.raises(ValueError, match=r"0\.tar is damaged"):
        take(make(open_source(tmp_path / "0.tar"), workers=workers), 1)
    source = open_source(tmp_path / "0.tar")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(FileNotFoundError):
        take(make(source, workers=workers), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_a_damaged_shard_still_come(tmp_path, workers):
    write_tar(tmp_path / "0.tar", range(11))
    write_tar(tmp_path / "1.tar", range(11))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    source = open_source(tmp_path / "{0,1}.tar")
    iterator = iter(make(source, workers=workers, window=1, shuffle=False, batch_size=11))
    assert next(iterator)[0] == [str(number) for number in range(11)]
    with pytest.raises(ValueError, match=r"1\.tar is damaged"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_the_process_is_left_alone(shards, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(make(shards, workers=workers), 8)
    list(read_once(shards, prepare, collate, batch_size=8, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    first = take(make(shards), 3)
    torch.manual_seed(2)
    assert same(take(make(shards), 3), first)


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        drawn = torch.rand(3)
    with seeded(3):
        assert torch.equal(torch.rand(3), drawn)
    with seeded(mix(1, 2)):
        assert not torch.equal(torch.rand(3), drawn)
    assert mix(1, 2) != mix(2, 1)
    assert mix(1, 23) != mix(12, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_read_once_gives_everything_in_order(source, workers, caplog):
    batches = list(read_once(source, prepare, collate, batch_size=5, workers=workers))
    assert [len(batch[0]) for batch in batches] == [5, 5, 5, 5, 3]
    assert ids(batches) == [str(number) for number in range(30) if number not in BROKEN]
    assert sum("skipped /" in message for message in caplog.messages) == 7
    assert caplog.messages[-1] == "skipped 7 of 30 records"
    assert same(batches, list(read_once(source, prepare, collate, batch_size=5)))


def test_read_once_without_loss_says_nothing(tmp_path, caplog):
    write_tar(tmp_path / "good.tar", range(7))
    assert len(list(read_once(open_source(tmp_path / "good.tar"), prepare, list, batch_size=5))) == 2
    assert caplog.messages == []


def test_read_once_splits_evenly_between_ranks(source):
    parts = [
        [key for batch in read_once(source, prepare_key, list, batch_size=4, rank=rank, world=4) for key in batch]
        for rank in range(4)
    ]
    usable = [record.key for record in source]
    assert sorted(key for part in parts for key in part) == sorted(usable)
    assert max(map(len, parts)) <= 8
    assert len(list(read_once(source, prepare, collate, batch_size=1, rank=39, world=40))) == 0


def test_read_once_per_caption_and_errors(shards):
    batches = read_once(shards, prepare, collate, batch_size=50, per_caption=True)
    assert next(batches)[1][:4] == [("1 a",), ("1 b",), ("2 a",), ("2 b",)]
    with pytest.raises(ValueError, match="no usable record"):
        list(read_once(shards, prepare_nothing, collate, batch_size=5))
    with pytest.raises(ValueError, match="rank"):
        list(read_once(shards, prepare, collate, batch_size=5, rank=1))


def test_bad_settings(shards):
    for options in ({"batch_size": 0}, {"rank": 1}, {"workers": -1}, {"window": 0}, {"rank": -1, "world": 2}):
        with pytest.raises(ValueError, match="must be"):
            make(shards, **options)


def test_workers_and_threads_end(shards):
    for stop in ("close", "delete", "error"):
        iterator = iter(make(shards, workers=2, prepare=prepare_wrongly if stop == "error" else prepare))
        if stop == "error":
            with pytest.raises(KeyError):
                next(iterator)
        else:
            next(iterator)
        if stop == "close":
            iterator.close()
        del iterator
        patience = time.monotonic() + 20
        while time.monotonic() < patience and (multiprocessing.active_children() or reading()):
            time.sleep(0.02)
        assert not multiprocessing.active_children()
        assert not reading()


INTERRUPTED = """
import os, signal, sys, threading
from triptych.data.loader import Loader
from triptych.data.sources import open_source

def prepare(record, seed):
    return os.getpid()

if __name__ == "__main__":
    loader = Loader(open_source(sys.argv[1]), prepare, list, batch_size=3, seed=0, workers=2, window=1)
    pids = set()
    try:
        for index, batch in enumerate(loader):
            pids.update(batch)
            if index == 20:
                os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print(*pids, flush=True)
"""


def test_an_interrupt_leaves_no_process_behind(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(Path(shards.shards[0].name).parent / "*.tar")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    pids = result.stdout.split()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def reading():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
