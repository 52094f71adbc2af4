"""What one source may take of memory, time and disk, and of the next one's: a bounded share, then it is refused."""

import base64
import ctypes
import email.utils
import os
import re
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from cog import CancelationException
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_lora.errors import SettingsError, SourceError
from flux_lora.sources import Sources, archive
from flux_lora.sources.cache import Identity
from flux_lora.sources.client import validator_of
from flux_lora.sources.inline import PIECE, decode
from tests.sources.internet import Exchange, Internet, Route, file
from tests.sources.test_hostile_sources import GOOD, extended_header, member, safetensors, tar

URL = "https://files.example.com/x.safetensors"
REQUEST = Path("/nowhere")
MB = 10**6


# Memory


@pytest.mark.parametrize("head", ["data:,", "data:;base64,"])
def test_a_data_uri_costs_no_more_than_its_size(head: str, make_sources: Callable[..., Sources]) -> None:
    size = MB // 4
    big = safetensors({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, os.urandom(size))
    uri = head + "".join(f"%{byte:02x}" for byte in (base64.b64encode(big) if "base64" in head else big))
    sources = make_sources(max_bytes=10 * MB)
    started = time.process_time()
    path = sources.fetch(uri, root=REQUEST)
    assert time.process_time() - started < 2 * len(uri) / MB
    assert path.read_bytes() == big
    path.unlink()
    tracemalloc.start()
    sources.fetch(uri, root=REQUEST)
    assert tracemalloc.get_traced_memory()[1] < 3 * MB + len(uri)
    tracemalloc.stop()


@pytest.mark.parametrize("uri", ["data:," + "x" * 201_000, "data:," + "%41" * 201_000, "data:;base64," + "A" * 270_000])
def test_a_data_uri_is_measured_before_it_is_decoded(uri: str) -> None:
    with pytest.raises(SourceError, match="larger than the limit of 200,000 bytes"):
        decode(uri, 200_000)


@given(st.binary(max_size=99), st.integers(1, 12), st.booleans(), st.booleans())
def test_a_data_uri_is_decoded_the_same_in_any_pieces(data: bytes, piece: int, padded: bool, escaped: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flux_lora.sources.inline.PIECE", piece + 3)
        text = base64.b64encode(data).decode()
        text = text if padded else text.rstrip("=")
        text = "".join(f"%{ord(letter):02x}" for letter in text) if escaped else text
        assert b"".join(decode(f"data:;base64,{text}", 1000)) == data
        assert b"".join(decode("data:," + "".join(f"%{byte:02X}" for byte in data), 1000)) == data


@pytest.mark.parametrize("end", ["=AAA", "AA==AAAA", "AAA=AAAA", "*", "A"])
@pytest.mark.parametrize("start", [0, PIECE - 4, PIECE])
def test_damaged_base64_is_found_wherever_it_is(start: int, end: str) -> None:
    with pytest.raises(SourceError, match="its base64 is damaged"):
        list(decode(f"data:;base64,{'A' * start}{end}", 10 * MB))


# Time


def test_a_drip_for_a_request_is_given_up_and_the_operator_may_wait(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    def drip(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(len(lora)))
        for start in range(0, len(lora), 1000):
            time.sleep(0.02)
            exchange.wire.wfile.write(lora[start : start + 1000])

    internet.serve(URL, drip)
    sources = make_sources(requests={"request_rate": 200_000}, grace=0.2, slowest=1000)
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"files\.example\.com does not answer, or too slowly"):
        sources.fetch(URL, root=REQUEST)
    assert time.monotonic() - started < 5
    assert sources.fetch(URL, root=None).read_bytes() == lora


def hang(_: str) -> list[str]:
    time.sleep(5)
    return []


def silent(exchange: Exchange) -> None:
    exchange.head(200, content_length="9999")
    time.sleep(5)


@pytest.mark.parametrize("slow", ["name service", "server"])
def test_a_request_has_a_deadline_whoever_is_slow(
    slow: str, make_sources: Callable[..., Sources], internet: Internet
) -> None:
    internet.serve(URL, silent)
    if slow == "name service":
        internet.resolve = hang
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"files\.example\.com does not answer, or too slowly"):
        make_sources(requests={"request_seconds": 0.5}).fetch(URL, root=REQUEST)
    assert time.monotonic() - started < 2.5


def test_waiting_for_a_server_is_cancelled_within_a_second_or_two(sources: Sources, internet: Internet) -> None:
    """By an exception from outside, as Cog does it."""
    ended: list[float] = []

    def fetch() -> None:
        try:
            sources.fetch(URL, root=REQUEST)
        except CancelationException:
            ended.append(time.monotonic())

    begun = threading.Event()

    def answer(exchange: Exchange) -> None:
        begun.set()
        silent(exchange)

    internet.serve(URL, answer)
    fetching = threading.Thread(target=fetch)
    fetching.start()
    begun.wait(10)
    time.sleep(0.2)
    cancelled = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(fetching.ident or 0), ctypes.py_object(CancelationException)
    )
    fetching.join()
    [when] = ended
    assert when - cancelled < 2


