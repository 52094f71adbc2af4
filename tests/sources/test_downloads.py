"""The same source again, interrupted downloads, and the cache: its budget, other processes, and cancelling."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from cog import CancelationException
from safetensors.numpy import save

from flux_lora.errors import SourceError
from flux_lora.sources import Sources
from flux_lora.sources.cache import Cache, Writer
from tests.sources.internet import (
    PUBLIC_ADDRESS,
    Exchange,
    Internet,
    Route,
    answer,
    broken,
    file,
    in_turn,
    redirect,
)
from tests.sources.test_services import (
    COMMIT,
    VERSION,
    serve_all,
    serve_civitai,
    serve_hub,
    serve_replicate,
    trained,
)

URL = "https://files.example.com/x.safetensors"
HOST = "files.example.com"
LONG_AGO = time.time() - 10**6
LONG_ETAG = '"0123456789abcdef"'


def contents(tmp_path: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in (tmp_path / "cache" / "files").iterdir())


EMPTY, BLOCK = 6 * 4096, 4096
"""What an empty cache takes on disk: its five directories and the sum; and what any file takes at least."""


def on_disk(path: Path) -> int:
    return sum(found.lstat().st_blocks for found in (path, *path.rglob("*")) if found.exists()) * 512


def partials(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "partial").iterdir())


def conditions(internet: Internet, host: str = HOST) -> list[str | None]:
    return [exchange.headers.get("if-none-match") for exchange in internet.asked if exchange.host == host]


def ranges(internet: Internet) -> list[tuple[str | None, str | None]]:
    return [(exchange.headers.get("range"), exchange.headers.get("if-range")) for exchange in internet.asked]


def fetch(sources: Sources, source: str = URL) -> bytes:
    return sources.fetch(source, root=None).read_bytes()


FIXED = [
    f"owner/name/{VERSION}",
    f"hf://owner/name@{COMMIT}",
    f"hf://owner/name@{COMMIT}/lora.safetensors",
    "civitai.com/models/111?modelVersionId=222",
    "https://civitai.com/api/download/models/222",
]


@pytest.mark.parametrize("source", FIXED)
def test_what_cannot_change_is_asked_for_once(
    source: str, make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    serve_all(internet, lora)
    assert fetch(make_sources(), source) == lora
    internet.reset()
    assert fetch(make_sources(), source) == lora
    assert internet.resolved == []


def test_nobody_gets_a_cached_file_for_claiming_its_digest(
    sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    serve_all(internet, lora)
    fetch(sources)
    digest = hashlib.sha256(lora).hexdigest()
    internet.serve(f"https://cdn-lfs.huggingface.co/{digest}", other_lora)
    with pytest.raises(SourceError, match="its SHA-256 differs"):
        fetch(sources, "hf://owner/name")
    assert fetch(sources, "civitai.com/models/111") == lora
    assert len(internet.paths("storage.civitai.com")) == 1


@pytest.mark.parametrize("source", ["hf://owner/name", "civitai.com/models/111"])
def test_newest_version_is_looked_up_again(
    source: str, sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    serve_all(internet, lora)
    assert fetch(sources, source) == lora
    asked = len(internet.asked)
    assert fetch(sources, source) == lora
    assert len(internet.asked) == asked + 1
    serve_hub(internet, {"lora.safetensors": other_lora}, commit="f" * 40)
    serve_civitai(internet, other_lora, number=333)
    assert fetch(sources, source) == other_lora


def test_file_at_an_address_is_asked_about_each_time(
    sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    internet.serve(URL, file(lora, '"1"'))
    assert [fetch(sources), fetch(sources)] == [lora, lora]
    internet.serve(URL, file(other_lora, '"2"'))
    assert [fetch(sources), fetch(sources)] == [other_lora, other_lora]
    assert conditions(internet) == [None, '"1"', '"1"', '"2"']


def test_replicate_weights_are_asked_about_after_the_redirect(
    sources: Sources, internet: Internet, lora: bytes
) -> None:
    serve_replicate(internet, lora)
    assert [fetch(sources, "owner/name"), fetch(sources, "owner/name")] == [lora, lora]
    assert conditions(internet, "replicate.com") == [None, None]
    assert conditions(internet, "replicate.delivery") == [None, '"t"']


def test_etag_counts_only_at_the_address_that_gave_it(
    sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    internet.serve("https://files.example.com/1.safetensors", file(lora, '"same"'))
    internet.serve("https://files.example.com/2.safetensors", file(other_lora, '"same"'))
    internet.serve(URL, in_turn(redirect("/1.safetensors"), redirect("/2.safetensors")))
    assert [fetch(sources), fetch(sources)] == [lora, other_lora]


@pytest.mark.parametrize(("etag", "counts"), [(LONG_ETAG, True), (f"W/{LONG_ETAG}", False), ('"1"', False)])
def test_signature_in_the_query_does_not_make_it_another_file(
    etag: str, counts: bool, sources: Sources, internet: Internet, lora: bytes
) -> None:
    internet.serve("https://storage.civitai.com/f", file(lora, etag))
    signed = [redirect(f"https://storage.civitai.com/f?sig={number}") for number in range(2)]
    internet.serve(URL, in_turn(*signed))
    fetch(sources)
    fetch(sources)
    assert conditions(internet, "storage.civitai.com") == [None, etag if counts else None]


def by_query(**routes: Route) -> Route:
    return lambda exchange: routes[exchange.path.partition("?")[2]](exchange)


@pytest.mark.parametrize("headers", [{"modified": LONG_AGO}, {"etag": '"1"'}], ids=["modified", "etag"])
def test_another_query_may_be_another_file(
    headers: dict[str, Any], sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    internet.serve("https://files.example.com/dl", by_query(a=file(lora, **headers), b=file(other_lora, **headers)))
    internet.serve(URL, in_turn(redirect("/dl?a"), redirect("/dl?b")))
    assert [fetch(sources), fetch(sources)] == [lora, other_lora]


def test_download_is_not_continued_with_that_of_another_query(
    sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    files = by_query(a=broken(lora, 30_000, etag='"1"'), b=file(other_lora, '"1"'))
    internet.serve("https://files.example.com/dl", files)
    internet.serve(URL, in_turn(redirect("/dl?a"), redirect("/dl?b")))
    assert fetch(sources) == other_lora


def test_download_out_of_time_is_continued_by_the_next_fetch(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    def steady(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(len(lora)), etag='"1"')
        for start in range(0, len(lora), 100):
            time.sleep(0.02)
            exchange.wire.wfile.write(lora[start : start + 100])

    internet.serve(URL, in_turn(steady, file(lora, '"1"')))
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"files\.example\.com does not answer, or too slowly"):
        fetch(make_sources(total=0.5))
    assert 0.4 < time.monotonic() - start < 3
    assert len(internet.asked) == 1
    assert fetch(make_sources()) == lora
    assert internet.asked[1].headers["range"] != "bytes=0-"


@pytest.mark.parametrize(("age", "counts"), [(3600, True), (5, False)])
def test_modification_time_counts_once_it_is_old(
    age: float, counts: bool, sources: Sources, internet: Internet, lora: bytes
) -> None:
    internet.serve(URL, file(lora, modified=time.time() - age))
    assert [fetch(sources), fetch(sources)] == [lora, lora]
    assert ["if-modified-since" in exchange.headers for exchange in internet.asked] == [False, counts]


def test_etag_that_cannot_be_sent_back_does_not_count(sources: Sources, internet: Internet, lora: bytes) -> None:
    internet.serve(URL, file(lora, '"\xe9"', time.time() - 3600))
    assert [fetch(sources), fetch(sources)] == [lora, lora]
    assert conditions(internet) == [None, None]


def test_without_any_validator_the_file_is_fetched_again(
    sources: Sources, internet: Internet, lora: bytes, other_lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, in_turn(file(lora), file(lora), file(other_lora)))
    assert [fetch(sources), fetch(sources), fetch(sources)] == [lora, lora, other_lora]
    assert contents(tmp_path) == sorted([lora, other_lora])


@pytest.mark.parametrize("failure", [answer(503), answer(404), lambda _: None])
def test_source_that_cannot_be_asked_fails_although_cached(
    failure: Route, sources: Sources, internet: Internet, lora: bytes
) -> None:
    internet.serve(URL, file(lora, '"1"'))
    fetch(sources)
    internet.serve(URL, failure)
    with pytest.raises(SourceError, match=r"files\.example\.com"):
        fetch(sources)
    internet.serve(URL, file(lora, '"1"'))
    assert fetch(sources) == lora
    assert conditions(internet)[-1] == '"1"'


def test_truncated_download_is_continued(sources: Sources, internet: Internet, lora: bytes, tmp_path: Path) -> None:
    internet.serve(URL, in_turn(broken(lora, 30_000, etag='"1"'), file(lora, '"1"')))
    assert fetch(sources) == lora
    assert ranges(internet) == [(None, None), ("bytes=30000-", '"1"')]
    assert partials(tmp_path) == []


def test_download_is_continued_by_the_next_fetch(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    def no_more(exchange: Exchange) -> None:
        exchange.head(206, etag='"1"', content_range=f"bytes 30000-{len(lora) - 1}/{len(lora)}", content_length="9999")

    internet.serve(URL, in_turn(broken(lora, 30_000, etag='"1"'), no_more))
    with pytest.raises(SourceError, match="broke the connection off"):
        fetch(make_sources())
    internet.asked.clear()
    internet.serve(URL, file(lora, '"1"'))
    assert fetch(make_sources()) == lora
    assert ranges(internet) == [("bytes=30000-", '"1"')]


def test_complete_download_is_kept_when_cancelled_before_it_is_verified(
    sources: Sources, internet: Internet, lora: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(_: Path) -> None:
        raise CancelationException

    internet.serve(URL, file(lora, '"1"'))
    with monkeypatch.context() as patch:
        patch.setattr("flux_lora.sources.read_header", cancelled)
        with pytest.raises(CancelationException):
            fetch(sources)
    assert fetch(sources) == lora
    assert ranges(internet) == [(None, None), (f"bytes={len(lora)}-", '"1"')]


def other_state(exchange: Exchange) -> None:
    """A server that ignores If-Range and sends the rest of another state of the file."""
    exchange.reply(206, b"other bytes", etag='"2"', content_range="bytes 30000-30010/30011")


def other_part(exchange: Exchange) -> None:
    exchange.reply(206, b"other bytes", etag='"1"', content_range="bytes 29999-30010/30011")


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(answer(416), id="no such range"),
        pytest.param(other_state, id="another etag"),
        pytest.param(other_part, id="another part"),
        pytest.param(answer(503), id="a problem"),
    ],
)
def test_download_starts_anew_when_it_cannot_be_continued(
    rest: Route, sources: Sources, internet: Internet, lora: bytes, other_lora: bytes
) -> None:
    internet.serve(URL, in_turn(broken(lora, 30_000, etag='"1"'), rest, file(other_lora, '"2"')))
    assert fetch(sources) == other_lora


@pytest.mark.parametrize("etag", ['W/"1"', '"\xe9"', None])
def test_download_without_a_strong_etag_is_never_continued(
    etag: str | None, sources: Sources, internet: Internet, lora: bytes
) -> None:
    headers = {"etag": etag} if etag else {}
    internet.serve(URL, in_turn(broken(lora, 30_000, **headers), file(lora, etag)))
    assert fetch(sources) == lora
    assert ranges(internet) == [(None, None), (None, None)]


def test_slow_but_steady_progress_earns_new_tries(make_sources: Callable[..., Sources], internet: Internet) -> None:
    big = save({"a": np.zeros(1_600_000, np.float32)})

    def pieces(exchange: Exchange) -> None:
        start = int(exchange.headers.get("range", "bytes=0-")[6:-1])
        place = {"content_range": f"bytes {start}-{len(big) - 1}/{len(big)}"} if start else {}
        exchange.head(206 if start else 200, etag='"1"', content_length=str(len(big) - start), **place)
        exchange.wire.wfile.write(big[start : start + 1_200_000])

    internet.serve(URL, pieces)
    assert fetch(make_sources(max_bytes=10**7)) == big
    assert len(internet.asked) == 6


def test_progress_is_shown_by_name(
    sources: Sources, internet: Internet, lora: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    internet.serve(URL, lora)
    fetch(sources, f"{URL}?sig=secret")
    shown = capfd.readouterr().err
    assert f"'{URL}'" in shown
    assert "40.1k/40.1k" in shown
    assert "B/s" in shown


def age(tmp_path: Path, data: bytes, seconds: float) -> None:
    path = tmp_path / "cache" / "files" / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    os.utime(path, (LONG_AGO - seconds, LONG_AGO - seconds))


def test_least_recently_used_files_leave_first(
    make_sources: Callable[..., Sources], internet: Internet, tmp_path: Path
) -> None:
    loras = [save({"a": np.full(5000, number, np.float32)}) for number in range(4)]
    urls = [f"https://files.example.com/{number}.safetensors" for number in range(4)]
    for number, url in enumerate(urls):
        internet.serve(url, file(loras[number], f'"{number}"'))
    sources = make_sources(cache_bytes=EMPTY + 3 * (20_480 + BLOCK) + 3 * BLOCK)
    for number in range(3):
        fetch(sources, urls[number])
        age(tmp_path, loras[number], seconds=-number)
    fetch(sources, urls[0])  # used again: now 1 is the oldest
    fetch(sources, urls[3])
    assert contents(tmp_path) == sorted([loras[0], loras[2], loras[3]])
    internet.asked.clear()
    assert fetch(sources, urls[1]) == loras[1]
    assert conditions(internet) == [None]


def test_a_file_in_use_stays_and_what_does_not_fit_beside_it_is_refused(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, other_lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, lora)
    internet.serve("https://files.example.com/y.safetensors", other_lora)
    user, other = (make_sources(cache_bytes=EMPTY + 70_000) for _ in range(2))
    first = user.fetch(URL, root=None)
    with pytest.raises(SourceError, match="it does not fit beside what is in use now into the cache"):
        fetch(other, "https://files.example.com/y.safetensors")
    assert first.read_bytes() == lora
    assert partials(tmp_path) == []
    age(tmp_path, lora, 0)  # for so long it has not been used by the one that fetched it
    fetch(other, "https://files.example.com/y.safetensors")
    assert contents(tmp_path) == [other_lora]


def test_a_fetch_makes_room_of_what_the_same_process_fetched_before(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, other_lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, lora)
    internet.serve("https://files.example.com/y.safetensors", other_lora)
    sources = make_sources(cache_bytes=EMPTY + 70_000)
    fetch(sources)
    fetch(sources, "https://files.example.com/y.safetensors")
    assert contents(tmp_path) == [other_lora]


def test_a_small_budget_is_kept_whatever_is_fetched(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    """Names of one file, and files of a few bytes: each takes a block of the disk."""
    sources, most = make_sources(cache_bytes=200_000), 0
    internet.serve(URL, file(lora, '"1"'))
    for number in range(40):
        fetch(sources, f"{URL}?{number}")
        sources.fetch(f"data:,{quote(save({'a': np.arange(number + 1, dtype=np.uint8)}))}", root=None)
        most = max(most, on_disk(tmp_path / "cache"))
    assert 150_000 < most <= 200_000
    assert fetch(sources) == lora


def test_a_file_larger_than_the_budget_is_refused_although_its_length_is_a_secret(
    make_sources: Callable[..., Sources],
    internet: Internet,
    lora: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most, write = 0, Writer.write

    def endless(exchange: Exchange) -> None:
        exchange.head(200, transfer_encoding="chunked", etag='"1"')
        for _ in range(1000):
            exchange.wire.wfile.write(b"4000\r\n%s\r\n" % bytes(0x4000))

    def measured(writer: Writer, data: bytes) -> None:
        # By who writes: the server's thread would count a file before it is evicted, and then its successor.
        nonlocal most
        write(writer, data)
        most = max(most, on_disk(tmp_path / "cache"))

    sources = make_sources(cache_bytes=300_000, max_bytes=10**9)
    internet.serve(URL, lora)
    fetch(sources)
    internet.serve("https://files.example.com/y.safetensors", endless)
    monkeypatch.setattr(Writer, "write", measured)
    with pytest.raises(SourceError, match=r"which may take 300,000 bytes .FLUX_ADAPTER_CACHE_BYTES."):
        fetch(sources, "https://files.example.com/y.safetensors")
    assert 250_000 < most <= 300_000
    assert partials(tmp_path) == []
    assert fetch(sources) == lora


def test_a_cache_of_many_files_is_not_looked_through_for_each_fetch(
    sources: Sources, internet: Internet, lora: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    internet.serve(URL, file(lora, '"1"'))
    fetch(sources)
    looked: list[object] = []
    scandir = os.scandir

    def look(path: Path) -> object:
        looked.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    fetch(sources, f"{URL}?2")
    sources.fetch(f"data:,{quote(save({'a': np.arange(9)}))}", root=None)
    assert looked == []


def test_names_do_not_pile_up_and_neighbours_do_not_wait(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    """Three hundred sources cannot share 256 locks."""
    cache, other = Cache(tmp_path / "cache", 10**9), make_sources(total=1)
    with ExitStack() as held:
        for number in range(300):
            held.enter_context(cache.lock(f"anyone {URL}?{number}", 0))
        internet.serve(URL, file(lora, '"1"'))
        assert fetch(other, f"{URL}?300") == lora
    assert [path.name for path in (tmp_path / "cache" / "locks").iterdir()] == ["files.lock"]


def test_the_same_source_is_waited_for_until_the_deadline(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    begun, finish = threading.Event(), threading.Event()

    def slowly(exchange: Exchange) -> None:
        begun.set()
        finish.wait(20)
        file(lora, '"1"')(exchange)

    internet.serve(URL, slowly)
    first = threading.Thread(target=fetch, args=(make_sources(),))
    first.start()
    begun.wait(20)
    start = time.monotonic()
    with pytest.raises(SourceError, match="another request is still fetching it; try again later"):
        fetch(make_sources(total=0.5))
    assert time.monotonic() - start < 5
    finish.set()
    first.join()
    assert fetch(make_sources(total=5)) == lora


def test_room_is_made_before_the_download(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, other_lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, lora)
    fetch(make_sources())
    age(tmp_path, lora, 0)
    seen: list[list[bytes]] = []

    def route(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(len(other_lora)))
        exchange.wire.wfile.write(other_lora[:1])
        deadline = time.monotonic() + 5
        while contents(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(contents(tmp_path))
        exchange.wire.wfile.write(other_lora[1:])

    internet.serve("https://files.example.com/y.safetensors", route)
    fetch(make_sources(cache_bytes=EMPTY + 70_000), "https://files.example.com/y.safetensors")
    assert seen == [[]]


def test_forgotten_partial_downloads_are_evicted(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, other_lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, in_turn(broken(lora, 30_000, etag='"1"'), lambda _: None))
    with pytest.raises(SourceError):
        fetch(make_sources())
    assert sorted(path.stat().st_size > 1000 for path in partials(tmp_path)) == [False, True]
    for path in partials(tmp_path):
        os.utime(path, (LONG_AGO, LONG_AGO))
    internet.serve("https://files.example.com/y.safetensors", other_lora)
    fetch(make_sources(cache_bytes=EMPTY + 60_000), "https://files.example.com/y.safetensors")
    assert partials(tmp_path) == []


@pytest.mark.parametrize(
    "error", [answer(404), answer(200, b"<html>", content_type="text/html"), redirect("ftp://a.b/")]
)
def test_a_partial_download_goes_on_any_error_but_the_connections(
    error: Route, sources: Sources, internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, in_turn(broken(lora, 30_000, etag='"1"'), error))
    with pytest.raises(SourceError):
        fetch(sources)
    assert partials(tmp_path) == []


def test_damaged_index_is_no_obstacle(sources: Sources, internet: Internet, lora: bytes, tmp_path: Path) -> None:
    internet.serve(URL, file(lora, '"1"'))
    for damage in (b"", b"[1]", b'{"sha256": 5}', b'{"sha256": "%s"}' % hashlib.sha256(lora).hexdigest().encode()):
        fetch(sources)
        for index in (tmp_path / "cache" / "index").iterdir():
            index.write_bytes(damage)
        assert fetch(sources) == lora


def test_full_disk(sources: Sources, internet: Internet, lora: bytes) -> None:
    internet.serve(URL, lora)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SourceError, match=r"cannot be read or stored: File too large\."):
            fetch(sources)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fetch(sources) == lora


PROCESS = """
import ssl, sys
from pathlib import Path
import httpcore2
from flux_lora.sources import Network, Sources, Tokens

