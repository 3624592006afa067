"""Texts from the network: fetched once into the cache, and known by their SHA-256.

A name of `PUBLIC` or a URL: `https://…`, with `#sha256=…` behind it to be sure of the content;
plain `http://…` only with that. Nothing is ever fetched that was not named.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.error
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tinygrad_llm.data import cache
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.storage import UNFINISHED, write_file

TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Remote:
    """A file on the network; `sha256` is empty where it is not known what it should be."""

    url: str
    sha256: str = ""


PUBLIC = {
    # Karpathy's char-rnn: 1,115,394 bytes of Shakespeare's plays.
    "shakespeare": Remote(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


def find(source: str) -> Remote | None:
    """What `source` names on the network; None where it is no name and no URL of ours.

    Raises ValueError for a URL that cannot be trusted or a hash that is none.
    """
    if source in PUBLIC:
        return PUBLIC[source]
    if not re.match(r"https?://", source, re.IGNORECASE):
        return None
    url, _, fragment = source.partition("#")
    digest = fragment.removeprefix("sha256=").lower()
    if fragment and not re.fullmatch(r"sha256=[0-9a-f]{64}", fragment, re.IGNORECASE):
        raise ValueError(f"{url} is followed by #{fragment}, expected #sha256= and 64 hex digits")
    if url.lower().startswith("http:") and not digest:
        raise ValueError(
            f"{url} is not encrypted, so anyone on the way could change it: use https://, or add "
            "#sha256= and the 64 hex digits of its SHA-256"
        )
    if not urllib.parse.urlsplit(url).hostname:
        raise ValueError(f"{url!r} names no host, expected such as https://example.org/book.txt")
    return Remote(url, digest)


def fetch(remote: Remote, report: Report = SILENT) -> Path:
    """The file, downloaded unless it is in the cache already.

    It is checked each time where its SHA-256 is known. Raises OSError with one sentence where the
    network or the server fails, ValueError where the content is not the expected one.
    """
    there = place(remote)
    if there.is_file():
        _check(there, remote, "delete it to download it again")
        return there
    path = cache.writable("downloads", report) / there.name
    lock = path.with_name(f".{path.name}.lock")
    with cache.alone(lock, report, f"downloading {remote.url}") as is_alone:
        if not path.is_file():
            for left in path.parent.glob(f"{UNFINISHED}*-{path.name}") if is_alone else ():
                left.unlink()  # of a process that was killed
            with _reaching(remote):
                write_file(path, lambda temporary: _download(remote, temporary, report))
            report.say(f"downloaded {remote.url} to {path}, sha256 {_sha256(path)}")
    return path


def place(remote: Remote) -> Path:
    """Where the file is in the cache, or where one may put it by hand."""
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(remote.url).path)).name
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:].lstrip(".") or "text"
    key = hashlib.sha256(f"{remote.url} {remote.sha256}".encode()).hexdigest()[:12]
    return cache.folder() / "downloads" / f"{key}-{safe}"


def _download(remote: Remote, path: Path, report: Report) -> None:
    import urllib.request  # here: it takes longer to load than a small text to read

    request = urllib.request.Request(remote.url, headers={"User-Agent": "tinygrad-llm"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        if not remote.sha256 and not answer.url.lower().startswith("https:"):
            raise ValueError(f"{remote.url} leads to {answer.url}, which is not encrypted: refused")
        total = int(answer.headers.get("Content-Length") or 0)
        done = 0
        while data := answer.read(_CHUNK):
            file.write(data)
            done += len(data)
            report.progress(f"downloading {remote.url}", done, max(total, done))
    if done < total:
        raise OSError(f"{remote.url} ended after {done:,} of {total:,} bytes: try again")
    _check(path, remote, "nothing was kept")


@contextlib.contextmanager
def _reaching(remote: Remote) -> Iterator[None]:
    """Within: what goes wrong on the network is one sentence, with the way around it."""
    from http.client import HTTPException

    by_hand = f"put the file there by hand: {place(remote)}"
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(
            f"{remote.url} cannot be downloaded: the server says {error.code} {error.reason}; "
            f"correct the address, or {by_hand}"
        ) from error
    except urllib.error.URLError as error:
        why = getattr(error.reason, "strerror", None) or error.reason
        raise OSError(
            f"{remote.url} cannot be downloaded ({why}): is there a network? Or {by_hand}"
        ) from error
    except (TimeoutError, HTTPException, ConnectionError) as error:
        why = str(error) or type(error).__name__
        raise OSError(f"{remote.url} broke off ({why}): try again, or {by_hand}") from error
    except OSError as error:
        if error.errno is None:  # a sentence already
            raise
        raise OSError(
            f"{remote.url} cannot be kept in the cache {place(remote).parent} ({error.strerror}): "
            f"free some space, or set {cache.VARIABLE} to another folder"
        ) from error


def _check(path: Path, remote: Remote, advice: str) -> None:
    if remote.sha256 and (found := _sha256(path)) != remote.sha256:
        what = path if path.name == place(remote).name else "what came"
        raise ValueError(
            f"{remote.url} is not the expected file: {what} has sha256 {found}, expected "
            f"{remote.sha256}; {advice}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
