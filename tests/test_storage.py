"""One door to storage: the same promises on a local disk, in GCS and in S3 (emulated)."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import object_stores
import pytest

from lm.storage import files, filesystems, growing, lease, paths


def test_a_file_is_written_with_its_folders(folder):
    path = f"{folder}/a/b.txt"
    files.write_atomically(path, "café")
    assert files.read_bytes(path) == "café".encode()
    files.write_atomically(path, memoryview(b"\x00\xff\x01"))
    assert files.read_bytes(path) == b"\x00\xff\x01"
    assert files.read_bytes(path, 1, 2) == b"\xff"
    assert files.list_names(f"{folder}/a") == ["b.txt"]
    assert files.list_names(folder) == ["a"] and files.list_names(f"{folder}/none") == []
    assert files.exists(path) and files.exists(f"{folder}/a") and not files.exists(f"{folder}/b")


def test_a_file_is_deleted_alone_and_a_folder_with_what_is_in_it(folder):
    for name in ("a/b", "a/c", "a/d/e", "ab"):
        files.write_atomically(f"{folder}/{name}", name)
    files.delete(f"{folder}/a/b")
    assert files.list_names(f"{folder}/a") == ["c", "d"]
    files.delete(f"{folder}/a")
    assert files.list_names(folder) == ["ab"]
    files.delete(f"{folder}/a")  # nothing is there


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match="none"):
        files.read_bytes(f"{folder}/none")


def test_a_holder_names_itself_a_moment_after_it_has_the_lock(tmp_path):
    with open(tmp_path / "lock", "a+") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)

        def contend():
            with lease.lock(str(tmp_path / "lock")):
                pass

        second = pool.submit(contend)
        time.sleep(0.1)
        file.write("process 7 on elsewhere")
        file.flush()
        with pytest.raises(lease.Locked, match="process 7 on elsewhere"):
            second.result()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_missing_bucket_is_named(buckets, scheme):
    with pytest.raises(FileNotFoundError, match=f"{scheme}://nobody-has-it"):
        files.write_atomically(f"{scheme}://nobody-has-it/a", "text")


def test_one_of_many_creates_a_file(folder):
    path = f"{folder}/lock"
    with ThreadPoolExecutor(8) as executor:
        made = list(executor.map(lambda i: files.create(path, str(i)), range(8)))
    assert made.count(True) == 1
    assert files.read_bytes(path).decode() == str(made.index(True))


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, "old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_writers_at_once_leave_the_whole_content_of_one(tmp_path):
    path = tmp_path / "file"
    contents = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda content: files.write_atomically(path, content), contents))
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_growing_file_reads_as_what_was_appended(folder, monkeypatch):
    monkeypatch.setattr(growing, "SECONDS", 0.01)
    monkeypatch.setattr(growing, "MAX_SEGMENTS", 3)
    path = f"{folder}/log"
    assert growing.read(path) == b""
    log = growing.GrowingFile(path, b"begin\n")
    written = b"begin\n"
    for i in range(40):
        line = f"{i}\n".encode()
        log.append(line)
        written += line
        if i % 4 == 0:
            log.flush()
            assert growing.read(path) == written
        time.sleep(0.005)
    log.close()
    assert growing.read(path) == files.read_bytes(path) == written
    assert files.list_names(folder) == ["log"]


def test_a_growing_file_begins_anew_without_what_came_after(folder):
    path = f"{folder}/log"
    log = growing.GrowingFile(path, b"1\n2\n")
    log.append(b"3\n")
    log.flush()  # and no `close`: the process was killed
    assert growing.read(path) == b"1\n2\n3\n"
    again = growing.GrowingFile(path, b"1\n")
    again.append(b"two\n")
    again.flush()
    assert growing.read(path) == b"1\ntwo\n"


def test_segments_of_an_older_beginning_are_void(buckets):
    path = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}/log"
    log = growing.GrowingFile(path, b"1\n")
    log.append(b"2\n")
    log.flush()
    files.write_atomically(path, b"0\n")  # and killed before the segments were deleted
    assert files.list_names(f"{path}.more") and growing.read(path) == b"0\n"


def test_appending_does_not_wait_for_the_network(buckets, monkeypatch):
    path = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}/log"
    log = growing.GrowingFile(path)
    started, go_on = threading.Event(), threading.Event()
    write = files.write_atomically

    def slow(path, data):
        started.set()
        assert go_on.wait(30)
        write(path, data)

    monkeypatch.setattr(files, "write_atomically", slow)
    monkeypatch.setattr(growing, "SECONDS", 0.01)
    log.append(b"a\n")
    flushing = threading.Thread(target=log.flush)
    flushing.start()
    assert started.wait(30)
    before = time.perf_counter()
    log.append(b"b\n")
    assert time.perf_counter() - before < 1
    go_on.set()
    flushing.join()
    log.flush()
    assert growing.read(path) == b"a\nb\n"


HOLD = """
    import sys, time
    from lm.storage import lease
    with lease.lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(600)
