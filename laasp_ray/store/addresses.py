"""Removes credentials from storage addresses (s3://, gs://, ...)."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_PORT = re.compile(r"[^:/?#]*:\d*")
_SECRET = re.compile(r"secret|token|password|credential|signature|key|^sig$", re.IGNORECASE)


def names_secret(name: str) -> bool:
    """Whether a value of this name is probably a credential."""
    return bool(_SECRET.search(name))


def public(address: str) -> str:
    """`address` without its user, password and secret options. A local path is unchanged."""
    scheme, mark, rest = address.partition("://")
    if not mark:
        return address
    host, path = _split(rest)
    path, question, query = path.partition("?")
    kept = [part for part in query.split("&") if part and not _SECRET.search(part.partition("=")[0])]
    return f"{scheme}://{host}{path}" + (question + "&".join(kept) if kept else "")


def public_text(text: str, *addresses: str) -> str:
    """`text` with every address in it made public, and every secret of `addresses` in it replaced."""
    for address in addresses:
        text = text.replace(address, public(address))
        for secret in _secrets(address):
            text = text.replace(secret, "***")
    return _ADDRESS.sub(lambda found: public(found.group()), text)


def public_data(value: Any) -> Any:
    """Plain data (mappings, lists, strings) with every address made public, so that it may be stored or shown."""
    if isinstance(value, Mapping):
        return {key: public_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_data(item) for item in value]
    return public(value) if isinstance(value, str) else value


def _split(rest: str) -> tuple[str, str]:
    """Splits the part after '://' into the host and the rest, without user and password."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in host and ":" in host and not _PORT.fullmatch(host) and "@" in rest:
        # A secret may contain an unescaped slash. The address is then invalid, but the secret must still not be shown.
        rest = rest.rpartition("@")[2]
        host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return host.rpartition("@")[2], rest[len(host) :]


def _secrets(address: str) -> list[str]:
    """The user, the password and the secret options of `address`, as written and unquoted, longest first."""
    hidden, rest = public(address), address.partition("://")[2]
    if not rest or hidden == address:
        return []
    host = hidden.partition("://")[2]
    host = re.split(r"[/?#]", host, maxsplit=1)[0]
    before = rest[: rest.find("@" + host)] if "@" + host in rest else ""
    options = [part.partition("=") for part in rest.partition("?")[2].split("&")]
    found = [*before.partition(":")[::2], *(value for name, _, value in options if _SECRET.search(name))]
    return sorted({form for text in found for form in (text, urllib.parse.unquote(text)) if form}, key=len)[::-1]
