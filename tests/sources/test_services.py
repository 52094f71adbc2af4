"""Every accepted spelling against a local server that speaks its service's protocol, and who sees which token."""

import base64
import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save

from flux_lora.errors import FormatError, SourceError
from flux_lora.sources import Network, Sources, Tokens
from flux_lora.sources.transport import GuardedTransport
from tests.sources.conftest import TOKENS
from tests.sources.internet import Exchange, Internet, Route, answer, answer_json, file, redirect

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = "ab" * 32


def tar_of(*members: tuple[str, bytes]) -> bytes:
    """A tar as ``tar -cvf`` writes it, with its directories."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        directory = tarfile.TarInfo("output/flux_train_replicate")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def trained(lora: bytes) -> bytes:
    return tar_of(
        ("output/flux_train_replicate/config.yaml", b"job: extension"),
        ("output/flux_train_replicate/lora.safetensors", lora),
        ("output/flux_train_replicate/._lora.safetensors", b"attributes of a Mac"),
        ("output/flux_train_replicate/captions/1.txt", b"a picture of TOK"),
    )


def serve_hub(
    internet: Internet,
    files: dict[str, bytes],
    revision: str = "main",
    commit: str = COMMIT,
    repo: str = "owner/name",
    private: bool = False,
) -> None:
    """The Hub's API and its redirect of large files to a storage host, as huggingface_hub knows them."""
    siblings = []
    for name, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"size": len(data), "sha256": digest, "pointerSize": 134}
        siblings.append({"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
        signed = f"https://cdn-lfs.huggingface.co/{digest}?Signature=do-not-log"
        internet.serve(f"https://huggingface.co/{repo}/resolve/{commit}/{quote(name)}", redirect(signed))
        internet.serve(f"https://cdn-lfs.huggingface.co/{digest}", file(data, f'"{digest}"'))
    info = {
        "_id": "1",
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "private": private,
        "tags": [],
        "siblings": siblings,
    }
    internet.serve(f"https://huggingface.co/api/models/{repo}/revision/{revision}", answer_json(info))


def civitai_version(data: bytes, number: int = 222, **changes: Any) -> dict[str, object]:
    """Facts as https://civitai.com/api/v1/model-versions/222 gives them."""
    files = [
        {
            "id": 5,
            "name": "style.safetensors",
            "type": "Model",
            "sizeKB": len(data) / 1024,
            "metadata": {"format": "SafeTensor", "size": None, "fp": None},
            "hashes": {"AutoV2": "21437EC266", "SHA256": hashlib.sha256(data).hexdigest().upper()},
            "primary": True,
            "downloadUrl": f"https://civitai.com/api/download/models/{number}",
        },
        {"id": 6, "name": "images.zip", "type": "Training Data", "downloadUrl": "https://civitai.com/api/download/x"},
    ]
    version = {"id": number, "modelId": 111, "baseModel": "Flux.1 D", "model": {"type": "LORA"}, "files": files}
    return {**version, **changes}


def serve_civitai(internet: Internet, data: bytes, number: int = 222, **changes: Any) -> None:
    version = civitai_version(data, number, **changes)
    older = civitai_version(b"older", 100)
    model = {"id": 111, "type": "LORA", "modelVersions": [version, older]}
    internet.serve("https://civitai.com/api/v1/models/111", answer_json(model))
    internet.serve(f"https://civitai.com/api/v1/model-versions/{number}", answer_json(version))
    internet.serve(
        f"https://civitai.com/api/download/models/{number}", redirect("https://storage.civitai.com/f?sig=secret")
    )
    internet.serve("https://storage.civitai.com/f", file(data, '"1"'))


def serve_replicate(internet: Internet, lora: bytes) -> None:
    for path in ("owner/name/_weights", f"owner/name/versions/{VERSION}/_weights"):
        internet.serve(f"https://replicate.com/{path}", redirect("https://replicate.delivery/xezq/trained_model.tar"))
    internet.serve("https://replicate.delivery/xezq/trained_model.tar", file(trained(lora), '"t"'))


def serve_all(internet: Internet, lora: bytes) -> None:
    serve_hub(internet, {"README.md": b"# hi", "lora.safetensors": lora})
    serve_hub(internet, {"sub dir/lora.safetensors": lora}, revision="refs%2Fpr%2F1")
    serve_hub(internet, {"lora.safetensors": lora}, revision=COMMIT)
    serve_civitai(internet, lora)
    serve_replicate(internet, lora)
    internet.serve("https://files.example.com/x.safetensors", lora)
    internet.serve("https://files.example.com/x.tar", trained(lora))


ACCEPTED = [
    "https://files.example.com/x.safetensors",
    "HTTPS://files.EXAMPLE.com:443/x.safetensors?X-Amz-Signature=abc&token=def#part",
    "  https://files.example.com/x.safetensors ",
    "https://files.example.com/x.tar",
    "https://files.example.com/x.tar?download=1",
    "owner/name",
    f"owner/name/{VERSION}",
    f"owner/name:{VERSION}",
    "replicate.com/owner/name",
    "https://replicate.com/owner/name/",
    "https://www.replicate.com/owner/name",
    f"https://replicate.com/owner/name/versions/{VERSION}",
    f"https://replicate.com/owner/name/{VERSION}",
    "https://replicate.com/owner/name/_weights",
    "https://replicate.delivery/xezq/trained_model.tar",
    "replicate.delivery/xezq/trained_model.tar",
    "huggingface.co/owner/name",
    "https://huggingface.co/owner/name",
    "https://huggingface.co/owner/name/lora.safetensors",
    "https://huggingface.co/owner/name/resolve/main/lora.safetensors?download=true",
    "https://huggingface.co/owner/name/blob/main/lora.safetensors",
    "https://huggingface.co/owner/name/tree/main",
    "https://hf.co/owner/name",
    "hf://owner/name",
    "hf://owner/name/lora.safetensors",
    f"hf://owner/name@{COMMIT}",
    f"hf://owner/name@{COMMIT}/lora.safetensors",
    "hf://owner/name@refs/pr/1/sub dir/lora.safetensors",
    "hf://owner/name@refs%2Fpr%2F1",
    "https://huggingface.co/owner/name/resolve/refs%2Fpr%2F1/sub%20dir/lora.safetensors",
    "civitai.com/models/111",
    "https://civitai.com/models/111/a-style",
    "https://www.civitai.com/models/111?modelVersionId=222",
    "https://civitai.com/api/download/models/222",
    "https://civitai.com/api/download/models/222?type=Model&format=SafeTensor",
    "https://civitai.red/models/111?modelVersionId=222",
    "civitai.red/models/111",
    "civitai.green/models/111/a-style",
    "https://www.civitai.green/models/111",
    "https://civitai.red/api/download/models/222",
    "urn:air:flux1:lora:civitai:111@222",
    "urn:air:flux1:lora:civitai:111",
    "air:flux1:lora:civitai:111@222+5.safetensor",
]


@pytest.mark.parametrize("source", ACCEPTED)
def test_every_spelling_gives_the_same_file(source: str, sources: Sources, internet: Internet, lora: bytes) -> None:
    serve_all(internet, lora)
    path = sources.fetch(source, root=Path("/nowhere"))
    assert path.read_bytes() == lora
    assert path.name == f"{hashlib.sha256(lora).hexdigest()}.safetensors"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "head", ["data:;base64,", "DATA:application/octet-stream;name=x.safetensors;base64,", "data:,"]
)
def test_data_uri(head: str, packed: bool, sources: Sources, internet: Internet, lora: bytes) -> None:
    data = trained(lora) if packed else lora
    text = base64.b64encode(data).decode() if "base64" in head else "".join(f"%{byte:02x}" for byte in data)
    assert sources.fetch(head + text, root=None).read_bytes() == lora
    assert internet.resolved == []


def test_data_uri_in_base64url(sources: Sources) -> None:
    data = save({"a": np.arange(256, dtype=np.uint8)}, {"b": "c"})
    text = base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert {"-", "_"} < set(text)
    assert len(text) % 4
    assert sources.fetch(f"data:;base64,{text}", root=None).read_bytes() == data


def test_requests_keep_host_names_for_certificate_and_routing(
    sources: Sources, internet: Internet, lora: bytes
) -> None:
    internet.names["files.example.com"] = ["203.0.114.7", "2606:4700::1"]
    internet.serve("https://files.example.com/x.safetensors", lora)
    sources.fetch("https://files.example.com/x.safetensors", root=None)
    assert internet.connected == ["203.0.114.7"]
    assert internet.server_names == ["files.example.com"]
    assert internet.asked[0].host == "files.example.com"


def test_second_address_is_tried_when_the_first_is_down(sources: Sources, internet: Internet, lora: bytes) -> None:
    internet.names["files.example.com"] = ["2606:4700::1", "203.0.114.7"]
    internet.ports["2606:4700::1"] = 1  # nobody listens there
    internet.serve("https://files.example.com/x.safetensors", lora)
    assert sources.fetch("https://files.example.com/x.safetensors", root=None).read_bytes() == lora


def test_tokens_go_to_their_hosts_only(sources: Sources, internet: Internet, lora: bytes, other_lora: bytes) -> None:
    serve_all(internet, lora)
    serve_civitai(internet, other_lora)
    internet.serve("https://files.example.com/to-hub.safetensors", redirect("https://huggingface.co/x.safetensors"))
    internet.serve("https://huggingface.co/x.safetensors", redirect("https://sub.example.com/x.safetensors"))
    internet.serve("https://sub.example.com/x.safetensors", lora)
    for source in (
        "hf://owner/name",
        "civitai.com/models/111",
        "owner/name",
        "https://files.example.com/to-hub.safetensors",
    ):
        sources.fetch(source, root=None)
    hub = [exchange.headers.get("authorization") for exchange in internet.asked if exchange.host == "huggingface.co"]
    assert hub == [f"Bearer {TOKENS['hf_token']}"] * 2 + [None]
    seen = {exchange.host: exchange.headers.get("authorization") for exchange in internet.asked}
    assert seen == {
        "huggingface.co": None,  # the last one came from another host
        "civitai.com": f"Bearer {TOKENS['civitai_token']}",
        "replicate.com": f"Bearer {TOKENS['replicate_api_token']}",
        "cdn-lfs.huggingface.co": None,
        "storage.civitai.com": None,
        "replicate.delivery": None,
        "files.example.com": None,
        "sub.example.com": None,
    }
    assert {exchange.headers["accept-encoding"] for exchange in internet.asked} == {"identity"}


def test_a_tokens_own_host_does_not_get_it_back_from_another_one(sources: Sources, internet: Internet) -> None:
    internet.serve("https://civitai.com/api/download/models/222", redirect("https://files.example.com/x"))
    internet.serve("https://civitai.com/api/v1/model-versions/222", answer_json(civitai_version(b"")))
    internet.serve("https://files.example.com/x", redirect("https://civitai.com/private"))
    with pytest.raises(SourceError, match="no such file"):
        sources.fetch("https://civitai.com/api/download/models/222", root=None)
    assert ["authorization" in asked.headers for asked in internet.asked] == [True, True, False, False]


REQUEST = Path("/nowhere")
"""The root of a request's local paths."""

PRIVATE = ("hf://owner/name", f"hf://owner/name@{COMMIT}", "civitai.com/models/111", "owner/name")


def only_with_token(internet: Internet) -> None:
    """Answer what was served as a private repository does."""
    for path, route in internet.routes.items():
        if path.split("/")[0] in ("huggingface.co", "civitai.com", "replicate.com"):

            def guarded(exchange: Exchange, route: Route = route) -> None:
                route(exchange) if "authorization" in exchange.headers else exchange.reply(401)

            internet.routes[path] = guarded


@pytest.mark.parametrize("source", PRIVATE)
def test_operators_tokens_serve_the_operator_and_not_requests(
    source: str, make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    serve_all(internet, lora)
    only_with_token(internet)
    sources = make_sources()
    assert sources.fetch(source, root=None).read_bytes() == lora
    internet.asked.clear()
    with pytest.raises(SourceError, match=r"without the operator's tokens .FLUX_REQUEST_TOKENS=1 would lend them"):
        sources.fetch(source, root=REQUEST)
    assert not any("authorization" in exchange.headers for exchange in internet.asked)
    lending = make_sources(requests={"request_tokens": True})
    assert lending.fetch(source, root=REQUEST).read_bytes() == lora


def test_what_a_request_may_reach_is_fetched_for_it_once(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    serve_all(internet, lora)
    source = f"hf://owner/name@{COMMIT}"
    for root in (None, REQUEST):
        make_sources().fetch(source, root=root)
        internet.asked.clear()
        make_sources().fetch(source, root=root)
        assert internet.asked == []


@pytest.mark.parametrize("named", ["", "/nothing.safetensors"])
def test_private_repositories_are_listed_to_the_operator_alone(
    named: str, make_sources: Callable[..., Sources], internet: Internet, lora: bytes
) -> None:
    serve_hub(internet, {"secret-a.safetensors": lora, "secret-b.safetensors": lora}, private=True)
    sources = make_sources(requests={"request_tokens": True})
    with pytest.raises(SourceError, match=r"'secret-a.safetensors', 'secret-b.safetensors'"):
        sources.fetch(f"hf://owner/name{named}", root=None)
    with pytest.raises(SourceError, match="owner/name is private; name a file that it has") as refused:
        sources.fetch(f"hf://owner/name{named}", root=REQUEST)
    assert "secret" not in str(refused.value)


def test_a_callers_token_in_a_civitai_address_is_theirs(
    make_sources: Callable[..., Sources], internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    serve_all(internet, lora)
    only_with_token(internet)
    address = "https://civitai.com/api/download/models/222?type=Model&format=SafeTensor"
    path = make_sources(tokens=False).fetch(f"{address}&token=theirs", root=REQUEST)
    assert path.read_bytes() == lora
    seen = {exchange.headers.get("authorization") for exchange in internet.asked if exchange.host == "civitai.com"}
    assert seen == {"Bearer theirs"}
    assert not any("theirs" in found.read_text("latin-1") for found in tmp_path.rglob("*") if found.is_file())
    with pytest.raises(SourceError, match="refuses access"):  # neither without it nor with another one
        make_sources(tokens=False).fetch(address, root=REQUEST)
    with pytest.raises(SourceError, match="the token in the address holds characters that no token has") as refused:
        make_sources().fetch(f"{address}&token=th%20eirs", root=REQUEST)
    assert "eirs" not in str(refused.value)


CHALLENGE = "Cloudflare, in front of civitai.com, lets only browsers in .403.; download the file with one"


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (403, {"cf_ray": "1-FRA", "content_type": "text/html; charset=UTF-8"}, CHALLENGE),
        (403, {"cf_mitigated": "challenge"}, CHALLENGE),
        (403, {"cf_ray": "1-FRA", "content_type": "application/json"}, "the token in CIVITAI_TOKEN may not read it"),
        (404, {"cf_ray": "1-FRA", "content_type": "text/html"}, "civitai.com has no such file .404."),
    ],
)
def test_a_challenge_for_browsers_is_no_question_of_tokens(
    status: int, headers: dict[str, str], reason: str, sources: Sources, internet: Internet, lora: bytes
) -> None:
    for part in ("api/v1/model-versions/222", "api/download/models/222"):
        serve_civitai(internet, lora)
        internet.serve(f"https://civitai.com/{part}", answer(status, b"<html>", **headers))
        with pytest.raises(SourceError, match=reason):
            sources.fetch("civitai.com/models/111?modelVersionId=222", root=None)


def test_other_credentials_and_compression_stay_out(internet: Internet) -> None:
    """Whatever a library on top of the transport, as huggingface_hub, sends and understands."""
    internet.serve("https://huggingface.co/x", answer(404, gzip.compress(bytes(10**6)), content_encoding="gzip"))
    transport = GuardedTransport(internet.network(), Tokens(hf_token=SecretStr("ours")), 10**6)
    with httpx2.Client(transport=transport) as client:
        headers = {"Authorization": "Bearer theirs", "Cookie": "a=b", "Accept-Encoding": "gzip", "X-Other": "kept"}
        response = client.get("https://huggingface.co/x", headers=headers)
    assert len(response.content) < 10_000
    sent = internet.asked[0].headers
    assert sent["authorization"] == "Bearer ours"
    assert sent["accept-encoding"] == "identity"
    assert sent["x-other"] == "kept"
    assert "cookie" not in sent


def test_nothing_secret_is_shown_or_stored(
    sources: Sources,
    internet: Internet,
    lora: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO")
    serve_all(internet, lora)
    for source in (
        "hf://owner/name",
        "civitai.com/models/111",
        "https://files.example.com/x.safetensors?token=do-not-log",
    ):
        sources.fetch(source, root=None)
    with pytest.raises(SourceError) as refused:
        sources.fetch("https://me:do-not-log@files.example.com/y.safetensors?sig=do-not-log", root=None)
    shown = capfd.readouterr()
    stored = "".join(
        path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".json"
    )
    everything = f"{caplog.text}{shown.out}{shown.err}{refused.value}{vars(sources)}{stored}"
    assert "x.safetensors" in shown.err
    for secret in (*TOKENS.values(), "do-not-log", "sig=secret"):
        assert secret not in everything


def test_nothing_in_the_environment_leads_elsewhere(
    make_sources: Callable[..., Sources],
    internet: Internet,
    lora: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine files.example.com login me password do-not-send")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://evil.example.com")
    template = "https://evil.example.com/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    serve_all(internet, lora)
    sources = make_sources(tokens=False)
    for source in ("hf://owner/name", "https://files.example.com/x.safetensors"):
        sources.fetch(source, root=None)
    assert {exchange.host for exchange in internet.asked} == {
        "huggingface.co",
        "cdn-lfs.huggingface.co",
        "files.example.com",
    }
    assert not any("authorization" in exchange.headers for exchange in internet.asked)


def test_nothing_in_the_environment_adds_an_authority(
    make_sources: Callable[..., Sources], internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.authority))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    sources = make_sources(network=replace(internet.network(), tls=Network().tls))
    with pytest.raises(SourceError, match=r"files.example.com has no valid certificate"):
        sources.fetch("https://files.example.com/x.safetensors", root=None)
    assert not (tmp_path / "keys.log").exists()


LFS = {"size": 9, "sha256": "0" * 64, "pointerSize": 134}


def hub_answer(siblings: list[dict[str, object]], sha: object = COMMIT) -> Route:
    return answer_json({"id": "owner/name", "sha": sha, "siblings": siblings})


HUB_REFUSALS = [
    (answer(401, x_error_code="RepoNotFound"), False, "set HF_TOKEN to a token that may read it"),
    (answer(401), True, "refuses access .401.; the token in HF_TOKEN may not read it"),
    (
        answer(403, x_error_code="GatedRepo"),
        True,
        "gated: accept its terms at https://huggingface.co/owner/name; ",
    ),
    (answer(404, x_error_code="RepoNotFound"), True, "no such file .404., or it is private"),
    (answer(404, x_error_code="RevisionNotFound"), True, "owner/name has no revision 'main'"),
    (answer(500), True, "has a problem of its own .500."),
    (answer(200, b"<html>"), True, "does not answer as expected"),
    (hub_answer([]), True, "has no .safetensors file"),
    (redirect("/api/models/owner/name/revision/main"), True, "redirects in circles"),
    (redirect("https://a:b/"), True, "does not answer as expected"),
    (answer(200, b"[" * 100_000), True, "does not answer as expected"),
    (answer(404, b"[" * 100_000, content_type="application/json"), True, "does not answer as expected|no such file"),
    (hub_answer([{"rfilename": 5}]), True, "does not answer as expected"),
    (hub_answer([{"rfilename": "a.safetensors", "size": "9"}]), True, "does not answer as expected"),
    (hub_answer([{"rfilename": "a.safetensors", "size": -1}]), True, "does not answer as expected"),
    (hub_answer([{"rfilename": "a.safetensors", "lfs": 5}]), True, "does not answer as expected"),
    (
        hub_answer([{"rfilename": "a.safetensors", "lfs": LFS | {"sha256": "../x"}}]),
        True,
        "does not answer as expected",
    ),
    (hub_answer([{"rfilename": "a.safetensors"}], sha=5), True, "does not answer as expected"),
    (hub_answer([{"rfilename": f"\n\u202e{'x' * 999}{n}.safetensors"} for n in (1, 2)]), True, r"'.n.u202ex{98}…', '"),
]


@pytest.mark.parametrize(("route", "token", "reason"), HUB_REFUSALS)
def test_hub_refusals(
    route: Route, token: bool, reason: str, make_sources: Callable[..., Sources], internet: Internet
) -> None:
    internet.serve("https://huggingface.co/api/models/owner/name/revision/main", route)
    with pytest.raises(SourceError, match=f"'hf://owner/name' cannot be fetched: .*{reason}"):
        make_sources(tokens=token).fetch("hf://owner/name", root=None)


def test_hub_lists_the_files_to_choose_from(sources: Sources, internet: Internet, lora: bytes) -> None:
    serve_hub(internet, {"b.safetensors": lora, "a.safetensors": lora, "c.bin": b""})
    with pytest.raises(
        SourceError, match=r"several files; add one to hf://owner/name/ : 'a.safetensors', 'b.safetensors'"
    ):
        sources.fetch("hf://owner/name", root=None)
    with pytest.raises(SourceError, match=r"no file 'd.safetensors'; it has 'a.safetensors', 'b.safetensors'"):
        sources.fetch("hf://owner/name/d.safetensors", root=None)


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254"])
def test_guard_holds_inside_huggingface_hub(address: str, sources: Sources, internet: Internet) -> None:
    internet.names["huggingface.co"] = [address]
    with pytest.raises(SourceError, match="huggingface.co leads to an address that is not public"):
        sources.fetch("hf://owner/name", root=None)
    assert internet.connected == []


def test_renamed_repository_is_followed(sources: Sources, internet: Internet, lora: bytes) -> None:
    serve_hub(internet, {"lora.safetensors": lora})
    moved = "https://huggingface.co/api/models/{}/revision/main"
    internet.serve(moved.format("old/name"), redirect("/api/models/owner/name/revision/main?blobs=true", 307))
    internet.serve(moved.format("bad/name"), redirect("https://evil.example.com/api/models/x", 307))
    internet.serve(f"https://huggingface.co/old/name/resolve/{COMMIT}/lora.safetensors", lora)
    assert sources.fetch("hf://old/name", root=None).read_bytes() == lora
    with pytest.raises(SourceError, match=r"evil.example.com is not asked about models of the Hugging Face Hub"):
        sources.fetch("hf://bad/name", root=None)


def test_size_limits_hold_inside_huggingface_hub(
    sources: Sources, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_hub(internet, {"lora.safetensors": bytes(300_000)})
    with pytest.raises(SourceError, match="larger than the limit of 200,000 bytes"):
        sources.fetch("hf://owner/name", root=None)
    assert internet.paths("cdn-lfs.huggingface.co") == []
    monkeypatch.setattr("flux_lora.sources.client.MAX_API_BYTES", 1000)
    internet.serve("https://huggingface.co/api/models/owner/name/revision/main", answer(200, bytes(2000)))
    with pytest.raises(SourceError, match="larger than the limit of 1,000 bytes"):
        sources.fetch("hf://owner/name", root=None)


def test_huggingface_hub_gets_its_own_client_back(sources: Sources, internet: Internet, lora: bytes) -> None:
    from huggingface_hub import get_session

    serve_hub(internet, {"lora.safetensors": lora})
    sources.fetch("hf://owner/name", root=None)
    assert get_session().event_hooks["request"]  # the library's own client has one; ours has none


def test_published_digest_is_checked(sources: Sources, internet: Internet, lora: bytes) -> None:
    serve_hub(internet, {"lora.safetensors": lora})
    internet.serve(f"https://cdn-lfs.huggingface.co/{hashlib.sha256(lora).hexdigest()}", lora[:-4] + b"evil")
    with pytest.raises(SourceError, match="its SHA-256 differs"):
        sources.fetch("hf://owner/name", root=None)


CIVITAI_REFUSALS = [
    ({"baseModel": "SDXL 1.0"}, "on Civitai it is a LoRA for 'SDXL 1.0', not for FLUX.1"),
    ({"baseModel": "Flux.2 D"}, "on Civitai it is a LoRA for 'Flux.2 D', not for FLUX.1"),
    ({"model": {"type": "Checkpoint"}}, "on Civitai it is a 'Checkpoint', not a LoRA"),
    (
        {"files": [{"id": 1, "name": "x.pt", "downloadUrl": "https://civitai.com/x"}]},
        "no such .safetensors file, but: 'x.pt'",
    ),
    (
        {"files": [{"name": "a.safetensors"}, {"name": "b.safetensors"}]},
        "has several files: 'a.safetensors', 'b.safetensors'",
    ),
    ({"files": None}, "does not answer as expected"),
    ({"files": [{"name": 5}]}, "does not answer as expected"),
    (
        {"files": [{"name": "a.safetensors", "downloadUrl": "x", "hashes": {"SHA256": "../x"}}]},
        "does not answer as exp",
    ),
    ({"id": float("inf")}, "does not answer as expected"),
    ({"baseModel": "\n" * 999}, r"is a LoRA for '(.n){100}…', not"),
]


@pytest.mark.parametrize(("changes", "reason"), CIVITAI_REFUSALS)
def test_civitai_refusals(changes: dict[str, Any], reason: str, sources: Sources, internet: Internet) -> None:
    serve_civitai(internet, b"", **changes)
    with pytest.raises(SourceError, match=reason):
        sources.fetch("civitai.com/models/111?modelVersionId=222", root=None)


def test_civitai_file_is_the_asked_one(sources: Sources, internet: Internet, lora: bytes) -> None:
    full, pruned = (
        {"id": number, "name": f"{size}.safetensors", "type": "Model", "metadata": {"size": size},
         "downloadUrl": f"https://civitai.com/api/download/models/222?size={size}", "primary": size == "full"}
        for number, size in ((1, "full"), (2, "pruned"))
    )  # fmt: skip
    version = {**civitai_version(lora), "files": [full, pruned]}
    internet.serve("https://civitai.com/api/v1/model-versions/222", answer_json(version))
    internet.serve("https://civitai.com/api/download/models/222", lora)
    for source, size in [
        ("urn:air:flux1:lora:civitai:111@222", "full"),
        ("urn:air:flux1:lora:civitai:111@222+2", "pruned"),
        ("https://civitai.com/api/download/models/222?size=pruned", "pruned"),
    ]:
        sources.fetch(source, root=None)
        assert internet.paths("civitai.com")[-1].endswith(f"size={size}")


@pytest.mark.parametrize("base_model", ["Flux.1 S", "Flux.1 Krea", "Other", None])
def test_civitai_base_models_that_may_fit(
    base_model: str | None, sources: Sources, internet: Internet, lora: bytes
) -> None:
    serve_civitai(internet, lora, baseModel=base_model)
    assert sources.fetch("civitai.com/models/111", root=None).read_bytes() == lora


def page(internet: Internet, *base_models: str, data: bytes = b"") -> None:
    """A page with one version for each base model, the newest first."""
    versions = [
        civitai_version(data, number, baseModel=base, name=f"v{number}")
        for number, base in zip(range(len(base_models), 0, -1), base_models, strict=True)
    ]
    internet.serve(
        "https://civitai.com/api/v1/models/111", answer_json({"id": 111, "type": "LORA", "modelVersions": versions})
    )
    for version in versions:
        internet.serve(f"https://civitai.com/api/download/models/{version['id']}", data)


@pytest.mark.parametrize(
    ("base_models", "taken"),
    [
        (["SDXL 1.0", "Flux.1 D", "SD 1.5", "Flux.1 D"], "modelVersionId=3: v3 for Flux.1 D"),
        (["Flux.2 D", "Other", "Flux.1 S"], "modelVersionId=1: v1 for Flux.1 S"),
        (["Flux.2 D", "Other", ""], "modelVersionId=2: v2 for Other"),
        (["", "Pony"], "modelVersionId=2: v2"),
        (["Other", "Flux.1 D"], "modelVersionId=2: v2 for Other"),
    ],
)
def test_of_a_civitai_page_for_several_base_models_the_newest_for_flux_1_is_taken(
    base_models: list[str],
    taken: str,
    sources: Sources,
    internet: Internet,
    lora: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page(internet, *base_models, data=lora)
    assert sources.fetch("civitai.red/models/111", root=None).read_bytes() == lora
    number = taken.removeprefix("modelVersionId=")[0]
    assert internet.paths("civitai.com")[-1].endswith(f"/api/download/models/{number}")
    assert f"Civitai: of {len(base_models)} versions, '{taken}' is taken" in capsys.readouterr().err


def test_a_civitai_page_without_a_version_for_flux_1_lists_those_it_has(sources: Sources, internet: Internet) -> None:
    page(internet, "SDXL 1.0", "Flux.2 D")
    with pytest.raises(SourceError) as caught:
        sources.fetch("civitai.com/models/111", root=None)
    assert (
        "on Civitai none of its versions is for FLUX.1, but: 'modelVersionId=2: v2 for SDXL 1.0', 'modelVersionId=1: "
        "v1 for Flux.2 D'; if one is, name it with ?modelVersionId=<id>."
    ) in str(caught.value)


def test_files_that_the_operator_laid_beside_the_fine_tune_are_sources_by_name(
    sources: Sources, lora: bytes, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    (weights / "loras").mkdir(parents=True)
    (weights / "loras" / "ink and water.safetensors").write_bytes(lora)
    for spelled in ("loras/ink and water.safetensors", "./loras/ink and water.safetensors"):
        assert sources.fetch(spelled, root=weights) == weights / "loras" / "ink and water.safetensors"
    with pytest.raises(SourceError, match="'loras/oil.safetensors' cannot be fetched: there is no such file"):
        sources.fetch("loras/oil.safetensors", root=weights)
    with pytest.raises(SourceError, match="it is a directory; name a file in it"):
        sources.fetch("loras", root=weights)


def test_civitai_login_page(make_sources: Callable[..., Sources], internet: Internet, lora: bytes) -> None:
    serve_civitai(internet, lora)
    internet.serve("https://civitai.com/api/download/models/222", redirect("/login?returnUrl=x", 307))
    internet.serve("https://civitai.com/login", answer(200, b"<html>", content_type="text/html; charset=utf-8"))
    with pytest.raises(SourceError, match=r"civitai.com sent a web page in place of the file; .* set CIVITAI_TOKEN"):
        make_sources(tokens=False).fetch("civitai.com/models/111", root=None)


def test_local_files(sources: Sources, internet: Internet, lora: bytes, tmp_path: Path) -> None:
    root = tmp_path / "weights"
    (root / "owner").mkdir(parents=True)
    plain, named, packed = root / "a.safetensors", root / "owner" / "name", root / "b.tar"
    plain.write_bytes(lora)
    named.write_bytes(lora)
    packed.write_bytes(trained(lora))
    (root / "inside.safetensors").symlink_to(plain)
    assert sources.fetch("a.safetensors", root=root) == plain
    assert sources.fetch(str(plain), root=root) == plain
    assert sources.fetch("inside.safetensors", root=root) == plain
    assert sources.fetch("owner/name", root=root) == named  # and not Replicate's
    assert sources.fetch("b.tar", root=root).read_bytes() == lora
    assert sources.fetch("b.tar", root=root).read_bytes() == lora
    assert internet.resolved == []
    assert packed.read_bytes() == trained(lora)


def test_operators_tar_is_never_moved(
    sources: Sources, lora: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if it becomes a LoRA while it is looked at."""
    path = tmp_path / "x.tar"
    path.write_bytes(trained(lora))
    monkeypatch.setattr("flux_lora.sources.archive.is_tar", lambda _: bool(path.write_bytes(lora)))
    with pytest.raises(SourceError, match="damaged or truncated"):
        sources.fetch("x.tar", root=tmp_path)
    assert path.read_bytes() == lora


def test_operators_paths_may_be_anywhere(
    sources: Sources, lora: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "far.safetensors")
    (tmp_path / "far.safetensors").write_bytes(lora)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for source in (str(tmp_path / "link.safetensors"), "../far.safetensors"):
        assert sources.fetch(source, root=None).read_bytes() == lora
    with pytest.raises(SourceError, match=r"'nothing.safetensors' cannot be fetched: there is no such file"):
        sources.fetch("nothing.safetensors", root=None)


def test_what_can_be_said_at_once_is_said_before_anything_is_fetched(
    sources: Sources, internet: Internet, lora: bytes, tmp_path: Path
) -> None:
    (tmp_path / "good.safetensors").write_bytes(lora)
    (tmp_path / "packed.tar").write_bytes(trained(lora))
    (tmp_path / "bad.safetensors").write_bytes(b"<html>" * 9)
    for source in (f"{tmp_path}/good.safetensors", f"{tmp_path}/packed.tar", "hf://owner/name", "data:,x", "a/b"):
        sources.check(source, root=None)
    for source, reason in {
        f"{tmp_path}/missing.safetensors": r"missing.safetensors' cannot be fetched: there is no such file\.",
        f"{tmp_path}/bad.safetensors": "bad.safetensors' cannot be used: it is a text file",
        str(tmp_path): "it is a folder with 2 .safetensors files, so name one of bad.safetensors, good.safetensors",
        "https://files.example.com/x.zip": "must end in .safetensors or .tar",
    }.items():
        with pytest.raises((SourceError, FormatError), match=reason):
            sources.check(source, root=None)
    assert internet.resolved == []


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("example.com/x.safetensors", "there is no such file; if it is an address, begin with https://example.com/"),
        ("//example.com/x.safetensors", "there is no such file; if it is an address, begin with https://example.com/"),
        (
            "Files.Example.com/a/b",
            "none of what is accepted; if it is an address, begin with https://files.example.com",
        ),
        ("loras/x.safetensors", r"there is no such file\.$"),
        ("x.safetensors", r"there is no such file\.$"),
    ],
)
def test_an_address_without_its_beginning_is_told_from_a_path(source: str, hint: str, sources: Sources) -> None:
    with pytest.raises(SourceError, match=hint):
        sources.fetch(source, root=None)
