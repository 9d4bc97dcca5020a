"""A folder of pictures for all tests of data."""

import pytest
from image_folders import COUNT, encoded, picture


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        for split in ("train", "val"):
            place = tmp_path / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.JPEG").write_bytes(encoded(picture(number)))
    return tmp_path
