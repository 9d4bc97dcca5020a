"""The list of the shards of one split: `index.json` beside them, with size, digest and number of samples of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laasp_ray.errors import DataError

INDEX = "index.json"
SCHEMA_VERSION = 1
SHARD_SUFFIX = ".tar"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar of samples: its file's name, the sha256 of its content, its samples, and its size in bytes."""

    name: str
    sha256: str
    samples: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardList:
    """The shards of a split in order. `classes` are the names that labels index; empty where only numbers are known.

    `made_from` says what `jobs/prepare_data.py` made the shards from; empty for shards that were made elsewhere.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    made_from: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """The sha256 over names, contents and order of the shards, and over the classes."""
        rows = [[shard.name, shard.sha256, shard.samples, shard.bytes] for shard in self.shards]
        return hashlib.sha256(json.dumps([rows, list(self.classes)]).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The content of `index.json`."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "samples": self.samples,
            "classes": list(self.classes),
            "made_from": dict(self.made_from),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def remedy(folder: Path) -> str:
    """The command that makes the list anew, for messages. `folder` has the shards of one split."""
    return f"make it with: python jobs/prepare_data.py {folder.parent} --index"


def shard_files(folder: Path) -> list[Path]:
    """The sorted tars in `folder`, whether or not they are listed; none of hidden ones."""
    return sorted(path for path in folder.glob(f"*{SHARD_SUFFIX}") if not path.name.startswith(".") and path.is_file())


def read_shard_list(folder: Path) -> ShardList:
    """The list of the shards in `folder`. Raises DataError, with the remedy, if it is missing or damaged."""
    path = folder / INDEX
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{folder} has shards and no {INDEX} that lists them: {remedy(folder)}") from error
    try:
        content = json.loads(raw)
        return _list_from(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}; restore it, or remove it and {remedy(folder)}") from error


def check_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Raises DataError for a shard that is missing or that has another size than its list says. No file is read."""
    missing, changed = [], []
    for shard in shards:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError:
            missing.append(shard.name)
            continue
        if size != shard.bytes:
            changed.append(f"{shard.name} has {size:,} bytes instead of {shard.bytes:,}")
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards in {INDEX} ({_some(missing)}): copy them there"
        )
    if changed:
        raise DataError(
            f"{len(changed)} of the {len(shards)} shards in {folder} are not those in {INDEX} ({_some(changed)}): copy "
            "them anew"
        )


def _list_from(content: Any) -> ShardList:
    """The list in the JSON value `content`. Raises ValueError that names the place and the value."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {content!r:.40}, not a JSON object")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this laasp_ray reads {SCHEMA_VERSION}")
    rows, classes, made_from = content.get("shards"), content.get("classes", []), content.get("made_from", {})
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"shards is {rows!r:.40}, must be a list of at least one shard")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {classes!r:.40}, must be a list of names")
    if len(set(classes)) < len(classes):
        raise ValueError("two of its classes have the same name")
    if not isinstance(made_from, dict):
        raise ValueError(f"made_from is {made_from!r:.40}, must be a JSON object")
    shards = tuple(_shard_from(row, f"shards[{number}]") for number, row in enumerate(rows))
    names = [shard.name for shard in shards]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ValueError(f"it lists {twice} twice")
    found = ShardList(shards=shards, classes=tuple(classes), made_from=made_from)
    if content.get("samples") != found.samples:
        raise ValueError(f"samples is {content.get('samples')!r}, its shards have {found.samples} together")
    return found


def _shard_from(row: Any, place: str) -> Shard:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {row!r:.40}, must be an object with name, sha256, samples and bytes")
    name, digest = row.get("name"), row.get("sha256")
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{place}.name is {name!r}, must be the name of a file beside {INDEX}")
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        raise ValueError(f"{place}.sha256 is {digest!r}, must be 64 hexadecimal digits")
    counts = []
    for key in ("samples", "bytes"):
        count = row.get(key)
        if type(count) is not int or count < 0:
            raise ValueError(f"{place}.{key} is {count!r}, must be a whole number")
        counts.append(count)
    return Shard(name=name, sha256=digest, samples=counts[0], bytes=counts[1])


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