"""


def test_a_lock_is_held_by_one_and_lost_by_a_killed_process(folder):
    path = f"{folder}/lock"
    command = [sys.executable, "-c", textwrap.dedent(HOLD), path]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(lease.Locked, match=str(holder.pid)), lease.lock(path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with (
        lease.lock(path),
        pytest.raises(lease.Locked, match=str(os.getpid())),
        lease.lock(path),
    ):
        pass
    with lease.lock(path):
        pass


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_lease_of_another_machine_is_lost_when_it_is_not_renewed(buckets, scheme):
    path = f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}/lock"
    holder = {"host": "elsewhere", "pid": 7, "time": time.time() - lease.SECONDS / 2}
    files.write_atomically(f"{path}/00000003", json.dumps(holder))
    with (
        pytest.raises(lease.Locked, match=r"process 7 on elsewhere.*in (29|30) seconds"),
        lease.lock(path),
    ):
        pass
    holder["time"] -= lease.SECONDS
    files.write_atomically(f"{path}/00000003", json.dumps(holder))
    with lease.lock(path):
        assert files.list_names(path) == ["00000004"]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_holder_that_was_cut_off_finds_its_successor(buckets, scheme, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    path = f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}/lock"
    write, cut_off = files.write_atomically, threading.Event()

    def cut(*arguments):
        if cut_off.is_set():
            raise filesystems.StorageError("no route to the bucket")
        write(*arguments)

    with lease.lock(path) as held:
        held.check(ask=True)
        monkeypatch.setattr(files, "write_atomically", cut)
        cut_off.set()
        time.sleep(0.6)  # its object is too old by now
        held.check(ask=True)  # and nobody has come
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "elsewhere")
        with lease.lock(path):
            cut_off.clear()
            with pytest.raises(lease.LeaseLost, match="00000002"):
                held.check(ask=True)
            with pytest.raises(lease.LeaseLost):
                held.check()
            assert files.list_names(path) == ["00000002"]
    assert files.list_names(path) == ["00000002"]  # the first holder has released nothing


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_holder_that_was_cut_off_hears_of_its_successor_by_itself(buckets, scheme, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    path = f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}/lock"
    with lease.lock(path) as held:
        files.create(f"{path}/00000002", "{}")
        deadline = time.monotonic() + 20
        with pytest.raises(lease.LeaseLost, match="00000002"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)


def test_a_log_that_another_process_rewrote_is_left_to_it(buckets):
    path = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}/log"
    old = growing.GrowingFile(path, b"1\n")
    old.append(b"2\n")
    old.flush()
    new = growing.GrowingFile(path, b"1\n2\n")
    new.append(b"3\n")
    new.flush()
    old.append(b"lost\n")
    with pytest.raises(filesystems.StorageError, match="another process has rewritten it"):
        old.close()
    assert growing.read(path) == b"1\n2\n3\n"


def test_a_path_without_a_bucket_is_refused():
    with pytest.raises(ValueError, match="--workdir: 'gs://' names no bucket"):
        paths.expand_path("gs://", "--workdir")


@pytest.mark.parametrize(
    "path", ["gs:/bucket/a", "gcs://bucket/a", "s3a://bucket/a", "s3:/bucket/a", "S3://bucket/a"]
)
def test_a_mistyped_bucket_is_no_local_folder(path):
    with pytest.raises(ValueError, match=r"--workdir: .* write (gs|s3)://BUCKET/FOLDER"):
        paths.expand_path(path, "--workdir")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_file_of_a_bucket_that_ends_too_early_is_an_error(buckets, scheme):
    path = f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    files.write_atomically(path, b"abc")
    with files.open_file(path) as opened:
        assert opened.read() == b"abc"
    with files.open_file(path, size=10) as opened, pytest.raises(filesystems.StorageError):
        opened.read()


def test_an_empty_answer_amid_a_file_is_an_error(buckets, monkeypatch):
    path = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    files.write_atomically(path, b"x" * 10)
    with files.open_file(path, size=12) as file:
        monkeypatch.setattr(files, "read_bytes", lambda *_: b"")
        with pytest.raises(ConnectionError, match="no bytes from 0 on, of 12"):
            file.read(4)
