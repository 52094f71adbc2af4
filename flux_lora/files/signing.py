"""Content credentials: a manifest in each image that says who made it how, signed with the operator's certificate.

C2PA Technical Specification 2.2. What is signed covers the whole file, our record in its XMP included; whoever changes
a byte of it breaks the signature. The library is ``c2pa-python``, an extra. It would fetch addresses that the metadata
of a stranger's image names, so it is never asked without `_OFFLINE`.
"""

import io
import json
from base64 import b64decode
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image, UnidentifiedImageError

import flux_lora
from flux_lora.errors import OutputError, SettingsError
from flux_lora.files.record import Parameters
from flux_lora.files.xmp import AI_EDITED, AI_GENERATED
from flux_lora.settings import Settings

if TYPE_CHECKING:
    import c2pa
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MEDIA_TYPES = {"webp": "image/webp", "jpg": "image/jpeg", "png": "image/png"}

ASSERTION = "flux-lora.parameters"
"""Label of our record in a manifest, or of its digest alone."""

INPUT = "input"
"""How a manifest's actions refer to the image that was edited."""

_SIGNING = (
    "1.3.6.1.4.1.62558.2.1",  # C2PA claim signing
    "1.3.6.1.5.5.7.3.36",  # document signing
    "1.3.6.1.5.5.7.3.4",  # e-mail protection
    "1.3.6.1.4.1.311.76.59.1.9",  # Microsoft's C2PA signing
)
"""Extended key usages that make a certificate one for content credentials; by default the library takes the third."""

_VOUCHING = ("1.3.6.1.5.5.7.3.8", "1.3.6.1.5.5.7.3.9")
"""Those of time-stamp authorities and of OCSP responders."""

SMALLEST_RSA_KEY = 2048