def test_a_tar_is_read_within_the_deadline(make_sources: Callable[..., Sources], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(member("a")[0].tobuf() * 9000 + tar(member("x.safetensors", GOOD)))
    with pytest.raises(SourceError, match="it takes longer than a fetch may take"):
        make_sources(requests={"request_seconds": 0.02}).fetch("x.tar", root=tmp_path)
    assert make_sources().fetch("x.tar", root=tmp_path).read_bytes() == GOOD


def test_numbers_without_end_cost_a_tar_nothing(sources: Sources, tmp_path: Path) -> None:
    """Python before 3.11.10 takes a quarter of a second for each of these headers."""
    (tmp_path / "x.tar").write_bytes(
        b"".join(extended_header(15_000, b"1" * 15_000) + member(f"{n}")[0].tobuf() for n in range(100))
    )
    started = time.process_time()
    with pytest.raises(SourceError, match="damaged or truncated"):
        sources.fetch("x.tar", root=tmp_path)
    assert time.process_time() - started < 1


def test_numbers_in_a_tensor_are_no_header(sources: Sources, tmp_path: Path) -> None:
    digits = safetensors({"a": {"dtype": "U8", "shape": [9000], "data_offsets": [0, 9000]}}, b"1" * 9000)
    (tmp_path / "x.tar").write_bytes(tar(member("x.safetensors", digits)))
    assert sources.fetch("x.tar", root=tmp_path).read_bytes() == digits
    assert archive.HEADER_BYTES > 9000


# Disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a small disk where the cache will be, with options of tmpfs; or mounts it anew with others."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted: list[Path] = []

    def mount(options: str) -> None:
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}mode=700,{options}", "tmpfs", str(cache)]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("mounting a small disk takes root")
        mounted.append(cache)

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(cache)], check=True)


