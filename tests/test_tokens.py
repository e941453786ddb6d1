import http.server
import json
import os
import shutil
import threading
import urllib.parse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import packing, pairs, store_files
from lm.data.bins import Packing
from lm.data.rows import RowLayout
from lm.data.tokens import TokenStore
from lm.preparation.token_writer import encode_block, write_manifest, write_shard, write_store
from lm.preparation.tokenizer_training import train_sentencepiece
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer, from_bytes

SHARD = "shard-00000"
TEXTS = ["first", "zweiter Text äöü", "", "the fourth document\n" * 30]
DOCUMENTS = [Document(f"ids/{i} é", {"text": text}) for i, text in enumerate(TEXTS)]
STREAM = [i for text in TEXTS for i in [*text.encode(), ByteTokenizer.eos_id]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "store"
    write_store(path, DOCUMENTS, ByteTokenizer())
    return path


@pytest.fixture(scope="module")
def server(folder):
    """A web server on loopback that answers byte ranges, also in the API of gs://."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            url = urllib.parse.urlparse(self.path)
            name = urllib.parse.unquote(url.path)
            if "/o/" in name:  # /storage/v1/b/BUCKET/o/OBJECT?alt=media
                name = name.split("/o/", 1)[1]
            file = folder.parent / name.lstrip("/")
            body, status = (file.read_bytes(), 200) if file.is_file() else (b"", 404)
            headers = {"x-goog-generation": "1", "ETag": '"1"'}
            if status == 200 and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                first, stop = int(first), int(last or len(body) - 1) + 1
                if first >= len(body):
                    status, body = 416, b""
                else:
                    headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
                    status, body = 206, body[first:stop]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://localhost:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(params=["local", "file", "http", "gs"])
def store(request, folder, monkeypatch):
    if request.param == "local":
        return TokenStore.open(folder)
    if request.param == "file":
        return TokenStore.open(f"file://{folder}")
    url = request.getfixturevalue("server")
    if request.param == "http":
        return TokenStore.open(f"{url}/store")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    return TokenStore.open("gs://bucket/store")


def test_store_holds_every_document_and_its_end(store):
    assert (store.num_documents, store.num_tokens) == (len(TEXTS), len(STREAM))
    assert store.num_bytes == sum(len(t.encode()) for t in TEXTS)
    for i, document in enumerate(DOCUMENTS):
        tokens = store.document(i)
        assert tokens.dtype == np.int32
        assert tokens[-1] == ByteTokenizer.eos_id
        assert ByteTokenizer().decode(tokens) == document.fields["text"]
        assert store.document_ids(i) == document.id
        assert store.document_bytes(i) == len(document.fields["text"].encode())
    store.verify()
    assert store.tokenizer().fingerprint == ByteTokenizer.fingerprint


NAMES = ["my store", "a%20b", "%zz", "a#b", "a?b=c", "[x]*", "**", "{0} %s", "存", "a\nb", "a://b"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"\xff\xfe")])
def test_a_store_of_any_name_is_read(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / name)
    local = TokenStore.open(tmp_path / name)
    assert local.tokens(0, local.num_tokens).tolist() == STREAM
    if name.isprintable():
        url = f"file://{urllib.parse.quote(str(tmp_path / name))}"
        by_url = TokenStore.open(url)
        assert by_url.tokens(0, local.num_tokens).tolist() == STREAM


@pytest.mark.parametrize("name", ["a%20b", "a#b", "a?b=c", "a b"])
def test_an_object_store_takes_names_as_they_are(folder, server, monkeypatch, name):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server)
    shutil.copytree(folder, folder.parent / name)
    assert TokenStore.open(f"gs://bucket/{name}").num_documents == len(TEXTS)


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert TokenStore.open("~/store").num_documents == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no path"),
        ("gone", "gone: no such folder; make the store with scripts/prepare_data.py"),
        ("file", "file: a file, not the folder of a token store"),
        ("link", "link: a link to gone, which is not there"),
        ("both", "both: not a token store but a folder of some: name one of train, validation"),
        ("empty", "empty: not a complete token store"),
    ],
)
def test_what_is_no_store_is_said_in_one_line(folder, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "empty").mkdir()
    for split in ("validation", "train"):
        shutil.copytree(folder, tmp_path / "both" / split)
    with pytest.raises(ValueError, match=message) as caught:
        TokenStore.open(name)
    assert "\n" not in str(caught.value)


def test_ids_may_hold_bytes_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write_store(tmp_path / "store", [Document(name, {"text": "x"})], ByteTokenizer())
    assert TokenStore.open(tmp_path / "store").document_ids(0) == name


@settings(deadline=None)
@given(data=st.data())
def test_tokens_are_slices_of_the_stream(folder, data):
    store = TokenStore.open(folder)
    start = data.draw(st.integers(0, len(STREAM)))
    stop = data.draw(st.integers(start, len(STREAM)))
    assert store.tokens(start, stop).tolist() == STREAM[start:stop]


def test_positions_outside_the_store_are_refused(folder):
    store = TokenStore.open(folder)
    with pytest.raises(ValueError, match=f"not within {len(STREAM)}"):
        store.tokens(0, len(STREAM) + 1)
    with pytest.raises(ValueError, match="tokens -1 to 4"):
        store.tokens(-1, 4)


def test_two_fields_share_ids_and_have_their_own_streams(tmp_path):
    documents = [
        Document(f"d{i}", {"inputs": "q" * i, "targets": "answer" * i}) for i in range(1, 5)
    ]
    write_store(tmp_path / "s", documents, ByteTokenizer(), fields=["inputs", "targets"])
    inputs = TokenStore.open(tmp_path / "s", field="inputs")
    targets = TokenStore.open(tmp_path / "s", field="targets")
    for i, document in enumerate(documents):
        for store, text in zip((inputs, targets), document.fields.values(), strict=True):
            tokens = store.document(i)
            assert ByteTokenizer().decode(tokens) == text
            assert store.document_ids(i) == document.id
    with pytest.raises(ValueError, match="no field 'text'; it has inputs, targets"):
        TokenStore.open(tmp_path / "s")


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 70_000
        eos_id = 69_999

    write_store(tmp_path / "s", DOCUMENTS, Large())
    store = TokenStore.open(tmp_path / "s")
    assert store.manifest["dtype"] == "<u4"
    assert store.tokens(5, 6).tolist() == [69_999]


def test_store_without_documents_opens(tmp_path):
    write_store(tmp_path / "s", [], ByteTokenizer())
    store = TokenStore.open(tmp_path / "s")
    assert (store.num_documents, store.num_tokens) == (0, 0)
    assert store.tokens(0, 0).tolist() == []


def _damaged(folder, tmp_path, name, change):
    shutil.copytree(folder, tmp_path / "s")
    file = tmp_path / "s" / name
    content = change(file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return tmp_path / "s"


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", lambda b: None, r"no manifest\.json"),
        (f"{SHARD}/text/tokens.bin", lambda b: b[:-1], "tokens.bin .*manifest says"),
        (f"{SHARD}/text/tokens.bin", lambda b: b + b"0", "tokens.bin .*manifest says"),
        (f"{SHARD}/text/tokens.bin", lambda b: None, "tokens.bin is missing"),
        (f"{SHARD}/text/offsets.bin", lambda b: b[:8], "offsets.bin .*manifest says"),
        (f"{SHARD}/ids.bin", lambda b: b"", "ids.bin .*manifest says"),
        ("manifest.json", lambda b: b.replace(b'"format": 2', b'"format": 9'), "format 9"),
    ],
)
def test_a_damaged_file_is_found_when_it_is_first_read(
    folder, tmp_path, scheme, name, change, message
):
    path = _damaged(folder, tmp_path, name, change)
    with pytest.raises(ValueError, match=message):
        store = TokenStore.open(f"{scheme}{path}")
        assert store.document_ids(1) and len(store.document(1))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_verify_finds_a_changed_token(folder, tmp_path, scheme):
    path = _damaged(
        folder, tmp_path, f"{SHARD}/text/tokens.bin", lambda b: b[:100] + b"?" + b[101:]
    )
    store = TokenStore.open(f"{scheme}{path}")
    with pytest.raises(ValueError, match=r"text/tokens\.bin: content hash"):
        store.verify()


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    model = train_sentencepiece(["some text to train on\n" * 20], vocab_size=275)
    tokenizer = from_bytes("x.model", model)
    write_store(tmp_path / "s", DOCUMENTS, tokenizer)
    store = TokenStore.open(tmp_path / "s")
    store.check_tokenizer(tokenizer)
    assert store.tokenizer().fingerprint == tokenizer.fingerprint
    message = f"(?s){tokenizer.fingerprint}.*{ByteTokenizer.fingerprint}"
    with pytest.raises(ValueError, match=message):
        store.check_tokenizer(ByteTokenizer())


def test_store_moved_elsewhere_needs_nothing_outside(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    store = TokenStore.open(tmp_path / "elsewhere")
    store.check_tokenizer(store.tokenizer())


def test_store_appears_only_when_complete(folder, tmp_path):
    def blocks():
        for document in DOCUMENTS:
            yield encode_block([document], ByteTokenizer(), fields=["text"])
            with pytest.raises(ValueError, match="not a complete token store"):
                TokenStore.open(tmp_path / "s")

    options = {"fields": ["text"]}
    shard = write_shard(tmp_path / "s", 0, blocks(), **options)
    write_shard(tmp_path / "s", 1, [], **options)  # left by an attempt with more shards
    write_manifest(tmp_path / "s", [shard], ByteTokenizer(), tokenizer_name="bytes", **options)
    assert sorted(os.listdir(tmp_path / "s")) == ["manifest.json", SHARD]
    one, other = (  # blocks one by one give the same bytes
        json.loads((path / "manifest.json").read_text()) for path in (folder, tmp_path / "s")
    )
    assert one == other


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """300 documents in one shard, and in shards of 1 to 1,000 tokens with a plan in each."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("shards")
    documents = [
        Document(f"d{i}", {"text": "x" * int(n), "more": "y" * (i % 7)})
        for i, n in enumerate(rng.integers(0, 60, 300))
    ]
    fields, packings = ("text", "more"), [Packing(("text",), (32,)), PAIRS]
    write_store(root / "one", documents, ByteTokenizer(), fields=fields)
    more = {"fields": fields, "shard_documents": 7, "packings": packings}
    write_store(root / "many", documents, ByteTokenizer(), **more)
    return root


PAIRS = Packing(("text", "more"), (70,))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_shards_hold_the_documents_and_rows_of_one_store(many_shards, scheme):
    one = TokenStore.open(many_shards / "one")
    many = TokenStore.open(f"{scheme}{many_shards / 'many'}")
    many.verify()
    assert len(many.shards) == 43 and many.num_tokens == one.num_tokens
    assert one.tokens(0, one.num_tokens).tolist() == many.tokens(0, one.num_tokens).tolist()
    assert (many.offsets[np.arange(301)] == one.offsets[np.arange(301)]).all()
    everywhere = np.random.default_rng(1).permutation(one.num_tokens)
    assert (many.offsets.find(everywhere) == one.offsets.find(everywhere)).all()
    for i in (0, 6, 7, 299):
        assert many.document_ids(i) == f"d{i}"
        assert many.document_bytes(i) == len(many.document(i)) - 1
    rows = np.random.default_rng(2).permutation(-(-one.num_tokens // 50))
    first, second = (packing.split(store, 50) for store in (one, many))
    assert first.documents(rows) == second.documents(rows)
    for name in ("ids", "segments", "positions", "previous"):
        found = [getattr(source.read(rows), name) for source in (first, second)]
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_packed_rows_keep_to_a_shard_and_are_those_of_the_stored_plan(many_shards, scheme):
    stores = [TokenStore.open(f"{scheme}{many_shards / 'many'}", field=f) for f in PAIRS.fields]
    stored = packing.best_fit(stores[0], 32), pairs.Pairs(stores, RowLayout((70,), PAIRS.fields))
    for store in stores:
        for shard in store.shards:
            shard.plans.clear()
    made = packing.best_fit(stores[0], 32), pairs.Pairs(stores, RowLayout((70,), PAIRS.fields))
    for first, second in zip(stored, made, strict=True):
        rows = np.random.default_rng(0).permutation(len(first))
        spans = first.documents(rows)
        np.testing.assert_array_equal(first.read(rows).ids, second.read(rows).ids)
        assert spans == second.documents(rows)
        assert all(len({span.document // 7 for span in row}) == 1 for row in spans)
        seen = sorted((span.document, span.start) for row in spans for span in row)
        assert {document for document, _ in seen} == set(range(300))


def test_documents_and_rows_outside_of_the_shards_are_refused(many_shards):
    store = TokenStore.open(many_shards / "many")
    for read in (store.document, store.document_ids, store.document_bytes):
        for i in (-1, 300):
            with pytest.raises(IndexError, match="no document"):
                read(i)


def test_no_more_files_stay_open_than_a_process_may_have(many_shards):
    store_files._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    for field in PAIRS.fields:
        store = TokenStore.open(many_shards / "many", field=field)
        for i in range(300):
            store.document(i), store.document_ids(i), store.document_bytes(i)
    assert store_files._opened.cache_info().misses > 300
    assert len(os.listdir("/proc/self/fd")) - before <= store_files._MAX_OPEN
