"""Sources, servers and files that want something else than to be fetched: each is refused, by name, and leaves nothing.

Every row also shows that the refusal ends soon, tells no secret, keeps nothing in the cache, and does not touch the
next fetch.
"""

import base64
import gzip
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flux_lora.errors import FormatError, SourceError
from flux_lora.sources import Sources
from tests.sources.conftest import MAX_BYTES, TOKENS
from tests.sources.internet import (
    PUBLIC_ADDRESS,
    Exchange,
    Internet,
    Route,
    answer,
    broken,
    redirect,
    stalling,
)

URL = "https://files.example.com/x.safetensors"
IMPATIENT = {"connect": 0.3, "read": 0.3, "grace": 0.3}


def check_refused(
    sources: Sources, internet: Internet, cache: Path, source: str, reason: str, root: Path | None = Path("/nowhere")
) -> None:
    start = time.monotonic()
    with pytest.raises((SourceError, FormatError), match=reason) as refused:
        sources.fetch(source, root=root)
    assert time.monotonic() - start < 10
    assert refused.value.__cause__ is None
    assert not any(token in str(refused.value) for token in (*TOKENS.values(), "hunter2"))
    assert len(str(refused.value)) < 700
    assert [path for path in cache.rglob("*") if path.suffix == ".safetensors"] == []
    internet.reset()
    internet.serve("https://good.example.com/x.safetensors", GOOD)
    assert sources.fetch("https://good.example.com/x.safetensors", root=None).read_bytes() == GOOD


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(stop - start) // 4], "data_offsets": [start, stop]}


GOOD = safetensors({"a": tensor(0, 8)}, bytes(8))

