"""What those who write data sets share: files that appear only when complete, and tar members."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block ends well, and vanishes otherwise; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """The same for a tar file to write to."""
    with replacing(path) as file, tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        yield tar


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file with no trace of time or user, so that the same data make the same tar."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))
