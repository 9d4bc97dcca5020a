"""Files that are whole or absent: written under another name and then moved, with the digest of what was written."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_AT_ONCE = 1 << 22


class HashedFile:
    """A file being written; `bytes` and `sha256` are of all that was written so far."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.bytes += len(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[HashedFile]:
    """A file that takes the name `path` once the context ends without an error; it replaces one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as stream:
            yield HashedFile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a small file so that it is whole or absent."""
    with whole_file(path) as file:
        file.write(content)


def remove_unfinished(folder: Path) -> None:
    """Removes what writers left in `folder` that were killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_parts(path: Path) -> Iterator[bytes]:
    """The content of a file in parts of some megabytes."""
    with path.open("rb") as stream:
        while part := stream.read(_AT_ONCE):
            yield part


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock file at `path`, and yields False if another process holds it.

    The system lets a lock go with its process, however that ends. Where there are no such locks it yields True.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second one there", path.parent, error.strerror)
        yield True
