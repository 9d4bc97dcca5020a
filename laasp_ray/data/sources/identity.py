"""Records which images a run began with, in a few kilobytes, so that a resumed run detects changes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from laasp_ray.data.loaders.decoding import decode_error
from laasp_ray.data.sources.base import ImageSource, Split
from laasp_ray.errors import DataError

_NAMED: dict[Split, str] = {"train": "training", "test": "test"}
_SAMPLE = 100


def identify(source: ImageSource) -> dict[str, Any]:
    """The identity of a source's images.

    `images` is their number. `digest` is over names, labels and order. `classes` has a row (name, images, digest) for
    each class. `sample` has rows (number, digest of the file) for one image each of up to 100 classes. Names are
    compared without the folder or tar that they begin with. Images that cannot be decoded are not in the sample.
    `shard_list` is the digest of a list of shards, if the images are in shards: it covers every byte of every image.
    """
    listed = shard_list_digest(source)
    return {**names_of(source), "sample": _sample(source)} | ({} if listed is None else {"shard_list": listed})


def shard_list_digest(source: ImageSource) -> str | None:
    """The digest of the list of shards that has the images; None if they are not in listed shards."""
    return getattr(source, "shard_list_digest", None)


def digest_of_names(source: ImageSource) -> str:
    """The digest over names, labels and order. It reads no image."""
    digest: str = names_of(source)["digest"]
    return digest


def check_identity(known: Mapping[str, Any], source: ImageSource, split: Split, excluded: Collection[str]) -> None:
    """Raises DataError if `source` does not have the images of the identity `known`, except for `excluded` ones.

    The identity of an older run may have only `images`.
    """
    change = _change(known, source, frozenset(excluded))
    if change is not None:
        counts = f"{len(source)} now, {known['images']} at its start"
        raise DataError(
            f"the {_NAMED[split]} images are not those that the run began with ({counts}): {change}; restore them, or "
            "start a new run with another --name"
        )


def _change(known: Mapping[str, Any], source: ImageSource, excluded: frozenset[str]) -> str | None:
    """Describes the change by an example; None if nothing changed."""
    if "digest" not in known:
        return None if len(source) == known["images"] else "images were added or removed"
    listed = shard_list_digest(source)
    if listed is not None and known.get("shard_list", listed) != listed:
        before = known["shard_list"]
        return f"the list of shards has changed (index.json's digest is {listed[:16]} now, {before[:16]} at its start)"
    found = names_of(source)
    if found["digest"] != known["digest"]:
        return _changed_class(known["classes"], found["classes"], source)
    for index, digest in known["sample"]:
        name = source.name(index)
        content = None if name in excluded else _content(source, index)
        if content is not None and _digest_of(content) != digest:
            return f"{name} has another content"
    return None


def names_of(source: ImageSource) -> dict[str, Any]:
    """The identity without its sample. It reads no file."""
    classes = _classes(source)
    whole = hashlib.sha256(source.labels.astype("<i8").tobytes())
    for row in classes:
        whole.update(f"{row[0]}\n{row[2]}\n".encode("utf-8", "surrogatepass"))
    return {"images": len(source), "digest": whole.hexdigest(), "classes": classes}


def _changed_class(before: list[list[Any]], now: list[list[Any]], source: ImageSource) -> str:
    names = [{row[0] for row in rows} for rows in (before, now)]
    for which, only in (("gone", names[0] - names[1]), ("new", names[1] - names[0])):
        if only:
            return f"the class {min(only)} is {which}"
    if [row[0] for row in before] != [row[0] for row in now]:
        return "the classes have another order"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        if old[1] != new[1]:
            return f"the class {old[0]} has {new[1]} images instead of {old[1]}"
        if old[2] != new[2]:
            first = source.name(int(np.flatnonzero(source.labels == number)[0]))
            return f"the class {old[0]} has images of other names, now beginning with {first}"
    return "they have another order"


def _classes(source: ImageSource) -> list[list[Any]]:
    members = np.split(
        np.argsort(source.labels, kind="stable"),
        np.cumsum(np.bincount(source.labels, minlength=len(source.classes)))[:-1],
    )
    rows: list[list[Any]] = []
    for name, indices in zip(source.classes, members, strict=True):
        listed = "\n".join(_within(source.name(index)) for index in indices.tolist())
        rows.append([name, len(indices), _digest_of(listed.encode("utf-8", "surrogatepass"))])
    return rows


def _within(name: str) -> str:
    """A name without the folder or tar that it begins with: a tar and its unpacked folder have the same content."""
    return name.partition("/")[2] or name


def _sample(source: ImageSource) -> list[list[Any]]:
    _, firsts = np.unique(source.labels, return_index=True)
    chosen = firsts[:: -(-len(firsts) // _SAMPLE)].tolist()
    contents = ((index, _content(source, index)) for index in chosen)
    return [[index, _digest_of(data)] for index, data in contents if data is not None and decode_error(data) is None]


def _content(source: ImageSource, index: int) -> bytes | None:
    try:
        return source.read(index)
    except OSError:  # the code that needs the image finds out whether the image or the storage is at fault
        return None


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