_TRIAL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel."""

_OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": []},
    "builder": {"thumbnail": {"enabled": False}},
    "trust": {"trust_config": "\n".join(_SIGNING + _VOUCHING)},
}


class Signer:
    """Signs images with one certificate; safe for one thread at a time."""

    def __init__(self, certificate: str, key: str, timestamp: str | None = None) -> None:
        """Take a certificate chain and its key, both as PEM, and try them.

        Args:
            certificate: the signing certificate first, then those that vouch for it.
            key: of the signing certificate, not encrypted.
            timestamp: address of a time-stamp authority that is asked for each signature.

        Raises:
            SettingsError: they cannot sign.
        """
        c2pa = _library()
        try:
            information = c2pa.C2paSignerInfo(*_checked(certificate, key), timestamp)
            self._signer = c2pa.Signer.from_info(information)
            self._sign(_TRIAL, "image/png", _manifest(edited=False, declared=False))
        except c2pa.C2paError as error:
            asked = f" with FLUX_C2PA_TIMESTAMP={timestamp}" if timestamp else ""
            raise SettingsError(f"FLUX_C2PA_CERTIFICATE cannot sign{asked}: {_reason(error)}.") from None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self | None:
        """Take the operator's certificate; None where none is set.

        Raises:
            SettingsError: it cannot sign; one sentence says why.
        """
        certificate, key = settings.c2pa_certificate, settings.c2pa_key
        if certificate and key:
            texts = _text("FLUX_C2PA_CERTIFICATE", certificate), _text("FLUX_C2PA_KEY", key)
            return cls(*texts, settings.c2pa_timestamp)
        if certificate or key or settings.c2pa_timestamp:
            named = {"FLUX_C2PA_CERTIFICATE": certificate, "FLUX_C2PA_KEY": key}
            missing = " and ".join(name for name, path in named.items() if not path)
            raise SettingsError(f"{missing} must be set too: no picture can be signed without.")
        return None

    def sign(self, content: bytes, parameters: Parameters, *, embed: bool = True, source: bytes | None = None) -> bytes:
        """Add a signed manifest to an image.

        Args:
            content: of the file, without a manifest.
            parameters: name the file's format, and go into the manifest.
            embed: False writes only the digest of the parameters.
            source: the image that this one was made of, as the caller gave it: then the new one counts as edited, and
                the manifest of the source, if it has one, goes into the new one. None: it was made of noise.

        Returns:
            The file with its manifest, whose signature differs from call to call; all else stays (`unsigned`).

        Raises:
            OutputError: it cannot be signed.
        """
        source_type = _media_type(source) if source and manifest_of(source) else None
        manifest = _manifest(edited=source is not None, declared=source_type is None)
        record = parameters.to_json()
        data = json.loads(record) if embed else {"sha256": sha256(record.encode()).hexdigest()}
        manifest["assertions"].append({"label": ASSERTION, "data": data})
        ingredient = (source_type, source) if source_type and source else None
        try:
            return self._sign(content, MEDIA_TYPES[parameters.output_format], manifest, ingredient)
        except _library().C2paError as error:
            raise OutputError(f"The picture could not be signed, and so is withheld: {_reason(error)}.") from None

    def _sign(
        self, content: bytes, media_type: str, manifest: dict[str, Any], ingredient: tuple[str, bytes] | None = None
    ) -> bytes:
        builder = _library().Builder(manifest, context=_context())
        if ingredient:
            ingredient_type, source = ingredient
            builder.add_ingredient({"relationship": "parentOf", "label": INPUT}, ingredient_type, io.BytesIO(source))
        signed = io.BytesIO()
        builder.sign(self._signer, media_type, io.BytesIO(content), signed)
        return signed.getvalue()


def manifest_of(content: bytes) -> dict[str, Any] | None:
    """Read the manifests in a file, and what their validation says; no address is asked, whatever the file names.

    Returns:
        The report of c2pa's reader (``manifests``, ``active_manifest``, ``validation_state`` …); None where the file
        holds no manifest that could be read.

    Raises:
        SettingsError: c2pa-python is not installed.
    """
    c2pa = _library()
    try:
        with c2pa.Reader(None, io.BytesIO(content), context=_context()) as reader:
            report: dict[str, Any] = json.loads(reader.json())
    except c2pa.C2paError:
        return None
    return report


def is_signed(content: bytes) -> bool:
    """Say whether a WebP, JPEG or PNG file holds content credentials, without judging them."""
    return next(_manifests(content), None) is not None


def unsigned(content: bytes) -> bytes:
    """Take the content credentials out of a WebP, JPEG or PNG file: what is left is the file before it was signed."""
    kept, at, removed = b"", 0, 0
    for start, stop in _manifests(content):
        kept, at, removed = kept + content[at:start], stop, removed + stop - start
    kept += content[at:]
    if removed and kept.startswith(b"RIFF"):
        kept = b"RIFF" + (int.from_bytes(kept[4:8], "little") - removed).to_bytes(4, "little") + kept[8:]
    return kept


def _manifests(content: bytes) -> Iterator[tuple[int, int]]:
    """Where the parts of a file begin and end that hold its content credentials (C2PA specification, appendix A.3)."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        at = 12
        while at + 8 <= len(content):
            size = int.from_bytes(content[at + 4 : at + 8], "little")
            stop = at + 8 + size + size % 2
            if content[at : at + 4] == b"C2PA":
                yield at, stop
            at = stop
    elif content.startswith(b"\xff\xd8"):
        at = 2
        while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] not in (b"\xda", b""):
            stop = at + 2 + int.from_bytes(content[at + 2 : at + 4])
            if content[at + 1] == 0xEB and content[at + 4 : at + 6] == b"JP":  # JPEG XT's box of JUMBF
                yield at, stop
            at = stop
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        at = 8
        while at + 8 <= len(content):
            stop = at + 12 + int.from_bytes(content[at : at + 4])
            if content[at + 4 : at + 8] == b"caBX":
                yield at, stop
            at = stop


