"""Writing an object in one request, where pyarrow cannot: on S3 and Google Cloud Storage only where there is none, and
on Google Cloud Storage at all, since an upload in parts is not whole for sure after one of its requests was lost.

S3 is asked by obstore, Google by its JSON API. Both raise FileExistsError where the object exists, also where it exists
because the answer to an earlier try was lost: the caller reads it back.
"""

from __future__ import annotations

import configparser
import errno
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TIMEOUT_S = 30
_SLOWEST = 500_000
"""Bytes a second of the slowest link that a large object is given time for."""
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


class UnsupportedError(Exception):
    """The store does not know how to write only where nothing is."""


class S3Writer:
    """Puts small objects into S3's bucket of `address`, which is written as pyarrow takes it."""

    def __init__(self, address: str, region: str | None) -> None:
        self._address, self._region = address, region
        self._store: Any = None
        self._bucket = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}

    def put_new(self, path: str, data: bytes) -> None:
        """Writes `data` at `path` (bucket/key). Raises FileExistsError, UnsupportedError or another OSError."""
        import obstore
        from obstore import exceptions

        bucket, _, key = path.partition("/")
        if self._store is None or bucket != self._bucket:
            self._store, self._bucket = self._connected(bucket), bucket
        try:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileExistsError) as error:
            raise FileExistsError(errno.EEXIST, "exists", path) from error
        except (exceptions.NotFoundError, FileNotFoundError) as error:
            raise OSError(f"NoSuchBucket: there is no bucket {bucket!r} ({_short(error)})") from error
        except exceptions.NotSupportedError as error:
            raise UnsupportedError(_short(error)) from error
        except exceptions.BaseError as error:
            if says_unsupported(str(error)):
                raise UnsupportedError(_short(error)) from error
            raise OSError(f"{_short(error)}\n{error}") from error  # the lines below the first say what it is

    def _connected(self, bucket: str) -> Any:
        from obstore.store import S3Store

        options = s3_options(self._address, self._region, os.environ)
        client: Any = {"timeout": f"{_TIMEOUT_S}s", "connect_timeout": "5s"}
        client["allow_http"] = options.get("endpoint", "").startswith("http://")
        return S3Store(
            bucket,
            config=options,  # type: ignore[arg-type]
            client_options=client,
            retry_config={"max_retries": 0},  # store/retries.py does it, for all kinds of calls alike
        )


def says_unsupported(error: str) -> bool:
    """Whether an error of obstore's has the status 501 or its code; an address may have these digits, too."""
    return re.search(r"NotImplemented|status code: 501\b", error) is not None


def s3_options(address: str, region: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """obstore's settings for an address of pyarrow's: its endpoint, region and credentials.

    Without credentials there, obstore takes those of the environment or of the machine; ~/.aws is read here.
    """
    parts = urllib.parse.urlsplit(address)
    query = {name: values[-1] for name, values in urllib.parse.parse_qs(parts.query).items()}
    options = {"region": query.get("region") or region or environment.get("AWS_REGION", "us-east-1")}
    endpoint = query.get("endpoint_override") or environment.get("AWS_ENDPOINT_URL_S3", "")
    endpoint = endpoint or environment.get("AWS_ENDPOINT_URL", "")
    if endpoint:
        options["endpoint"] = endpoint if "://" in endpoint else f"{query.get('scheme', 'https')}://{endpoint}"
    if parts.username:
        options["access_key_id"] = urllib.parse.unquote(parts.username)
        options["secret_access_key"] = urllib.parse.unquote(parts.password or "")
    elif "AWS_ACCESS_KEY_ID" not in environment:
        options.update(_profile(environment))
    return options


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The keys of AWS_PROFILE in ~/.aws/credentials; none where there is no such file."""
    file = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read(file)
    except (OSError, configparser.Error):
        return {}
    name = environment.get("AWS_PROFILE", "default")
    section = found[name] if found.has_section(name) else {}
    names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
    options = {option: section[key] for option, key in names.items() if key in section}
    if options and "aws_session_token" in section:
        options["session_token"] = section["aws_session_token"]
    return options


class GoogleWriter:
    """Puts objects into Google's bucket of `address`, which is written as pyarrow takes it."""

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(parts.query).items()}
        host = query.get("endpoint_override") or "storage.googleapis.com"
        self._endpoint = f"{query.get('scheme', 'https')}://{host}"
        self._anonymous = parts.username == "anonymous"
        self._credentials: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_credentials": None}

    def put_new(self, path: str, data: bytes) -> None:
        """Writes `data` at `path` (bucket/key) where nothing is. Raises FileExistsError or another OSError."""
        self._post(path, data, {"ifGenerationMatch": "0"})

    def put(self, path: str, data: bytes) -> None:
        """Writes `data` at `path` (bucket/key) in place of what is there. Raises OSError."""
        self._post(path, data, {})

    def _post(self, path: str, data: bytes, conditions: Mapping[str, str]) -> None:
        bucket, _, key = path.partition("/")
        query = urllib.parse.urlencode({"uploadType": "multipart", **conditions})
        url = f"{self._endpoint}/upload/storage/v1/b/{urllib.parse.quote(bucket, safe='')}/o?{query}"
        content_type, body = _multipart(key, data)
        headers = {"Content-Type": content_type, **self._authorization()}
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S + len(data) / _SLOWEST) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _google_error(error, path) from error
        except urllib.error.URLError as error:
            raise OSError(f"connection refused or lost: error sending request ({error.reason})") from error
        except OSError:
            raise
        except Exception as error:  # http.client's: an answer that is none
            raise ConnectionError(f"error sending request ({error!r})") from error

    def _authorization(self) -> dict[str, str]:
        if self._anonymous:
            return {}
        import google.auth
        import google.auth.transport.requests
        from google.auth.exceptions import GoogleAuthError, TransportError

        try:
            if self._credentials is None:
                self._credentials, _ = google.auth.default(scopes=[_GOOGLE_SCOPE])
            if not self._credentials.valid:
                self._credentials.refresh(google.auth.transport.requests.Request())
        except TransportError as error:
            raise ConnectionError(f"no token from Google ({_short(error)})") from error
        except GoogleAuthError as error:
            raise OSError(f"Unauthenticated: {_short(error)}") from error
        return {"Authorization": f"Bearer {self._credentials.token}"}


def _multipart(key: str, data: bytes) -> tuple[str, bytes]:
    """A request's type and body: the object's name, then what is in it."""
    mark = uuid.uuid4().hex
    parts = [
        ("application/json; charset=UTF-8", json.dumps({"name": key}).encode()),
        ("application/octet-stream", data),
    ]
    body = b"".join(f"--{mark}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts)
    return f"multipart/related; boundary={mark}", body + f"--{mark}--\r\n".encode()


def _google_error(error: urllib.error.HTTPError, path: str) -> OSError:
    if error.code == 412:
        return FileExistsError(errno.EEXIST, "exists", path)
    try:
        said = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        said = error.reason
    if error.code == 404:
        return OSError(f"no such bucket: {path.partition('/')[0]} ({said})")
    return OSError(f"HTTP status {error.code}: {said}")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