port, ca, cache = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
tls.load_verify_locations(ca)
connect = lambda address, port_, timeout: httpcore2.SyncBackend().connect_tcp("127.0.0.1", port, timeout)
network = Network(lambda host: ["8.8.8.8"], connect, tls)
sources = Sources(cache=cache, cache_bytes=10**9, max_bytes=10**6, tokens=Tokens(), network=network)
print(sources.fetch("https://files.example.com/x.safetensors", root=None))
assert "torch" not in sys.modules
"""


def test_two_processes_fetch_a_file_once(internet: Internet, lora: bytes, tmp_path: Path) -> None:
    served: list[int] = []
    both_ask = threading.Event()

    def slowly(exchange: Exchange) -> None:
        if "if-none-match" not in exchange.headers:
            served.append(1)
            both_ask.wait(3)
        file(lora, '"1"')(exchange)

    internet.serve(URL, slowly)
    command = [sys.executable, "-c", PROCESS, str(internet.port), str(internet.authority), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 30
    while not served and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    both_ask.set()
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {Path(output).read_bytes() for output in outputs} == {lora}
    assert served == [1]


def interrupt_after(steps: int) -> Callable[[FrameType, str, object], Any]:
    """A trace function that cancels at the n-th line run in the package, as Cog may: in a ``finally`` too."""
    left = [steps]

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if "/flux_lora/sources/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise CancelationException
        return trace

    return trace


@pytest.mark.parametrize("packed", [False, True])
def test_cancelled_anywhere_the_cache_stays_whole(
    packed: bool, make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    url = f"{URL[:-12]}.tar" if packed else URL
    internet.serve(url, file(trained(lora) if packed else lora, '"1"'))
    cancelled, steps = 0, 1
    while True:
        sources = make_sources()
        sys.settrace(interrupt_after(steps))
        try:
            sources.fetch(url, root=None)
        except CancelationException:
            cancelled += 1
        else:
            break
        finally:
            sys.settrace(None)
        if (tmp_path / "cache" / "files").exists():
            assert set(contents(tmp_path)) <= {lora}
        if cancelled % 5 == 0:
            assert fetch(sources, url) == lora
            for path in (tmp_path / "cache").rglob("*.*"):
                path.unlink()
        steps += 3
    assert cancelled > 50
    assert fetch(make_sources(), url) == lora


def test_address_is_checked_again_when_asked_again(sources: Sources, internet: Internet, lora: bytes) -> None:
    internet.serve(URL, file(lora, '"1"'))
    fetch(sources)
    internet.names[HOST] = ["10.0.0.1"]
    with pytest.raises(SourceError, match=r"leads to an address that is not public"):
        fetch(sources)
    assert internet.connected == [PUBLIC_ADDRESS]
