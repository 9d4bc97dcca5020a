"""A folder of named byte strings, on the local disk or on any filesystem of pyarrow (s3://, gs://, ...).

Every write is complete or absent: after a process is killed, the old content or the new content is there, never a part.
pyarrow is imported only for folders that are not local, so that a saved network can be read without pyarrow.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from laasp_ray.errors import StoreError
from laasp_ray.store.addresses import public, public_text
from laasp_ray.store.faults import fault_of
from laasp_ray.store.local import LocalFolder as _LocalFolder
from laasp_ray.store.local import is_aside
from laasp_ray.store.retries import BRIEF_S, PATIENCE_S, first_line, retried

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_PUT, _RETRY_LIMIT = "allow_delayed_open", "retry_limit_seconds"
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
_Result = TypeVar("_Result")


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
    def hide(self, text: str) -> str: ...


class Storage:
    """A folder, local or on object storage. Names use '/', are relative to the folder and stay inside it.

    Every method raises StoreError, saying where, when the folder cannot be reached, read or written: after trying for
    minutes where the trouble may pass, at once where it does not. It pickles, so that a worker can be handed the
    driver's. `uri` is without the credentials that an address may carry.
    """

    def __init__(self, uri: str, folder: _Folder) -> None:
        self.uri = uri
        self._folder = folder
        self._patience_s = PATIENCE_S
        self._guard: Callable[[], None] | None = None

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
        return self._like(f"{base.rstrip('/')}/{_checked(name)}{mark}{query}", self._folder.child(name))

    def brief(self) -> Storage:
        """The same folder for calls that had better fail than wait for minutes."""
        other = self._like(self.uri, self._folder)
        other._patience_s = BRIEF_S
        return other

    def guarded(self, guard: Callable[[], None]) -> Storage:
        """The same folder, where `guard` is called before anything is written or removed; what it raises ends that."""
        other = self._like(self.uri, self._folder)
        other._guard = guard
        return other

    def _like(self, uri: str, folder: _Folder) -> Storage:
        other = copy.copy(self)
        other.uri, other._folder = uri, folder
        return other

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`, replacing any earlier content. Creates folders as needed."""
        self._do("write", name, lambda: self._folder.write(_checked(name), data), changes=True)

    def write_new(self, name: str, data: bytes) -> None:
        """As `write`, but raises StoreError if `name` exists with anything else than `data` in it.

        What has the very same bytes counts as this write, whose answer was lost on the way: two writers must put
        something of their own into theirs. One of two concurrent writers wins on S3, on Google Cloud Storage and on a
        local filesystem with hard links; elsewhere the check comes just before the write.
        """
        self._do("write", name, lambda: self._write_new(_checked(name), data), changes=True)

    def _write_new(self, name: str, data: bytes) -> None:
        try:
            self._folder.write_new(name, data)
        except FileExistsError:
            try:
                ours = self._folder.read(name) == data
            except FileNotFoundError as error:  # S3 says so of two writers at the same moment, too
                raise ConnectionError(f"{name} was said to exist, but does not") from error
            if not ours:
                raise

    def read(self, name: str) -> bytes:
        """Reads the content of `name`. Raises StoreError if it does not exist."""
        return self._do("read", name, lambda: self._folder.read(_checked(name)))

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
        return self._do("look for", name, lambda: self._folder.exists(_checked(name)))

    def list(self, prefix: str = "") -> list[str]:
        """All names in the folder and its subfolders that start with `prefix`, sorted, without unfinished writes."""
        inside = prefix.rpartition("/")[0]
        names = self._do("list", prefix or ".", lambda: self._folder.list(_checked(inside) if inside else ""))
        return sorted(name for name in names if name.startswith(prefix) and not is_aside(name))

    def delete(self, name: str) -> None:
        """Removes `name`. Raises StoreError if it does not exist."""
        tries = 0

        def delete() -> None:
            nonlocal tries
            tries += 1
            try:
                self._folder.delete(_checked(name))
            except FileNotFoundError:
                if tries == 1:  # later it is gone because the answer to an earlier try was lost
                    raise

        self._do("delete", name, delete, changes=True)

    def delete_leftovers(self, folder: str, older_than_s: float = _STALE_AFTER_S) -> None:
        """Removes from `folder` the unfinished files of killed processes (local filesystems only).

        Files that are younger than `older_than_s` seconds stay, because another process may be writing them.
        """
        self._do("clean", folder, lambda: self._folder.delete_leftovers(_checked(folder), older_than_s), changes=True)

    def remove_empty(self, folder: str) -> None:
        """Removes the folder and this one where they are local and empty; object storage has no empty ones."""
        if self.local_path is not None:
            for path in (self.local_path / _checked(folder), self.local_path):
                with contextlib.suppress(OSError):
                    path.rmdir()

    def check_writable(self) -> None:
        """Tries all operations of a run with a small object: write it new, list, read, replace and remove it.

        Leaves nothing behind: where a local folder is not there yet, the one that it will be made in is tried. Raises
        StoreError if that does not work, without long waiting.
        """
        probe = f"{_PROBE}-{uuid.uuid4().hex}"
        tried = self._like(self.uri, self._do("write", probe, self._folder.nearest)).brief()
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

    def _do(self, action: str, name: str, call: Callable[[], _Result], changes: bool = False) -> _Result:
        """What `call` gives, tried again where that helps; its errors as StoreError, without credentials."""
        place, guard = f"{name} in {self.uri}", self._guard if changes else None

        def guarded() -> _Result:
            if guard is not None:
                guard()
            return call()

        try:
            return retried(guarded, place, self._patience_s, self._folder.hide)
        except FileNotFoundError as error:
            raise StoreError(f"cannot {action} {place}: it does not exist; is this a run's folder?") from error
        except FileExistsError as error:
            raise StoreError(f"cannot {action} {place}: it exists already; does another driver run?") from error
        except (OSError, ValueError, NotImplementedError) as error:
            hidden = self._folder.hide(str(error))
            fault, said = fault_of(error), self._folder.hide(first_line(error))
            reason = f"{fault.what} ({said})" if fault.what else said
            # A cause that holds credentials is left out: a traceback would show it.
            cause = error if hidden == str(error) else None
            raise StoreError(f"cannot {action} {place}: {reason}; {fault.remedy}") from cause


def _open_remote(uri: str) -> _Folder:
    import pyarrow
    from pyarrow.fs import FileSystem

    from laasp_ray.store.remote import ArrowFolder

    remedy = "use a local path, file:///path, s3://bucket/path or gs://bucket/path, and check the credentials"
    try:
        filesystem, root = _from_uri(FileSystem, uri)
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        reason = public_text((str(error).splitlines() or [type(error).__name__])[0], uri)
        # The cause is dropped because its traceback would show the address with its credentials.
        raise StoreError(f"cannot open the storage {public(uri)}: {reason}; {remedy}") from None
    if not root.strip("/"):
        raise StoreError(f"the storage {public(uri)} names no bucket or folder; {remedy}")
    return ArrowFolder(filesystem, root, uri)


def _from_uri(kind: Any, uri: str) -> tuple[Any, str]:
    """S3 gets small objects in one request instead of three, where this pyarrow knows how; Google's client leaves
    trying again for minutes to us."""
    option = {"s3://": f"{_ONE_PUT}=true", "gs://": f"{_RETRY_LIMIT}=5"}.get(uri[:5].lower())
    if option is not None and option.partition("=")[0] not in uri:
        try:
            return kind.from_uri(f"{uri}{'&' if '?' in uri else '?'}{option}")
        except ValueError as error:
            if option.partition("=")[0] not in str(error):
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
