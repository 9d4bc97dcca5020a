"""A list with the class of each image of a flat validation set."""

from __future__ import annotations

import codecs
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from laasp_ray.data.sources.base import SUFFIXES
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

CLASS_NUMBERS = "class_numbers.txt"
_SEPARATORS = re.compile(r"[\s,]+")


class LabelList:
    """The list at `path`, next to the data set's folder `root`, of training `classes`. Names may have spaces."""

    def __init__(self, path: Path, root: Path, classes: Sequence[str]) -> None:
        self._path, self._root, self._classes = path, root, frozenset(classes)

    def of(self, files: Sequence[str]) -> list[str]:
        """The class of each image, by its name, or by its name without suffix, or by the order of the sorted names.

        Raises DataError if the list and the images do not fit.
        """
        lines = read_lines(self._path)
        if lines and _SEPARATORS.split(lines[0])[0] == "ImageId":
            del lines[0]
        bare = [line for line in lines if line in self._classes or not _SEPARATORS.search(line)]
        if len(bare) == len(lines):
            return self._classes_of_numbers(self._in_order(lines, files))
        if bare:
            raise DataError(
                f"{self._path} has lines of one word and of more, such as {bare[0]!r}: name the file in each"
            )
        return self._classes_of_numbers(self._by_name(lines, [_base(file) for file in files]))

    def _in_order(self, lines: list[str], files: Sequence[str]) -> list[str]:
        if len(lines) != len(files):
            raise DataError(f"{self._path} has {len(lines)} lines for {len(files)} images: it must have one for each")
        stems = [_stem(_base(file)) for file in files]
        self._check_unique(stems)
        in_order = dict(zip(sorted(stems), lines, strict=True))
        return [in_order[stem] for stem in stems]

    def _by_name(self, lines: list[str], names: list[str]) -> list[str]:
        self._check_unique(names)
        listed: dict[str, str] = {}
        known = {*names, *map(_stem, names)}
        for line in lines:
            name, kind = self._entry(line, known)
            if listed.setdefault(name, kind) != kind:
                raise DataError(f"{self._path} gives {name} two classes, {listed[name]} and {kind}: leave one out")
        by_stem: dict[str, str] = {}
        torn = set()
        for name, kind in listed.items():
            if by_stem.setdefault(_stem(name), kind) != kind:
                torn.add(_stem(name))
        others = [name for name in names if name not in listed]
        missing = [name for name in others if _stem(name) not in by_stem]
        if missing:
            shown = ", ".join(_stem(name) for name in missing[:5])
            raise DataError(f"{self._path} lacks {len(missing)} of {len(names)} images ({shown})")
        unclear = next((name for name in others if _stem(name) in torn), None)
        if unclear is not None:
            raise DataError(f"{self._path} has several classes for {_stem(unclear)}, and none for {unclear}: name it")
        absent = sorted(name for name in listed if name not in known and _stem(name) not in known)
        if absent:
            logger.warning("%d images in %s are not there: %s", len(absent), self._path, ", ".join(absent[:5]))
        # A name without suffix in the list must stand for one image; otherwise a second image would get the first one's
        # label.
        self._check_unique([_stem(name) for name in others])
        return [listed[name] if name in listed else by_stem[_stem(name)] for name in names]

    def _check_unique(self, names: list[str]) -> None:
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise DataError(
                f"{self._path} cannot tell the images called {twice} apart: list each by its whole name, suffix and all"
            )

    def _entry(self, line: str, files: Collection[str]) -> tuple[str, str]:
        """The file that a line names, without its folders, and the class."""
        cuts = list(_SEPARATORS.finditer(line))
        heads = [(_base(_unquoted(line[: cut.start()])), cut.end()) for cut in cuts]
        # A file name may have spaces, so the longest beginning that is a file is taken. If none is a file, the first
        # word is.
        name, end = next((head for head in reversed(heads) if head[0] in files or _stem(head[0]) in files), heads[0])
        return name, self._class(line[end:])

    def _class(self, text: str) -> str:
        """The class in the part of a line after the file. More may follow the class, such as a box."""
        ends = [*(cut.start() for cut in _SEPARATORS.finditer(text)), len(text)]
        heads = [_unquoted(text[:end]) for end in ends]
        return next((head for head in reversed(heads) if head in self._classes), heads[0])

    def _classes_of_numbers(self, named: list[str]) -> list[str]:
        """Converts class numbers to names. Names are unchanged."""
        path, root = self._path, self._root
        if not all(name.isdecimal() for name in named):
            return named
        places = (path.with_name(CLASS_NUMBERS), root / CLASS_NUMBERS)
        map_file = next((place for place in places if place.is_file()), None)
        if map_file is None and self._classes.issuperset(named):
            return named  # the class folders are named by numbers
        if map_file is None:
            raise DataError(
                f"{path} gives classes by number, and the order of the numbers is not that of the names: put a file "
                f"{CLASS_NUMBERS} beside it, lines such as '1 n02119789', from the devkit's meta.mat"
            )
        pairs = [_SEPARATORS.split(line, maxsplit=1) for line in read_lines(map_file)]
        wrong = next((pair for pair in pairs if len(pair) < 2 or not pair[0].isdecimal()), None)
        if wrong is not None:
            raise DataError(
                f"{map_file} has the line {' '.join(wrong)!r}, expected 'NUMBER CLASS', such as '1 n02119789'"
            )
        names = {int(number): self._class(name) for number, name in pairs}
        unknown = sorted({int(number) for number in named} - set(names))
        if unknown:
            raise DataError(f"{map_file} lacks {len(unknown)} of the class numbers in {path} ({unknown[:5]})")
        return [names[int(number)] for number in named]


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file, without blank ones.

    The encoding is UTF-8, or UTF-16 with a byte order mark, as Windows writes. Raises DataError for another one.
    """
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path} is not text in UTF-8 (it has bytes of zero): save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(name: str) -> str:
    """`name` without the suffix of an image."""
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name