def _manifest(*, edited: bool, declared: bool) -> dict[str, Any]:
    """What is claimed of an image.

    Args:
        edited: it was made of another one.
        declared: that other one has no manifest of its own, so that it can only be said that it was there.
    """
    generator = {"name": "flux-lora", "version": flux_lora.__version__}
    if edited:
        actions = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": [INPUT]}},
            {"action": "c2pa.edited", "digitalSourceType": AI_EDITED, "softwareAgent": generator},
        ]
    else:
        actions = [{"action": "c2pa.created", "digitalSourceType": AI_GENERATED, "softwareAgent": generator}]
    manifest: dict[str, Any] = {
        "claim_generator_info": [generator],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }
    if edited and declared:
        manifest["ingredients"] = [{"relationship": "parentOf", "label": INPUT}]
    return manifest


def _media_type(source: bytes) -> str | None:
    """The library believes what it is told of an ingredient's type, so it is told what the bytes say."""
    try:
        with Image.open(io.BytesIO(source)) as image:
            return image.get_format_mimetype()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


# The operator's files


def _text(variable: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"{variable}={path} cannot be read: {error.strerror}.") from None


def _checked(certificate: str, key: str) -> tuple[str, bytes, bytes]:
    """Check that certificate and key belong together and are made for this.

    Returns:
        The algorithm that the key signs with, and certificates and key as the library reads them.

    Raises:
        SettingsError: they are not; the message says why.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
    except ValueError:
        raise SettingsError("FLUX_C2PA_CERTIFICATE holds no certificate in PEM.") from None
    try:
        private = load_pem_private_key(key.encode(), password=None)
    except TypeError:
        raise SettingsError("FLUX_C2PA_KEY is encrypted; write it without a passphrase.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError("FLUX_C2PA_KEY holds no private key in PEM.") from None
    public = private.public_key()
    if chain[0].public_key() != public:
        elsewhere = any(other.public_key() == public for other in chain[1:])
        advice = "put the certificate of that key first" if elsewhere else "they must be a pair"
        raise SettingsError(
            f"FLUX_C2PA_KEY is not the key of the first certificate in FLUX_C2PA_CERTIFICATE: {advice}."
        )
    _check_certificate(chain[0])
    certificates = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    return _algorithm(private), certificates, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _check_certificate(certificate: "x509.Certificate") -> None:
    from cryptography import x509

    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        dates = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise SettingsError(f"FLUX_C2PA_CERTIFICATE is valid from {dates} only, and it is {now:%Y-%m-%d}.")
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        purposes = {usage.dotted_string for usage in usages}
    except x509.ExtensionNotFound:
        purposes = set()
    if not purposes & set(_SIGNING):
        raise SettingsError(
            "FLUX_C2PA_CERTIFICATE is not made for signing content: its extended key usage must be C2PA claim signing "
            "(1.3.6.1.4.1.62558.2.1), document signing or e-mail protection."
        )


def _algorithm(key: "PrivateKeyTypes") -> str:
    """The algorithm that a key signs with, by its name in the library."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= SMALLEST_RSA_KEY:
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise SettingsError(
        "FLUX_C2PA_KEY must be an elliptic-curve key (P-256, P-384, P-521), Ed25519, or RSA of at least "
        f"{SMALLEST_RSA_KEY} bits."
    )


# The library


def _library() -> Any:
    """Import c2pa-python, 25 MB that nobody needs who signs nothing.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import c2pa
    except ImportError:
        raise SettingsError(
            "Content credentials (FLUX_C2PA_CERTIFICATE) need the package c2pa-python: pip install c2pa-python."
        ) from None
    return c2pa


@cache
def _context() -> "c2pa.Context":
    context: c2pa.Context = _library().Context.from_dict(_OFFLINE)
    return context


def _reason(error: Exception) -> str:
    """The library's words without its class of error, on one line."""
    text = " ".join(str(error).split())
    return text.partition(": ")[2][:200].rstrip(".") or text[:200]