def test_a_download_leaves_room_on_the_disk_and_goes_when_it_cannot(
    disk: Callable[[str], None], make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    disk("size=2m")
    least = [2 * 2**20]

    def endless(exchange: Exchange) -> None:
        exchange.head(200, transfer_encoding="chunked", etag='"1"')
        while True:
            exchange.wire.wfile.write(b"4000\r\n%s\r\n" % bytes(0x4000))
            status = os.statvfs(tmp_path / "cache")
            least.append(status.f_bavail * status.f_frsize)

    def lying(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(10**9))
        exchange.wire.wfile.write(bytes(3 * 2**20))

    sources = make_sources(max_bytes=10**10)
    for number, route in enumerate((endless, lying)):
        internet.serve(f"https://files.example.com/{number}.safetensors", route)
        with pytest.raises(SourceError, match="the server's disk has no room for it|does not fit"):
            sources.fetch(f"https://files.example.com/{number}.safetensors", root=REQUEST)
        assert list((tmp_path / "cache" / "partial").iterdir()) == []
        internet.serve(URL, lora)
        assert sources.fetch(URL, root=REQUEST).read_bytes() == lora
    assert min(least) >= 2 * 2**20 // 20


def test_what_is_old_makes_room_on_a_small_disk(
    disk: Callable[[str], None], make_sources: Callable[..., Sources], internet: Internet, tmp_path: Path
) -> None:
    disk("size=1m")
    sources = make_sources(max_bytes=10**7)
    for number in range(8):
        big = safetensors(
            {"a": {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}, bytes([number]) * 300_000
        )
        internet.serve(URL, file(big, f'"{number}"'))
        assert sources.fetch(URL, root=REQUEST).read_bytes() == big
    assert len(list((tmp_path / "cache" / "files").iterdir())) < 4


def test_a_full_disk_is_emptied_and_tried_once_more(
    disk: Callable[[str], None], make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    """Full of names: there is room for bytes, and none for a file."""
    disk("size=9m,nr_inodes=24")
    sources = make_sources()
    for number in range(12):
        url = internet.serve(f"https://files.example.com/{number}.safetensors", lora)
        assert sources.fetch(url, root=REQUEST).read_bytes() == lora
    with suppress(OSError):
        for number in range(40):
            (tmp_path / "cache" / f"{number}").touch()
    message = f"{tmp_path}/cache cannot be used: No space left on device. Set FLUX_ADAPTER_CACHE to a directory"
    url = internet.serve("https://files.example.com/12.safetensors", lora)
    assert sources.fetch(url, root=REQUEST).read_bytes() == lora  # in place of what was there
    with suppress(OSError):
        for number in range(40):
            (tmp_path / "cache" / f"{number}-more").touch()
    with pytest.raises(SettingsError, match=re.escape(message)):
        sources.fetch(f"{url}?again", root=REQUEST)


@pytest.mark.parametrize("state", ["empty", "used"])
def test_a_cache_that_cannot_be_written_to_is_named_with_its_setting(
    state: str, disk: Callable[[str], None], sources: Sources, internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    disk("size=9m")
    internet.serve(URL, lora)
    if state == "used":
        sources.fetch(URL, root=REQUEST)
    disk("size=9m,ro")
    message = (
        rf"^The cache of LoRAs in {tmp_path}/cache cannot be used: Read-only file system\. Set FLUX_ADAPTER_CACHE to"
    )
    with pytest.raises(SettingsError, match=message):
        sources.fetch(URL, root=REQUEST)


def test_another_users_cache_is_refused_by_name(
    sources: Sources, internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    internet.serve(URL, lora)
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(SettingsError, match=rf"^FLUX_ADAPTER_CACHE: others may write to {tmp_path}/cache"):
        sources.fetch(URL, root=REQUEST)
    (tmp_path / "cache").chmod(0o755)
    path = sources.fetch(URL, root=REQUEST)
    assert [folder.stat().st_mode & 0o777 for folder in (path.parent.parent, path.parent)] == [0o700, 0o700]


# Servers' words

DATES = [
    "Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 99999 23:59:59 GMT",
    f"Fri, 31 Dec 2020 23:59:59 +{'9' * 30}", "Mon, 1 Jan 2020 00:00:00", "0", "", " ",
]  # fmt: skip


@pytest.mark.parametrize("date", DATES)
def test_any_date_of_a_server_is_taken_as_no_date(date: str, sources: Sources, internet: Internet, lora: bytes) -> None:
    now = email.utils.formatdate(usegmt=True)
    for dates in ({"date": date, "last_modified": now}, {"date": now, "last_modified": date}, {"last_modified": date}):
        internet.serve(URL, dated(lora, **dates))
        assert sources.fetch(URL, root=None).read_bytes() == lora


def dated(body: bytes, **headers: str) -> Route:
    def route(exchange: Exchange) -> None:
        exchange.wire.send_response_only(200)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            exchange.wire.send_header(name.replace("_", "-"), value)
        exchange.wire.end_headers()
        exchange.wire.wfile.write(body)

    return route


WORDS = [
    ("Mon,", "", "x"), ("0", "1", "31", "99"), ("Jan", "Feb", "xyz"), ("0", "1", "69", "2020", "9999", "10000"),
    ("0:0:0", "23:60:61", "24:0", "-1:0:0", "1.5"), ("GMT", "+0000", "-2359", "+9999", "+99999999999", "\xe9", ""),
]  # fmt: skip
date_texts = st.tuples(*map(st.sampled_from, WORDS)).map(" ".join)


@settings(max_examples=300)
@given(date_texts, date_texts, st.sampled_from(['"1"', "\xe9", "", 'W/"1"']))
def test_no_header_that_describes_a_file_is_a_fault(date: str, modified: str, etag: str) -> None:
    headers = {"date": date, "last-modified": modified, "etag": etag}
    sent = httpx2.Headers([(name.encode(), value.encode("latin-1")) for name, value in headers.items()])
    validator = validator_of(Identity("", ""), sent)
    assert validator.etag.isascii()
    assert validator.modified.isascii()


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e3", "5, 5", "5, 6", "٣", "+5"])
def test_any_length_of_a_server_is_a_plain_refusal(length: str, sources: Sources, internet: Internet) -> None:
    internet.serve(URL, dated(b"", content_length=length.encode().decode("latin-1")))
    with pytest.raises(SourceError, match=r"broke the connection off|larger than the limit|has only"):
        sources.fetch(URL, root=REQUEST)


def test_refusals_hold_no_internal_address(sources: Sources, internet: Internet) -> None:
    internet.names["files.example.com"] = ["10.20.30.40"]
    with pytest.raises(SourceError, match="leads to an address that is not public") as refused:
        sources.fetch(URL, root=REQUEST)
    assert "10.20" not in str(refused.value)
