"""A folder on the local disk, as store/storage.py uses it: every write is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_NO_FOLDER_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.EBADF, errno.EACCES, errno.EPERM}
)
"""What filesystems answer that cannot sync a folder (CIFS, FUSE); a full or broken disk answers otherwise."""


class LocalFolder:
    """Names are relative and already checked; errors are OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def hide(self, text: str) -> str:
        """`text` as it is: a local path holds no credentials."""
        return text

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def nearest(self) -> LocalFolder:
        """This folder, or the closest one above it that exists."""
        path = next((path for path in (self.path, *self.path.parents) if os.path.lexists(path)), self.path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        return LocalFolder(path)

    def write(self, name: str, data: bytes) -> None:
        target = self.path / name
        with _written_aside(target, data) as aside:
            os.replace(aside, target)
        _sync_folder(target.parent)

    def write_new(self, name: str, data: bytes) -> None:
        target = self.path / name
        with _written_aside(target, data) as aside:
            try:
                os.link(aside, target)
            except FileExistsError:
                if not os.path.samefile(aside, target):  # NFS may repeat a link that it has made
                    raise
            except OSError as error:  # filesystems without hard links refuse them in many ways
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, "exists", str(target)) from error
                os.replace(aside, target)
        _sync_folder(target.parent)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def list(self, folder: str) -> list[str]:
        found: list[str] = []
        top = self.path / folder
        for where, _, files in os.walk(top, onerror=_raise) if top.is_dir() else ():
            below = Path(where).relative_to(self.path)
            found += [(below / file).as_posix() for file in files]
        return found

    def delete(self, name: str) -> None:
        (self.path / name).unlink()

    def delete_leftovers(self, folder: str, older_than_s: float) -> None:
        for name in self.list(folder):
            path = self.path / name
            if is_aside(name) and path.exists() and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)


def is_aside(name: str) -> bool:
    """Whether a name is that of a write under way, or of one that was cut off."""
    base = name.rpartition("/")[2]
    return base.startswith(".") and base.endswith(".tmp")


@contextlib.contextmanager
def _written_aside(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` beside `target`; if it is still there at the end, it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    raise error


def _sync_folder(folder: Path) -> None:
    """Makes the folder's new entry outlast a power cut, where the filesystem can; Windows cannot open a folder."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
