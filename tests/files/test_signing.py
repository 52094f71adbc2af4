"""Content credentials, judged by c2pa's own reader."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import flux_lora
from flux_lora.errors import OutputError, SettingsError
from flux_lora.files import outputs, provenance, signing, xmp
from flux_lora.files.record import Parameters
from flux_lora.settings import Settings
from tests.files.certificates import CLAIM_SIGNING, DOCUMENT_SIGNING, EMAIL_PROTECTION, SERVER, Identity, issue
from tests.files.pictures import FORMATS, PARAMETERS, PROMPTS

PICTURE = Image.effect_noise((48, 32), 50).convert("RGB")
IDENTITY = issue()


@pytest.fixture(scope="module")
def signer() -> signing.Signer:
    return signing.Signer(IDENTITY.certificate, IDENTITY.key)


def parameters(output_format: str, prompt: str = PARAMETERS.prompt) -> Parameters:
    quality = None if output_format == "png" else 80
    changes = {"prompt": prompt, "output_format": output_format, "output_quality": quality}
    return PARAMETERS.model_copy(update=changes)


def encoded(output_format: str, signer: signing.Signer | None, prompt: str = "a tomato", **options: Any) -> bytes:
    options = {"embed": True} | options
    return outputs.encode(PICTURE, parameters(output_format, prompt), signer=signer, **options)


def verified(content: bytes, identity: Identity = IDENTITY) -> dict[str, Any]:
    """The report of c2pa's reader, which trusts the tests' root alone."""
    settings = {
        "verify": {"remote_manifest_fetch": False},
        "trust": {"trust_anchors": identity.root, "trust_config": CLAIM_SIGNING},
    }
    with c2pa.Reader(None, io.BytesIO(content), context=c2pa.Context.from_dict(settings)) as reader:
        return dict(json.loads(reader.json()))


def manifest(content: bytes) -> dict[str, Any]:
    report = verified(content)
    return dict(report["manifests"][report["active_manifest"]])


def assertions(content: bytes) -> dict[str, Any]:
    return {each["label"]: each["data"] for each in manifest(content)["assertions"]}


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_reader_that_trusts_the_root_trusts_the_picture(signer: signing.Signer, output_format: str) -> None:
    content = encoded(output_format, signer)
    assert verified(content)["validation_state"] == "Trusted"
    (action,) = assertions(content)["c2pa.actions.v2"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", xmp.AI_GENERATED)
    (generator,) = manifest(content)["claim_generator_info"]
    assert (generator["name"], generator["version"]) == ("flux-lora", flux_lora.__version__)
    assert "ingredients" not in manifest(content)
    assert "thumbnail" not in manifest(content)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("output_format", FORMATS)
def test_the_record_is_signed(signer: signing.Signer, tmp_path: Path, output_format: str, prompt: str) -> None:
    (path := tmp_path / "x").write_bytes(encoded(output_format, signer, prompt))
    record = provenance.read(path)
    assert record.prompt == prompt
    assert Parameters.from_json(json.dumps(assertions(path.read_bytes())[signing.ASSERTION])) == record


@pytest.mark.parametrize("prompt", ["plain", "long"])
@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("output_format", FORMATS)
def test_but_for_the_signature_a_file_is_what_it_would_be(
    signer: signing.Signer, output_format: str, embed: bool, prompt: str
) -> None:
    plain = encoded(output_format, None, PROMPTS[prompt], embed=embed)
    first, second = (encoded(output_format, signer, PROMPTS[prompt], embed=embed) for _ in range(2))
    assert first != second
    assert signing.unsigned(first) == signing.unsigned(second) == signing.unsigned(plain) == plain
    assert (signing.is_signed(first), signing.is_signed(plain)) == (True, False)


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_embedding_neither_prompt_nor_lora_is_anywhere(signer: signing.Signer, output_format: str) -> None:
    content = encoded(output_format, signer, "a secret", embed=False)
    for trace in ("secret", "a1a1a1a1", "c3c3c3c3", "style", "FLUX.1", str(PARAMETERS.seed), "2.13.0"):
        for spelled in (trace.encode(), trace.encode("utf-16-be"), trace.encode("utf-16-le")):
            assert spelled not in content
    digest = sha256(parameters(output_format, "a secret").to_json().encode()).hexdigest()
    assert assertions(content)[signing.ASSERTION] == {"sha256": digest}
    assert verified(content)["validation_state"] == "Trusted"


PIXELS = {"webp": b"VP8 ", "jpg": b"\xff\xda", "png": b"IDAT"}
"""What stands before the pixels."""


@pytest.mark.parametrize("place", ["record", "pixels", "manifest"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_tampering_breaks_the_signature(signer: signing.Signer, output_format: str, place: str) -> None:
    content = bytearray(encoded(output_format, signer))
    before = {"record": b'{"record', "pixels": PIXELS[output_format], "manifest": b"c2pa.create"}[place]
    content[content.index(before) + len(before) + 20 * (place == "pixels")] ^= 1
    report = verified(bytes(content))
    assert report["validation_state"] == "Invalid"
    codes = {each["code"] for each in report["validation_status"]}
    assert ("assertion.hashedURI.mismatch" if place == "manifest" else "assertion.dataHash.mismatch") in codes


def test_another_root_is_not_trusted(signer: signing.Signer) -> None:
    report = verified(encoded("png", signer), issue())
    assert [each["code"] for each in report["validation_status"]] == ["signingCredential.untrusted"]


@pytest.mark.parametrize("output_format", FORMATS)
def test_it_costs_little(signer: signing.Signer, output_format: str) -> None:
    assert len(encoded(output_format, signer)) - len(encoded(output_format, None)) < 4_500


# Pictures made of pictures


def photograph(name: str = "JPEG", *, signed: bool = False) -> bytes:
    """A picture of somebody else's, perhaps signed."""
    file = io.BytesIO()
    PICTURE.save(file, name)
    if not signed:
        return file.getvalue()
    chain, key = IDENTITY.certificate.encode(), IDENTITY.key.encode()
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain, key, None))
    written = io.BytesIO()
    captured = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    claim = {"actions": [{"action": "c2pa.created", "digitalSourceType": captured}]}
    definition = {
        "claim_generator_info": [{"name": "a camera", "version": "1"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": claim}],
    }
    context = c2pa.Context.from_dict({"trust": {"trust_config": CLAIM_SIGNING}})
    with c2pa.Builder(definition, context=context) as builder:
        builder.sign(signer, f"image/{name.lower()}", io.BytesIO(file.getvalue()), written)
    return written.getvalue()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_an_edited_picture_carries_the_credentials_of_its_input(
    signer: signing.Signer, output_format: str, name: str
) -> None:
    content = encoded(output_format, signer, source=photograph(name, signed=True))
    report = verified(content)
    assert report["validation_state"] == "Trusted"
    opened, edited = assertions(content)["c2pa.actions.v2"]["actions"]
    assert opened["action"] == "c2pa.opened"
    assert len(opened["parameters"]["ingredients"]) == 1
    assert (edited["action"], edited["digitalSourceType"]) == ("c2pa.edited", signing.AI_EDITED)
    (ingredient,) = manifest(content)["ingredients"]
    assert ingredient["relationship"] == "parentOf"
    original = report["manifests"][ingredient["active_manifest"]]
    assert original["claim_generator_info"][0]["name"] == "a camera"


@pytest.mark.parametrize(
    "source", [photograph(), photograph("GIF"), b"", b"not an image"], ids=["JPEG", "GIF", "empty", "no image"]
)
def test_an_input_without_credentials_is_only_mentioned(signer: signing.Signer, source: bytes) -> None:
    content = encoded("webp", signer, source=source)
    assert verified(content)["validation_state"] == "Trusted"
    (ingredient,) = manifest(content)["ingredients"]
    assert "active_manifest" not in ingredient
    assert [each["action"] for each in assertions(content)["c2pa.actions.v2"]["actions"]] == [
        "c2pa.opened",
        "c2pa.edited",
    ]


def test_an_input_whose_credentials_are_broken_is_told_as_such(signer: signing.Signer) -> None:
    tampered = bytearray(photograph("JPEG", signed=True))
    tampered[-30] ^= 1
    content = encoded("png", signer, source=bytes(tampered))
    assert verified(content)["validation_state"] == "Trusted"
    (ingredient,) = manifest(content)["ingredients"]
    failures = ingredient["validation_results"]["activeManifest"]["failure"]
    assert "assertion.dataHash.mismatch" in {each["code"] for each in failures}


# No address is asked


@pytest.fixture
def address() -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback, and what it was asked."""
    asked: list[bytes] = []

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def lure(output_format: str, address: str) -> bytes:
    """A picture whose metadata says that its manifest is elsewhere."""
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{address}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    file = io.BytesIO()
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", packet)
        PICTURE.save(file, "PNG", pnginfo=chunks)
    else:
        PICTURE.save(file, {"webp": "WEBP", "jpg": "JPEG"}[output_format], xmp=packet.encode())
    return file.getvalue()


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_address_in_a_strangers_picture_is_never_asked(
    signer: signing.Signer, address: tuple[str, list[bytes]], output_format: str
) -> None:
    picture, asked = lure(output_format, address[0]), address[1]
    assert signing.manifest_of(picture) is None
    content = encoded("webp", signer, source=picture)
    assert verified(content)["validation_state"] == "Trusted"
    assert asked == []


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_library_by_itself_would_ask(address: tuple[str, list[bytes]], output_format: str) -> None:
    """Or the test above could not fail."""
    picture, asked = lure(output_format, address[0]), address[1]
    with pytest.raises(c2pa.C2paError):
        c2pa.Reader(None, io.BytesIO(picture))
    assert asked


def test_signing_asks_nobody(signer: signing.Signer, address: tuple[str, list[bytes]]) -> None:
    encoded("webp", signer)
    assert address[1] == []


def test_a_time_stamp_authority_is_asked_when_it_is_named(address: tuple[str, list[bytes]]) -> None:
    with pytest.raises(SettingsError, match=r"with FLUX_C2PA_TIMESTAMP=http://127\.0\.0\.1:.* 404"):
        signing.Signer(IDENTITY.certificate, IDENTITY.key, address[0])
    assert address[1][0].startswith(b"POST /manifest.c2pa ")


# What cannot sign


@pytest.mark.parametrize(
    "identity",
    [
        issue(usage=DOCUMENT_SIGNING),
        issue(usage=EMAIL_PROTECTION),
        issue(ec.generate_private_key(ec.SECP384R1())),
        issue(ec.generate_private_key(ec.SECP521R1())),
        issue(ed25519.Ed25519PrivateKey.generate()),
        issue(rsa.generate_private_key(65537, 2048)),
        issue(key_format=PrivateFormat.TraditionalOpenSSL),
    ],
    ids=["document signing", "e-mail", "P-384", "P-521", "Ed25519", "RSA", "SEC1"],
)
def test_the_usual_certificates_and_keys_sign(tmp_path: Path, identity: Identity, monkeypatch: Any) -> None:
    for name, path in identity.write(tmp_path).items():
        monkeypatch.setenv(name, path)
    signer = signing.Signer.from_settings(Settings.from_environment())
    report = signing.manifest_of(encoded("webp", signer))
    assert report
    assert report["validation_state"] == "Valid"


GOOD = IDENTITY
WEAK = rsa.generate_private_key(65537, 1024)  # noqa: S505 - it is refused
REFUSED = {
    "no certificate": (Identity("hello", GOOD.key, ""), "FLUX_C2PA_CERTIFICATE holds no certificate"),
    "empty": (Identity("", "", ""), "FLUX_C2PA_CERTIFICATE holds no certificate"),
    "no key": (Identity(GOOD.certificate, "hello", ""), "FLUX_C2PA_KEY holds no private key"),
    "a certificate as key": (Identity(GOOD.certificate, GOOD.certificate, ""), "FLUX_C2PA_KEY holds no private key"),
    "another's key": (Identity(GOOD.certificate, issue().key, ""), "FLUX_C2PA_KEY is not the key .* must be a pair"),
    "encrypted": (issue(passphrase=b"tomato"), "FLUX_C2PA_KEY is encrypted"),
    "expired": (issue(days=(-30, -1)), "FLUX_C2PA_CERTIFICATE is valid from .* only"),
    "not yet valid": (issue(days=(1, 30)), "FLUX_C2PA_CERTIFICATE is valid from .* only"),
    "a web server's": (issue(usage=SERVER), "FLUX_C2PA_CERTIFICATE is not made for signing content"),
    "no purpose": (issue(usage=None), "FLUX_C2PA_CERTIFICATE is not made for signing content"),
    "small RSA": (issue(WEAK), "FLUX_C2PA_KEY must be .* at least 2048 bits"),
    "a curve of no standard": (issue(ec.generate_private_key(ec.SECP256K1())), "FLUX_C2PA_KEY must be"),
}


@pytest.mark.parametrize(("identity", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_sign_is_refused_at_set_up(
    tmp_path: Path, identity: Identity, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in identity.write(tmp_path).items():
        monkeypatch.setenv(name, path)
    with pytest.raises(SettingsError, match=message) as refused:
        signing.Signer.from_settings(Settings.from_environment())
    assert "\n" not in str(refused.value)


def test_a_chain_in_the_wrong_order_says_so() -> None:
    leaf, root = (
        part + "-----END CERTIFICATE-----\n" for part in GOOD.certificate.split("-----END CERTIFICATE-----\n")[:2]
    )
    with pytest.raises(SettingsError, match="put the certificate of that key first"):
        signing.Signer(root + leaf, GOOD.key)


@pytest.mark.parametrize("name", ["FLUX_C2PA_CERTIFICATE", "FLUX_C2PA_KEY"])
def test_one_without_the_other_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = GOOD.write(tmp_path)
    monkeypatch.setenv(name, files[name])
    (other,) = files.keys() - {name}
    with pytest.raises(SettingsError, match=f"{other} must be set too"):
        signing.Signer.from_settings(Settings.from_environment())


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in GOOD.write(tmp_path).items():
        monkeypatch.setenv(name, path)
    (tmp_path / "key.pem").unlink()
    with pytest.raises(SettingsError, match=r"FLUX_C2PA_KEY=.*key\.pem cannot be read: No such file"):
        signing.Signer.from_settings(Settings.from_environment())


def test_nobody_who_names_no_certificate_signs() -> None:
    assert signing.Signer.from_settings(Settings.from_environment()) is None


def test_a_picture_that_cannot_be_signed_is_withheld(signer: signing.Signer) -> None:
    with pytest.raises(OutputError, match="could not be signed, and so is withheld"):
        signer.sign(b"not a picture", parameters("webp"))


# Files of strangers


@pytest.mark.parametrize("output_format", FORMATS)
def test_damaged_files_are_taken_as_they_are(signer: signing.Signer, output_format: str) -> None:
    content = encoded(output_format, signer)
    for stop in range(0, len(content), 97):
        signing.unsigned(content[:stop])
        signing.manifest_of(content[:stop])
    for other in (b"", b"RIFF", b"RIFF\xff\xff\xff\xffWEBP", b"\xff\xd8\xff", b"\xff\xd8\xff\xeb\0\0", b"GIF89a"):
        assert signing.unsigned(other) == other