SPELLINGS = {
    "plain http": ("http://files.example.com/x.safetensors", "only https:// addresses"),
    "ftp": ("ftp://files.example.com/x.safetensors", "only https:// addresses"),
    "websocket": ("wss://files.example.com/x.safetensors", "only https:// addresses"),
    "javascript": ("javascript://files.example.com/x.safetensors", "only https:// addresses"),
    "file URL": ("file:///etc/x.safetensors", "file: addresses are refused"),
    "file URL without slashes": ("file:/etc/x.safetensors", "file: addresses are refused"),
    "plain http of a known page": ("http://huggingface.co/owner/name", "only https:// addresses"),
    "user and password": ("https://me:hunter2@files.example.com/x.safetensors", "user name or password"),
    "user alone": ("https://hunter2@files.example.com/x.safetensors", "user name or password"),
    "user and password without a scheme": ("me:hunter2@files.example.com/x", "none of what is accepted"),
    "user that looks like a host": ("https://huggingface.co@evil.example.com/x.safetensors", "user name or password"),
    "backslash before the real host": ("https://huggingface.co\\@evil.example.com/x.safetensors", "user name or pass"),
    "other port": ("https://files.example.com:8443/x.safetensors", "port 8443 is refused"),
    "port of another service": ("https://files.example.com:22/x.safetensors", "port 22 is refused"),
    "port out of range": ("https://files.example.com:99999/x.safetensors", "port 99999 is refused"),
    "localhost": ("https://localhost/x.safetensors", "'localhost' is not the name of a public host"),
    "one label": ("https://intranet/x.safetensors", "not the name of a public host"),
    "no host": ("https:///x.safetensors", "not the name of a public host"),
    "loopback": ("https://127.0.0.1/x.safetensors", "not the name of a public host"),
    "loopback, short": ("https://127.1/x.safetensors", "not the name of a public host"),
    "loopback, decimal": ("https://2130706433/x.safetensors", "not the name of a public host"),
    "loopback, hexadecimal": ("https://0x7f000001/x.safetensors", "not the name of a public host"),
    "loopback, hexadecimal with dots": ("https://0x7f.0.0.0x1/x.safetensors", "not the name of a public host"),
    "loopback, octal": ("https://0177.0.0.1/x.safetensors", "the address is malformed"),
    "loopback, octal and short": ("https://0177.1/x.safetensors", "not the name of a public host"),
    "loopback, escaped": ("https://127%2e0%2e0%2e1/x.safetensors", "not the name of a public host"),
    "loopback, full-width digits": ("https://１２７.0.0.1/x.safetensors", "the address is malformed"),
    "loopback, IPv6": ("https://[::1]/x.safetensors", "not the name of a public host"),
    "loopback, IPv4 in IPv6": ("https://[::ffff:127.0.0.1]/x.safetensors", "not the name of a public host"),
    "link-local with zone": ("https://[fe80::1%25eth0]/x.safetensors", "not the name of a public host"),
    "metadata service": ("https://169.254.169.254/latest/x.safetensors", "not the name of a public host"),
    "trailing dot": ("https://huggingface.co./x.safetensors", "not the name of a public host"),
    "letters in circles": ("https://ⓛocalhost.com/x.safetensors", "the address is malformed"),
    "escaped NUL in the host": ("https://files.example.com%00.evil.com/x.safetensors", "not the name of a public host"),
    "space in the host": ("https://files example.com/x.safetensors", "not the name of a public host"),
    "header injection": ("https://files.example.com/\r\nX: y/x.safetensors", "cannot be printed"),
    "NUL": ("x\0.safetensors", "cannot be printed"),
    "lone surrogate": ("x\ud800.safetensors", "cannot be printed"),
    "text direction override": ("https://files.example.com/\u202esrotcnet.safetensors", "cannot be printed"),
    "nothing": ("  ", "it is empty"),
    "endless": (f"https://files.example.com/{'x' * 9000}.safetensors", "longer than 8192 characters"),
    "words": ("a nice style please", "none of what is accepted"),
    "host without a scheme": ("files.example.com/x", "none of what is accepted"),
    "pickle": ("https://files.example.com/x.pt?download=1", "pickled files .* are refused"),
    "checkpoint": ("https://files.example.com/x.CKPT", "pickled files .* are refused"),
    "local pickle": ("x.bin", "pickled files .* are refused"),
    "unknown suffix": ("https://files.example.com/x.zip", "must end in .safetensors or .tar"),
    "suffix in the query": ("https://files.example.com/x?y=.safetensors", "must end in .safetensors or .tar"),
    "suffix in the fragment": ("https://files.example.com/x#.safetensors", "must end in .safetensors or .tar"),
    "compressed tar": ("https://files.example.com/x.tar.gz", "must end in .safetensors or .tar"),
    "data set of the Hub": ("hf://datasets/owner/name", "it must be hf://owner/name"),
    "Hub without a name": ("huggingface.co/owner", "it must be hf://owner/name"),
    "Hub with dots": ("hf://../name", "it must be hf://owner/name"),
    "Hub file with dots": ("hf://owner/name/../../x.safetensors", "must be a .safetensors file"),
    "Hub file with escaped dots": ("hf://owner/name/%2e%2e/x.safetensors", "must be a .safetensors file"),
    "Hub pickle": ("hf://owner/name/x.bin", "pickled files .* are refused"),
    "Hub revision with a query": ("hf://owner/name@main?x=1", "it must be hf://owner/name"),
    "page of Civitai": ("civitai.com/images/1", "of Civitai, it must be"),
    "letters for a version": ("civitai.com/models/1?modelVersionId=1%26x", "of Civitai, it must be"),
    "AIR of another family": ("urn:air:sdxl:lora:civitai:1@2", "it names a lora for sdxl"),
    "AIR of a checkpoint": ("urn:air:flux1:checkpoint:civitai:1@2", "it names a checkpoint for flux1"),
    "AIR of another place": ("urn:air:flux1:lora:huggingface:owner/name", "it must be urn:air:flux1:lora:civitai"),
    "page of Replicate": ("replicate.com/owner", "of Replicate, it must be"),
    "Replicate with dots": ("https://replicate.com/owner/name/%2e%2e/%2e%2e/v1", "of Replicate, it must be"),
    "data without a comma": ("data:;base64", "no comma"),
    "data with broken base64": ("data:;base64,AAAAA", "its base64 is damaged"),
    "data with other letters in base64": ("data:;base64,AA==\\", "its base64 is damaged"),
    "data too large": (f"data:;base64,{base64.b64encode(bytes(MAX_BYTES + 1)).decode()}", "larger than the limit"),
    "data with a pickle": (f"data:;base64,{base64.b64encode(pickle.dumps([1])).decode()}", "."),
}


