"""A folder on one of pyarrow's filesystems (S3, Google Cloud Storage, ...), as store/storage.py uses it.

pyarrow reads, lists and writes; what must be written only where nothing is goes through store.puts.py.
"""

from __future__ import annotations

import errno
import logging
from typing import Any, Protocol

from laasp_ray.store.addresses import public_text
from laasp_ray.store.puts import GoogleWriter, S3Writer, UnsupportedError

logger = logging.getLogger(__name__)
_WITHOUT_FOLDERS = frozenset({"s3", "gcs"})


class _Writer(Protocol):
    def put_new(self, path: str, data: bytes) -> None: ...


class ArrowFolder:
    """Names are relative and already checked; errors are OSError. `address` may hold credentials: see `hide`."""

    def __init__(self, filesystem: Any, root: str, address: str = "", writer: _Writer | None = None) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._address = address
        self._writer = writer or _writer_of(filesystem, address)

    def hide(self, text: str) -> str:
        """`text` without the credentials of the address."""
        return public_text(text, self._address) if self._address else text

    def child(self, name: str) -> ArrowFolder:
        return ArrowFolder(self._filesystem, self._path(name), self._address, self._writer)

    def nearest(self) -> ArrowFolder:
        """This folder: object storage needs none to be there."""
        return self

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root and name else self._root or name

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if isinstance(self._writer, GoogleWriter):
            self._writer.put(path, data)
            return
        parent = path.rpartition("/")[0]
        if parent and self._filesystem.type_name not in _WITHOUT_FOLDERS:
            self._filesystem.create_dir(parent, recursive=True)
        try:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)
        except FileNotFoundError as error:
            raise self._no_bucket(error) from error

    def write_new(self, name: str, data: bytes) -> None:
        if self._writer is not None:
            try:
                self._writer.put_new(self._path(name), data)
                return
            except UnsupportedError as error:
                logger.warning(
                    "this store cannot write only where nothing is (%s): two drivers of one run at the same moment may "
                    "not be noticed",
                    self.hide(str(error)),
                )
                self._writer = None
        if self.exists(name):
            raise FileExistsError(errno.EEXIST, "exists", name)
        self.write(name, data)

    def read(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(self._path(name), compression=None) as stream:
            return stream.read()

    def exists(self, name: str) -> bool:
        return bool(self._filesystem.get_file_info(self._path(name)).is_file)

    def list(self, folder: str) -> list[str]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._path(folder), allow_not_found=True, recursive=True)
        start = len(self._root) + 1 if self._root else 0
        return [info.path[start:] for info in self._filesystem.get_file_info(selector) if info.is_file]

    def delete(self, name: str) -> None:
        self._filesystem.delete_file(self._path(name))

    def delete_leftovers(self, folder: str, older_than_s: float) -> None:
        """A put on object storage leaves nothing behind that could be listed."""

    def _no_bucket(self, error: FileNotFoundError) -> OSError:
        """On an object store only a bucket can be missing for a write."""
        if self._filesystem.type_name in _WITHOUT_FOLDERS:
            return OSError(f"no such bucket: {self._root.partition('/')[0]} ({error})")
        return error


def _writer_of(filesystem: Any, address: str) -> _Writer | None:
    if address and filesystem.type_name == "s3":
        return S3Writer(address, filesystem.region)
    return GoogleWriter(address) if address and filesystem.type_name == "gcs" else None
