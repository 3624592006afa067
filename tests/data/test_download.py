"""Downloads: once, whole, the expected content or nothing; one sentence without a network."""

import contextlib
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest

from tinygrad_llm.data import cache, corpora, download, texts
from tinygrad_llm.data.download import PUBLIC, Remote, fetch, find, place
from tinygrad_llm.data.report import Silent
from tinygrad_llm.storage import UNFINISHED

BODY = ("To be, or not to be. 中文 🎉\n" * 20_000).encode()
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        if self.path == "/missing.txt":
            self.send_error(404)
            return
        if self.path == "/moved.txt":
            self.send_response(302)
            self.send_header("Location", "/book.txt")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who does not want it hangs up
            self.wfile.write(BODY[: len(BODY) // 2] if self.path == "/cut.txt" else BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server on this machine, and an empty cache."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: Server, name: str = "book.txt") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def kept() -> list[str]:
    """What the cache has of downloads, but for locks."""
    folder = cache.folder() / "downloads"
    found = folder.iterdir() if folder.exists() else []
    return sorted(path.name for path in found if not path.name.endswith(".lock"))


class Heard(Silent):
    def __init__(self):
        self.said: list[str] = []
        self.done: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.done.append((what, done, total))


def refusal(remote: Remote, kind: type[Exception] = OSError) -> str:
    with pytest.raises(kind) as info:
        fetch(remote)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_file_is_downloaded_once(server: Server):
    heard = Heard()
    remote = Remote(url(server), SHA)
    path = fetch(remote, heard)
    assert path == place(remote)
    assert path.name.endswith("-book.txt")
    assert path.read_bytes() == BODY
    assert heard.done[-1] == (f"downloading {remote.url}", len(BODY), len(BODY))
    assert SHA in heard.said[0]
    assert fetch(remote) == path
    assert server.requests == ["/book.txt"]
    assert kept() == [path.name]


def test_a_public_set_is_a_text_by_its_name(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PUBLIC, "shakespeare", Remote(url(server), SHA))
    corpus = corpora.load_text("shakespeare")
    assert (corpus.name, corpus.text, corpus.sha256) == ("shakespeare", BODY.decode(), SHA)
    assert texts.open_text("shakespeare").sha256 == SHA
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    large = texts.open_text("shakespeare")
    assert (large.name, large.in_memory, large.sha256) == ("shakespeare", False, SHA)
    assert server.requests == ["/book.txt"]
    assert corpora.lasting("shakespeare") == "shakespeare"


def test_a_url_of_ones_own_with_its_hash(server: Server):
    source = f"{url(server)}#sha256={SHA.upper()}"
    assert corpora.load_text(source).text == BODY.decode()
    assert corpora.lasting(source) == source
    assert fetch(Remote(url(server, "moved.txt"), SHA)).read_bytes() == BODY


def test_what_shakespeare_is():
    assert PUBLIC["shakespeare"].url.startswith("https://")
    assert PUBLIC["shakespeare"].sha256.startswith("86c4e6aa9db7c042ec79")


def test_a_wrong_hash_is_refused_and_nothing_kept(server: Server):
    remote = Remote(url(server), "0" * 64)
    sentence = refusal(remote, ValueError)
    assert f"has sha256 {SHA}, expected {'0' * 64}" in sentence
    assert "nothing was kept" in sentence
    assert kept() == []


def test_a_file_in_the_cache_is_checked_too(server: Server):
    remote = Remote(url(server), SHA)
    path = fetch(remote)
    path.write_bytes(BODY[:-1])
    assert f"{path} has sha256" in refusal(remote, ValueError)
    path.unlink()
    assert fetch(remote).read_bytes() == BODY


def test_a_download_that_breaks_off_is_not_kept(server: Server):
    sentence = refusal(Remote(url(server, "cut.txt"), SHA))
    assert "ended after" in sentence or "broke off" in sentence
    assert kept() == []


def test_what_a_killed_download_left_is_cleared_away(server: Server):
    remote = Remote(url(server), SHA)
    folder = cache.writable("downloads")
    (folder / f"{UNFINISHED}0123-{place(remote).name}").write_bytes(b"half")
    (folder / f"{UNFINISHED}0123-another").write_bytes(b"still at it")
    fetch(remote)
    assert kept() == [f"{UNFINISHED}0123-another", place(remote).name]


def test_what_the_server_says_is_told(server: Server):
    sentence = refusal(Remote(url(server, "missing.txt"), SHA))
    assert "missing.txt cannot be downloaded: the server says 404" in sentence


def test_without_a_network_the_url_and_the_way_around_are_named(server, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = Remote(f"http://127.0.0.1:{port}/book.txt", SHA)
    sentence = refusal(remote)
    assert f"{remote.url} cannot be downloaded (Connection refused)" in sentence
    assert f"put the file there by hand: {place(remote)}" in sentence
    place(remote).write_bytes(BODY)
    assert fetch(remote).read_bytes() == BODY


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        remote = Remote(f"http://127.0.0.1:{silent.getsockname()[1]}/book.txt", SHA)
        assert "timed out" in refusal(remote)
    assert kept() == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("http://example.org/a.txt", "not encrypted"),
        ("https://example.org/a.txt#sha256=12", "expected #sha256= and 64 hex digits"),
        ("https://example.org/a.txt#top", "expected #sha256= and 64 hex digits"),
        ("https:///a.txt", "names no host"),
    ],
)
def test_a_url_that_cannot_be_trusted_is_refused_before_anything_is_fetched(source, words):
    with pytest.raises(ValueError, match=words):
        find(source)


def test_a_redirect_out_of_encryption_is_refused(server: Server, monkeypatch):
    """An https address without a hash: what answers in the end has to be encrypted as well."""
    remote = Remote(url(server))  # as if https had led here
    assert "not encrypted: refused" in refusal(remote, ValueError)
    assert kept() == []


@pytest.mark.parametrize("source", ["book.txt", "httpx.txt", "ftp://host/x", "./shakespeare", ""])
def test_other_names_are_not_the_networks(source: str):
    assert find(source) is None


def test_names_in_the_cache_are_harmless(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    for odd in ("https://h/", "https://h/..", "https://h/%2e%2e%2fx", "https://h/a b?c=d/e"):
        path = place(Remote(odd))
        assert path.parent == tmp_path / "downloads"
        assert path.resolve() == path
    assert place(Remote("https://h/web.jsonl?x=1")).suffix == ".jsonl"
    assert place(Remote("https://h/a", SHA)) != place(Remote("https://h/a"))


def test_a_full_disk_is_one_sentence(server: Server, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_download", full)
    sentence = refusal(Remote(url(server), SHA))
    assert "cannot be kept in the cache" in sentence
    assert "No space left on device" in sentence