@pytest.mark.parametrize(("source", "reason"), SPELLINGS.values(), ids=SPELLINGS)
def test_spelling(source: str, reason: str, sources: Sources, internet: Internet, tmp_path: Path) -> None:
    with pytest.raises((SourceError, FormatError), match=reason):
        sources.fetch(source, root=Path("/nowhere"))
    assert internet.resolved == internet.connected == []
    check_refused(sources, internet, tmp_path, source, reason)


ADDRESSES = {
    "this network": "0.0.0.0",
    "private 10": "10.1.2.3",
    "private 172": "172.31.255.255",
    "private 192": "192.168.1.1",
    "carrier-grade NAT": "100.64.0.1",
    "metadata of Alibaba": "100.100.100.200",
    "loopback": "127.8.8.8",
    "link-local": "169.254.1.1",
    "metadata": "169.254.169.254",
    "metadata of Oracle": "192.0.0.192",
    "metadata of Azure": "168.63.129.16",
    "documentation": "203.0.113.1",
    "6to4 relay": "192.88.99.1",
    "benchmarks": "198.19.0.1",
    "multicast": "224.0.0.251",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "unspecified": "::",
    "loopback 6": "::1",
    "private 6": "fc00::1",
    "metadata 6": "fd00:ec2::254",
    "link-local 6": "fe80::1%eth0",
    "site-local 6": "fec0::1",
    "multicast 6": "ff02::1",
    "mapped private": "::ffff:10.0.0.1",
    "mapped public": "::ffff:8.8.8.8",
    "compatible": "::127.0.0.1",
    "NAT64": "64:ff9b::a00:1",
    "local NAT64": "64:ff9b:1::a00:1",
    "6to4": "2002:a00:1::1",
    "Teredo": "2001:0:a00:1::1",
    "documentation 6": "2001:db8::1",
    "segment routing": "5f00::1",
}


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
@pytest.mark.parametrize("way", ["first", "beside a public one", "after a redirect"])
def test_address(way: str, address: str, sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.names["inside.example.com"] = [PUBLIC_ADDRESS, address] if way == "beside a public one" else [address]
    internet.serve("https://files.example.com/x.tar", redirect("https://inside.example.com/x.tar"))
    host = "files" if way == "after a redirect" else "inside"
    refusal = "inside.example.com leads to an address that is not public"
    with pytest.raises(SourceError, match=refusal):
        sources.fetch(f"https://{host}.example.com/x.tar", root=None)
    assert set(internet.connected) <= ({PUBLIC_ADDRESS} if way == "after a redirect" else set())
    internet.names["inside.example.com"] = [address]
    check_refused(sources, internet, tmp_path, "https://inside.example.com/x.tar", refusal)


def test_rebinding_name(sources: Sources, internet: Internet, lora: bytes) -> None:
    """A name that answers with a public address first and with a private one after: the checked one is connected to."""
    answers = [["203.0.114.7"], ["127.0.0.1"]]
    internet.resolve = lambda _host: answers.pop(0)
    internet.serve(URL, lora)
    sources.fetch(URL, root=None)
    assert internet.connected == ["203.0.114.7"]
    with pytest.raises(SourceError, match=r"leads to an address that is not public"):
        sources.fetch(URL, root=None)


def test_redirects_are_counted(sources: Sources, internet: Internet) -> None:
    internet.serve(URL, redirect("/x.safetensors?again"))
    with pytest.raises(SourceError, match="redirects more than 10 times"):
        sources.fetch(URL, root=None)
    assert len(internet.asked) == 11


def test_unknown_host(sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.names["files.example.com"] = []
    check_refused(sources, internet, tmp_path, URL, r"the host files.example.com cannot be found")


def slow_headers(exchange: Exchange) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200:
        exchange.wire.wfile.write(bytes([byte]))
        time.sleep(0.05)


def chunked(body: bytes) -> Route:
    def route(exchange: Exchange) -> None:
        exchange.head(200, transfer_encoding="chunked")
        for start in range(0, len(body), 50_000):
            piece = body[start : start + 50_000]
            exchange.wire.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    return route


def raw(answer: bytes) -> Route:
    """Sends bytes, whatever they are."""

    def route(exchange: Exchange) -> None:
        exchange.wire.wfile.write(answer)

    return route


def endless(piece: bytes, **headers: str) -> Route:
    """Says the same again and again, after a header if there is one to send."""

    def route(exchange: Exchange) -> None:
        if headers:
            exchange.head(200, **headers)
        while True:
            exchange.wire.wfile.write(piece)

    return route


SERVERS: dict[str, tuple[Route, str]] = {
    "redirect to http": (redirect("http://files.example.com/x.safetensors"), "only https:// addresses"),
    "redirect to a file": (redirect("file:///etc/passwd"), "only https:// addresses"),
    "redirect to loopback": (redirect("https://127.0.0.1/x.safetensors"), "'127.0.0.1' is not the name of a public"),
    "redirect to decimal loopback": (redirect("//2130706433/x"), "not the name of a public host"),
    "redirect to another port": (redirect("https://files.example.com:9200/"), "port 9200 is refused"),
    "redirect with a password": (redirect("https://me:hunter2@files.example.com/"), "user name or password"),
    "redirect to nowhere": (redirect("https://0.0.0.999/hunter2"), "redirects to a malformed address"),
    "redirect to itself": (redirect("/x.safetensors"), "redirects more than 10 times"),
    "redirect to an empty address": (redirect(""), "files.example.com redirects without saying where to"),
    "redirect to a long scheme": (redirect(f"{'x' * 5000}://a.example.com/"), "this is x{20}://"),
    "redirect to a malformed name": (redirect("https://xn--0.example.com/x"), "xn--0.example.com has no such file"),
    "permission missing": (answer(401), "refuses access .401.; a signed address may have expired"),
    "permission refused": (answer(403), "refuses access .403.; a signed address may have expired"),
    "not there": (answer(404), "has no such file .404."),
    "gone": (answer(410), "has no such file .410."),
    "too many requests": (answer(429, retry_after="30"), "try again in 30 seconds"),
    "too many requests, vaguely": (answer(429, retry_after="<script>"), "try again later"),
    "too many requests, for ages": (answer(429, retry_after="9" * 3000), "try again later"),
    "status of no class": (answer(999), "unexpected answer 999"),
    "own problem": (answer(503), "has a problem of its own .503."),
    "not modified unasked": (answer(304), "unexpected answer 304"),
    "a part unasked": (answer(206, GOOD[8:], content_range="bytes 8-24/25"), "another part or another state"),
    "nothing": (answer(204), "unexpected answer 204"),
    "empty file": (answer(200), "it has only 0 bytes"),
    "web page": (answer(200, b"<html>", content_type="Text/HTML; charset=utf-8"), "sent a web page"),
    "web page in disguise": (answer(200, b"<!DOCTYPE html><html>"), "it is a text file"),
    "compressed answer": (answer(200, gzip.compress(bytes(10**6)), content_encoding="gzip"), "compressed its answer"),
    "compressed twice": (answer(200, GOOD, content_encoding="gzip, br"), "compressed its answer"),
    "compressed refusal": (answer(404, gzip.compress(bytes(10**6)), content_encoding="gzip"), "no such file"),
    "announced too large": (answer(200, b"", content_length=str(10**12)), "larger than the limit of 200,000 bytes"),
    "one byte too large": (answer(200, bytes(MAX_BYTES + 1)), "larger than the limit of 200,000 bytes"),
    "too large unannounced": (chunked(bytes(10 * MAX_BYTES)), "larger than the limit of 200,000 bytes"),
    "early hints for ever": (endless(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100), "sends far more than the limit of"),
    "chunks with long extensions": (
        endless(b"1;" + b"x" * 15_000 + b"\r\nx\r\n", transfer_encoding="chunked"),
        "sends far more than the limit of 200,000 bytes",
    ),
    "broken off for ever": (broken(GOOD, 10), "files.example.com broke the connection off"),
    "chunks without end": (chunked(GOOD), "broke the connection off"),
    "not HTTP": (raw(b"SSH-2.0-x\r\n\r\n"), "broke the connection off"),
    "header without end": (raw(b"HTTP/1.1 200 OK\r\n" + b"x" * 10**6), "broke"),
}  # fmt: skip

SLOW_SERVERS: dict[str, Route] = {
    "silence": lambda _: time.sleep(1),
    "silence in the middle": stalling(bytes(1000), 500, 0.6),
    "drops": stalling(bytes(1000), 500),
    "header in drops": slow_headers,
}


@pytest.mark.parametrize(("route", "reason"), SERVERS.values(), ids=SERVERS)
def test_server(route: Route, reason: str, sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.serve(URL, route)
    check_refused(sources, internet, tmp_path, URL, reason)
    assert not any(path.stat().st_size > 100 for path in (tmp_path / "cache" / "partial").iterdir())


@pytest.mark.parametrize("route", SLOW_SERVERS.values(), ids=SLOW_SERVERS)
def test_slow_server(route: Route, make_sources: Callable[..., Sources], internet: Internet, tmp_path: Path) -> None:
    internet.serve(URL, route)
    check_refused(make_sources(**IMPATIENT), internet, tmp_path, URL, "does not answer, or too slowly")


def test_server_that_accepts_and_says_nothing(
    make_sources: Callable[..., Sources], internet: Internet, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        internet.ports[PUBLIC_ADDRESS] = mute.getsockname()[1]
        check_refused(make_sources(**IMPATIENT), internet, tmp_path, URL, "does not answer, or too slowly")


def test_server_that_is_down(sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.ports[PUBLIC_ADDRESS] = 1
    check_refused(sources, internet, tmp_path, URL, r"files.example.com cannot be reached")


@pytest.mark.parametrize("host", ["another.org", "a.b.example.com"])
def test_certificate_of_another_host(host: str, sources: Sources, internet: Internet, tmp_path: Path) -> None:
    internet.serve(f"https://{host}/x.safetensors", GOOD)
    check_refused(sources, internet, tmp_path, f"https://{host}/x.safetensors", f"{host} has no valid certificate")


def test_certificate_of_an_unknown_authority(sources: Sources, internet: Internet, tmp_path: Path) -> None:
    with Internet(tmp_path / "other.pem").running() as impostor:
        internet.ports[PUBLIC_ADDRESS] = impostor.port
        check_refused(sources, internet, tmp_path / "cache", URL, "no valid certificate")


def member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def negative_size() -> bytes:
    """A header whose size is a negative base-256 number: walking back and forth for ever (CVE-2025-8194)."""
    header = bytearray(tar(member("a.safetensors", GOOD))[:512])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(10_240)


def extended_header(size: int, data: bytes = b"", kind: bytes = tarfile.XHDTYPE) -> bytes:
    info, _ = member("PaxHeader", type=kind, size=size)
    return info.tobuf() + data + bytes(-len(data) % 512)


def comment(size: int, key: str = "comment", kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header that takes four times its size in memory, for one letter outside the BMP."""
    record = f"{size} {key}=😀".encode()
    return extended_header(size, record + b"x" * (size - len(record) - 1) + b"\n", kind)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    return buffer.getvalue()


LORA = member("output/lora.safetensors", GOOD)
LEAVES = "a member that would leave its directory"
ODD = "neither a plain file nor a directory"
FILES: dict[str, tuple[bytes, str]] = {
    "tar: absolute name": (tar(member("/etc/x.safetensors", GOOD)), LEAVES),
    "tar: name with dots": (tar(member("../x.safetensors", GOOD)), LEAVES),
    "tar: name with dots inside": (tar(LORA, member("output/../../cron", b"x")), LEAVES),
    "tar: name with dots and backslashes": (tar(LORA, member("output\\..\\..\\cron", b"x")), LEAVES),
    "tar: symbolic link": (tar(member("x.safetensors", type=tarfile.SYMTYPE, linkname="/etc/passwd")), ODD),
    "tar: hard link": (tar(LORA, member("y", type=tarfile.LNKTYPE, linkname="output/lora.safetensors")), ODD),
    "tar: link beside a file": (tar(LORA, member("y", type=tarfile.SYMTYPE, linkname="/")), ODD),
    "tar: pipe": (tar(member("x.safetensors", type=tarfile.FIFOTYPE)), ODD),
    "tar: character device": (tar(member("x.safetensors", type=tarfile.CHRTYPE, devmajor=1, devminor=5)), ODD),
    "tar: block device": (tar(LORA, member("sda", type=tarfile.BLKTYPE)), ODD),
    "tar: sparse": (tar(member("x.safetensors", type=tarfile.GNUTYPE_SPARSE)), ODD),
    "tar: two files": (tar(LORA, member("b.safetensors", GOOD)), "holds 2 .safetensors files"),
    "tar: no file": (tar(member("lora.pt", b"x")), "holds no .safetensors file"),
    "tar: directory with the name": (tar(member("x.safetensors", type=tarfile.DIRTYPE)), "holds no .safetensors file"),
    "tar: truncated": (tar(LORA)[: 512 + 20], "damaged or truncated"),
    "tar: size of 8 EB": (member("x.safetensors", size=2**62)[0].tobuf(tarfile.GNU_FORMAT) + GOOD, "damaged or trunc"),
    "tar: negative size": (negative_size(), "damaged or truncated|more than 10,000 members|no .safetensors"),
    "tar: extended header of 4 GB": (extended_header(2**32) + tar(LORA), "damaged or truncated"),
    "tar: extended headers for ever": (extended_header(10, b"10 path=a\n") * 150, "damaged or truncated|no .safet"),
    "tar: comment of 100 kB": (comment(100_000) + tar(LORA), "damaged or truncated"),
    "tar: comment of 20 kB": (comment(20_000) + tar(LORA), "damaged or truncated"),
    "tar: comment of digits": (
        extended_header(12_000, b"12000 comment=".ljust(11_999, b"1") + b"\n") + tar(LORA),
        "damag",
    ),
    "tar: comments of 100 kB together": (comment(40_000) + comment(60_000) + tar(LORA), "damaged or truncated"),
    "tar: no LoRA inside": (tar(member("x.safetensors", zipped())), "it is a zip or PyTorch pickle"),
    "tar in gzip": (gzip.compress(tar(LORA)), "compressed with gzip; only a plain .tar is accepted"),
    "pickle": (pickle.dumps({"a": [1] * 100}), "it is a Python pickle"),
    "PyTorch file": (zipped(), "it is a zip or PyTorch pickle"),
    "GGUF": (b"GGUF" + bytes(100), "it is a GGUF file"),
    "JSON error": (b'{"error": "quota"}' + b" " * 20, "it is a text file"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
        "it is a git-lfs pointer in place of the file: .*git lfs pull",
    ),
    "few bytes": (b"abc", "it has only 3 bytes"),
    "length of the header beyond the file": (safetensors({}, length=5000), "it is truncated"),
    "length of the header beyond reason": (safetensors({}, length=2**63), "not a safetensors file"),
    "header nested too deep": (safetensors(b"[" * 100_000), "not a safetensors file"),
    "header that is a list": (safetensors([1]), "not a JSON object"),
    "tensors that overlap": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "overlaps"),
    "tensors with a hole": (safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)), "leaves a hole"),
    "tensors beyond the end": (safetensors({"a": tensor(0, 80)}, bytes(8)), "it is truncated"),
    "bytes after the end": (safetensors({"a": tensor(0, 8)}, bytes(8) + pickle.dumps([1])), "follow its last tensor"),
    "unknown type": (safetensors({"a": tensor(0, 8, "OBJECT")}, bytes(8)), "unknown type"),
    "shape of another size": (safetensors({"a": {**tensor(0, 8), "shape": [2**40]}}, bytes(8)), "which is not F32"),
    "negative offset": (safetensors({"a": {**tensor(0, 8), "data_offsets": [-8, 0]}}, bytes(8)), "whole number from 0"),
    "tensor named twice": (safetensors(b'{"a":1,"a":2}'), "names a tensor twice"),
}


@pytest.mark.parametrize(("data", "reason"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("way", ["download", "data", "local"])
def test_file(way: str, data: bytes, reason: str, sources: Sources, internet: Internet, tmp_path: Path) -> None:
    source = {
        "download": internet.serve("https://files.example.com/x.tar", data),
        "data": f"data:;base64,{base64.b64encode(data).decode()}",
        "local": "x.tar",
    }[way]
    (tmp_path / "x.tar").write_bytes(data)
    check_refused(sources, internet, tmp_path, source, reason, root=tmp_path)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


def test_many_members(make_sources: Callable[..., Sources], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(member("a")[0].tobuf() * 10_001)
    with pytest.raises(SourceError, match=r"more than 10,000 members"):
        make_sources().fetch("x.tar", root=tmp_path)


def test_length_of_an_extended_header_is_not_believed(sources: Sources, tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(extended_header(100_000_000))
        file.truncate(100_001_024)
    tracemalloc.start()
    with pytest.raises(SourceError, match="damaged or truncated"):
        sources.fetch("x.tar", root=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_of_a_tar_are_not_kept(kind: bytes, sources: Sources, tmp_path: Path) -> None:
    headers = (comment(12_000, f"comment{number}", kind) + member("a")[0].tobuf() for number in range(1000))
    (tmp_path / "x.tar").write_bytes(b"".join(headers) + tar(LORA))
    tracemalloc.start()
    assert sources.fetch("x.tar", root=tmp_path).read_bytes() == GOOD
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A weights directory with traps in it, and secrets beside it."""
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    (tmp_path / "weights-secret").mkdir()
    (tmp_path / "weights-secret" / "x.safetensors").write_bytes(GOOD)
    root = tmp_path / "weights"
    (root / "sub.safetensors").mkdir(parents=True)
    (root / "dev" / "vae").mkdir(parents=True)
    (root / "file.safetensors").write_bytes(b"<html>" * 3)
    (root / "out.safetensors").symlink_to("../outside.safetensors")
    (root / "etc").symlink_to("/etc")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    (root / "zero.safetensors").symlink_to("/dev/zero")
    (root / "dangling.safetensors").symlink_to("nothing")
    os.mkfifo(root / "pipe.safetensors")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "s"))
    return root


PATHS = {
    "above": ("../outside.safetensors", "a path with '..' is refused"),
    "above and below": ("sub/../../outside.safetensors", "a path with '..' is refused"),
    "absolute": ("/etc/passwd", "it is not under the weights directory"),
    "absolute with dots": ("{root}/../outside.safetensors", "a path with '..' is refused"),
    "absolute with dots, missing": ("{root}/../nothing.safetensors", "a path with '..' is refused"),
    "absolute beside": ("{root}-secret/x.safetensors", "it is not under the weights directory"),
    "link to outside": ("out.safetensors", "leads out of the weights directory through a link"),
    "directory link to outside": ("etc/passwd", "leads out of the weights directory through a link"),
    "directory link to nothing outside": ("etc/nothing", "leads out of the weights directory through a link"),
    "link to a device": ("zero.safetensors", "leads out of the weights directory through a link"),
    "link to itself": ("loop.safetensors", "the path cannot be followed"),
    "link to nothing": ("dangling.safetensors", "there is no such file"),
    "device": ("/dev/zero", "it is not under the weights directory"),
    "pipe": ("pipe.safetensors", "it is not a regular file"),
    "socket": ("s", "it is not a regular file"),
    "directory": ("sub.safetensors", "it is a directory"),
    "directory like an id of Replicate": ("dev/vae", "it is a directory"),
    "the directory itself": (".", "it is a directory"),
    "home": ("~/x.safetensors", "there is no such file"),
    "missing": ("missing.safetensors", "there is no such file"),
    "file as a directory": ("file.safetensors/x.safetensors", "there is no such file"),
    "backslashes": ("..\\outside.safetensors", "there is no such file"),
    "name too long": (f"{'x' * 300}.safetensors", "the path cannot be followed"),
    "not safetensors": ("file.safetensors", "it is a text file"),
}


@pytest.mark.parametrize(("source", "reason"), PATHS.values(), ids=PATHS)
def test_path(source: str, reason: str, sources: Sources, internet: Internet, root: Path, tmp_path: Path) -> None:
    source = source.format(root=root)
    check_refused(sources, internet, tmp_path / "cache", source, reason, root=root)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("/dev/zero", "not a regular file"), ("pipe.safetensors", "not a regular file"), ("dev/vae", "a folder without")],
)
def test_operators_devices_and_directories(
    source: str, reason: str, sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(SourceError, match=f"it is {reason}"):
        sources.fetch(source, root=None)
