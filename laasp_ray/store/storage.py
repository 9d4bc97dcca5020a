"""A folder of named byte strings, on the local disk or on any filesystem of pyarrow (s3://, gs://, ...).

Every write is complete or absent: after a process is killed, the old content or the new content is there, never a part.
pyarrow is imported only for folders that are not local, so that a saved network can be read without pyarrow.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from laasp_ray.errors import StoreError
from laasp_ray.store.addresses import public, public_text

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_WITHOUT_FOLDERS = frozenset({"s3", "gcs"})
_NO_FOLDER_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.EBADF, errno.EACCES, errno.EPERM}
)
"""Errors of filesystems that cannot sync a folder (CIFS, FUSE). A full or broken disk raises other errors."""
_ONE_PUT = "allow_delayed_open"
_PROBE = "write-probe"
_KINDS = {
    list: "a list",
    type(None): "null",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
_STALE_AFTER_S = 600.0


class _Folder(Protocol):
    """The operations of a filesystem. Names are relative and already checked. Errors are OSError."""

    def write(self, name: str, data: bytes) -> None: ...
    def write_new(self, name: str, data: bytes) -> None: ...
    def read(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def list(self, folder: str) -> list[str]: ...
    def delete(self, name: str) -> None: ...
    def delete_leftovers(self, folder: str, older_than_s: float) -> None: ...
    def child(self, name: str) -> _Folder: ...
    def nearest(self) -> _Folder: ...


class Storage:
    """A folder, local or on object storage. Names use '/', are relative to the folder and stay inside it.

    Every method raises StoreError, naming the place, if the folder cannot be reached, read or written. A Storage can be
    pickled, so that workers can receive the driver's. `uri` does not contain the credentials of the address.
    """

    def __init__(self, uri: str, folder: _Folder) -> None:
        self.uri = uri
        self._folder = folder

    @staticmethod
    def open(uri: str) -> Storage:
        """The folder at `uri`: a local path, relative or absolute, file:///path, s3://bucket/path, gs://bucket/path.

        It need not exist; the first write creates it. Nothing is written here (see `check_writable`). Raises StoreError
        for a scheme that pyarrow does not know, a bucket that cannot be reached, or a path that is a file.
        """
        scheme = _SCHEME.match(uri)
        if scheme is not None and scheme.group(1).lower() != "file":
            return Storage(public(uri), _open_remote(uri))
        path = _local_path(uri, is_uri=scheme is not None)
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file, a folder is needed; name another folder")
        return Storage(str(path), _LocalFolder(path))

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def local_path(self) -> Path | None:
        """The folder's absolute path, or None if it is not on a local filesystem."""
        return self._folder.path if isinstance(self._folder, _LocalFolder) else None

    def child(self, name: str) -> Storage:
        """The folder `name` inside this one."""
        base, mark, query = self.uri.partition("?") if self.local_path is None else (self.uri, "", "")
        return Storage(f"{base.rstrip('/')}/{_checked(name)}{mark}{query}", self._folder.child(name))

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`, replacing any earlier content. Creates folders as needed."""
        with self._explained("write", name):
            self._folder.write(_checked(name), data)

    def write_new(self, name: str, data: bytes) -> None:
        """As `write`, but raises StoreError if `name` exists.

        On a local filesystem with hard links only one of two concurrent writers succeeds. Elsewhere the check is made
        just before the write, and the journal checks again afterwards.
        """
        with self._explained("write", name):
            self._folder.write_new(_checked(name), data)

    def read(self, name: str) -> bytes:
        """Reads the content of `name`. Raises StoreError if it does not exist."""
        with self._explained("read", name):
            return self._folder.read(_checked(name))

    def read_json(self, name: str, remedy: str = "restore it from a copy") -> dict[str, Any]:
        """The JSON object in `name`. Raises StoreError, with the `remedy`, if it holds anything else."""
        place, raw = f"{name} in {self.uri}", self.read(name)
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{place} is damaged: it is not JSON ({error}); {remedy}") from error
        if not isinstance(content, dict):
            raise StoreError(f"{place} is damaged: it holds {_KINDS[type(content)]}, not a JSON object; {remedy}")
        return content

    def exists(self, name: str) -> bool:
        with self._explained("look for", name):
            return self._folder.exists(_checked(name))

    def list(self, prefix: str = "") -> list[str]:
        """All names in the folder and its subfolders that start with `prefix`, sorted, without unfinished writes."""
        inside = prefix.rpartition("/")[0]
        with self._explained("list", prefix or "."):
            names = self._folder.list(_checked(inside) if inside else "")
        return sorted(name for name in names if name.startswith(prefix) and not _is_aside(name))

    def delete(self, name: str) -> None:
        """Removes `name`. Raises StoreError if it does not exist."""
        with self._explained("delete", name):
            self._folder.delete(_checked(name))

    def delete_leftovers(self, folder: str, older_than_s: float = _STALE_AFTER_S) -> None:
        """Removes from `folder` the unfinished files of killed processes (local filesystems only).

        Files that are younger than `older_than_s` seconds stay, because another process may be writing them.
        """
        with self._explained("clean", folder):
            self._folder.delete_leftovers(_checked(folder), older_than_s)

    def check_writable(self) -> None:
        """Tries all operations of a run with a small object: write it new, list, read, replace and remove it.

        Nothing is left behind: if a local folder does not exist yet, its nearest existing parent is tried. Raises
        StoreError if an operation fails.
        """
        probe = f"{_PROBE}-{uuid.uuid4().hex}"
        with self._explained("write", probe):
            tried = Storage(self.uri, self._folder.nearest())
        try:
            tried.write_new(probe, b"new")
            listed = probe in tried.list(probe) if tried.local_path is None else tried.exists(probe)
            first = tried.read(probe)
            tried.write(probe, probe.encode())
            if not listed or first != b"new" or tried.read(probe) != probe.encode():
                raise StoreError(f"{self.uri} does not give back what was written; name another folder")
        except StoreError:
            with contextlib.suppress(StoreError):
                tried.delete(probe)
            raise
        tried.delete(probe)

    @contextlib.contextmanager
    def _explained(self, action: str, name: str) -> Iterator[None]:
        place = f"{name} in {self.uri}"
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"cannot {action} {place}: it does not exist; is this a run's folder?") from error
        except FileExistsError as error:
            raise StoreError(f"cannot {action} {place}: it exists already; does another driver run?") from error
        except (OSError, ValueError, NotImplementedError) as error:
            raise StoreError(
                f"cannot {action} {place}: {error}; check that the folder can be written, has room, "
                "and that the credentials allow it, or name another folder"
            ) from error


class _LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def child(self, name: str) -> _LocalFolder:
        return _LocalFolder(self.path / name)

    def nearest(self) -> _LocalFolder:
        """This folder, or its nearest parent that exists."""
        path = next((path for path in (self.path, *self.path.parents) if os.path.lexists(path)), self.path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        return _LocalFolder(path)

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
                if not os.path.samefile(aside, target):  # NFS may repeat a link request that has succeeded
                    raise
            except OSError as error:  # filesystems without hard links raise various errors
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
            if _is_aside(name) and path.exists() and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)


class _ArrowFolder:
    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def child(self, name: str) -> _ArrowFolder:
        return _ArrowFolder(self._filesystem, self._path(name))

    def nearest(self) -> _ArrowFolder:
        """This folder: on object storage a folder need not exist."""
        return self

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root and name else self._root or name

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        parent = path.rpartition("/")[0]
        if parent and self._filesystem.type_name not in _WITHOUT_FOLDERS:
            self._filesystem.create_dir(parent, recursive=True)
        with self._filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def write_new(self, name: str, data: bytes) -> None:
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
        """Does nothing: an unfinished write on object storage leaves nothing that can be listed."""


def _open_remote(uri: str) -> _Folder:
    import pyarrow
    from pyarrow.fs import FileSystem

    remedy = "use a local path, file:///path, s3://bucket/path or gs://bucket/path, and check the credentials"
    try:
        filesystem, root = _from_uri(FileSystem, uri)
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        reason = public_text((str(error).splitlines() or [type(error).__name__])[0], uri)
        # The cause is dropped because its traceback would show the address with its credentials.
        raise StoreError(f"cannot open the storage {public(uri)}: {reason}; {remedy}") from None
    if not root.strip("/"):
        raise StoreError(f"the storage {public(uri)} names no bucket or folder; {remedy}")
    return _ArrowFolder(filesystem, root)


def _from_uri(kind: Any, uri: str) -> tuple[Any, str]:
    """Opens the filesystem of an address. S3 writes small objects in one request instead of three, if pyarrow supports
    it.
    """
    if uri.lower().startswith("s3://") and _ONE_PUT not in uri:
        try:
            return kind.from_uri(f"{uri}{'&' if '?' in uri else '?'}{_ONE_PUT}=true")
        except ValueError as error:
            if _ONE_PUT not in str(error):
                raise
    return kind.from_uri(uri)


def _local_path(uri: str, *, is_uri: bool) -> Path:
    if not uri:
        raise StoreError("the storage is an empty path; name a folder or a URI such as s3://bucket/path")
    if is_uri:
        parts = urllib.parse.urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreError(f"{uri} names no local folder; write it with three slashes, file:///absolute/path")
        uri = urllib.parse.unquote(parts.path)
    return Path(os.path.abspath(Path(uri).expanduser()))


def _checked(name: str) -> str:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise StoreError(f"{name!r} is no name inside a run's folder; use a relative one, as journal/a.json")
    return name


def _is_aside(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith(".") and base.endswith(".tmp")


@contextlib.contextmanager
def _written_aside(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` next to `target`. It is removed at the end if it still exists."""
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
    """Makes the folder's new entry survive a power cut, if the filesystem can. Windows cannot open a folder."""
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
