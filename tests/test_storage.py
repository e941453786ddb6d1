"""Files are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm import storage


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    storage.write_atomically(path, "café")
    assert path.read_bytes() == "café".encode()
    storage.write_atomically(path, memoryview(b"\x00\xff"))
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomically(path, "old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_writers_at_once_leave_the_whole_content_of_one(tmp_path):
    path = tmp_path / "file"
    contents = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda content: storage.write_atomically(path, content), contents))
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_an_object_behind_a_url_is_written(monkeypatch, tmp_path):
    from etils import epath

    monkeypatch.setattr(epath, "Path", lambda url: tmp_path / url.removeprefix("gs://"))
    storage.write_atomically("gs://bucket/folder/file", "text")
    assert (tmp_path / "bucket/folder/file").read_text() == "text"
