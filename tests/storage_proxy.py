"""A proxy before an emulated object store: faults on demand, and generations for GCS.

The emulator of GCS neither sends the generation of what is read nor obeys ifGenerationMatch, on
which TensorStore and locks rely, as the real service does (cloud.google.com/storage/docs/
request-preconditions); the proxy does both.

    python tests/storage_proxy.py http://127.0.0.1:9000 --fail=0.2 --delay=0.2 --cut=0.05
"""

import argparse
import collections
import contextlib
import http.client
import http.server
import json
import random
import re
import threading
import time
import urllib.parse

OBJECT = re.compile(r"/(?:download/|upload/)?storage/v1/b/([^/]+)/o(?:/([^/?]+))?$")
SKIPPED = ("connection", "transfer-encoding", "keep-alive", "date", "server", "content-length")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default, 5, makes clients that open many wait for a second

    def handle_error(self, request, client_address):
        """Say nothing: a client was killed."""


class Proxy:
    """A server on a free port of loopback; a context.

    fail: share of the requests answered with 503 in place of the store. cut: share of the uploads
    whose connection breaks in the middle. delay: seconds before each request. requests: counts by
    method.
    """

    def __init__(self, target, *, fail=0.0, delay=0.0, cut=0.0, seed=0, port=0):
        self.target = urllib.parse.urlsplit(target)
        self.fail, self.delay, self.cut = fail, delay, cut
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.generations, self.log = {}, None
        self.requests = collections.Counter()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self.server = _Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def draw(self):
        with self.lock:
            return self.random.random()

    def forward(self, method, path, headers, body):
        """(status, headers, body) of the store's answer."""
        connection = http.client.HTTPConnection(self.target.netloc, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer of two packets waits 40 ms for an ACK
    wbufsize = -1
    proxy = None

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _handle(self):
        proxy = self.proxy
        proxy.requests[self.command] += 1
        started = time.perf_counter()
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        is_upload = self.command in ("PUT", "POST")
        if is_upload and proxy.draw() < proxy.cut:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        time.sleep(proxy.delay)
        if proxy.draw() < proxy.fail:
            self._answer(503, [], b"try again")
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*SKIPPED, "expect")}
        headers["Content-Length"] = str(len(body))
        with proxy.lock:  # a condition is checked and obeyed at once
            answer = self._with_generations(headers, body)
        with contextlib.suppress(ConnectionError):  # the client was killed
            self._answer(*answer)
        if proxy.log:
            took = time.perf_counter() - started
            print(f"{took:.3f} {self.command} {self.path[:150]} {answer[0]}", file=proxy.log)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle

    def _with_generations(self, headers, body):
        proxy, url = self.proxy, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        found = OBJECT.match(url.path)
        key = None
        if found:
            name = urllib.parse.unquote(found[2]) if found[2] else query.get("name")
            if name is None and query.get("uploadType") == "multipart":
                name = json.loads(re.search(rb"\{.*?\}", body, re.S)[0])["name"]
            key = (found[1], name)
        now = proxy.generations.get(key, 0)
        expected = query.get("ifGenerationMatch")
        if key and expected is not None and int(expected) != now:
            return 412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
        if key and now and query.get("ifGenerationNotMatch") == str(now):
            return 304, [], b""
        status, answered, content = proxy.forward(self.command, self.path, headers, body)
        if status == 206 and not content:  # a range behind the end, as the real services answer it
            status, answered = 416, []
        if found and status < 300:
            self._remember(key, content)
        answered = [(k, v.replace(f"http://{proxy.target.netloc}", proxy.url)) for k, v in answered]
        content = (
            content
            if query.get("alt") == "media"
            else content.replace(f"http://{proxy.target.netloc}".encode(), proxy.url.encode())
        )
        if key and query.get("alt") == "media" and status < 300:
            answered.append(("x-goog-generation", str(proxy.generations.get(key, 1))))
        return status, answered, content

    def _remember(self, key, content):
        if self.command == "DELETE":
            self.proxy.generations.pop(key, None)
        elif self.command in ("POST", "PUT"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                made = json.loads(content)
                made = made.get("resource", made)
                self.proxy.generations[made["bucket"], made["name"]] = int(made["generation"])

    def _answer(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in SKIPPED:
                self.send_header(name, value)
        length = dict((k.lower(), v) for k, v in headers).get("content-length")
        is_head = self.command == "HEAD" and length is not None
        self.send_header("Content-Length", length if is_head else str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self.wfile.write(content)
        self.wfile.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fail", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--cut", type=float, default=0.0)
    flags = parser.parse_args()
    with Proxy(
        flags.target, fail=flags.fail, delay=flags.delay, cut=flags.cut, port=flags.port
    ) as p:
        print(p.url, flush=True)
        threading.Event().wait()
