"""A certificate authority of the tests' own, and certificates to sign pictures with."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID, ObjectIdentifier

CLAIM_SIGNING = "1.3.6.1.4.1.62558.2.1"
DOCUMENT_SIGNING = "1.3.6.1.5.5.7.3.36"
EMAIL_PROTECTION = "1.3.6.1.5.5.7.3.4"
SERVER = "1.3.6.1.5.5.7.3.1"


@dataclass(frozen=True)
class Identity:
    """A certificate chain, its key and the root that vouches for it, all PEM."""

    certificate: str
    key: str
    root: str

    def write(self, folder: Path) -> dict[str, str]:
        """Put them into files, and name these as the settings do."""
        (certificate := folder / "certificate.pem").write_text(self.certificate)
        (key := folder / "key.pem").write_text(self.key)
        return {"FLUX_C2PA_CERTIFICATE": str(certificate), "FLUX_C2PA_KEY": str(key)}


def issue(
    key: CertificateIssuerPrivateKeyTypes | None = None,
    *,
    usage: str | None = CLAIM_SIGNING,
    days: tuple[float, float] = (-1, 30),
    passphrase: bytes | None = None,
    key_format: PrivateFormat = PrivateFormat.PKCS8,
) -> Identity:
    """Issue a certificate that is valid on the given days from today, by a root of its own.

    Args:
        key: of the certificate; None: a new one on P-256.
        usage: extended key usage; None for none.
        days: the first and the last on which it is valid.
        passphrase: encrypts the key.
        key_format: of the key's PEM.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = (
        _builder("Test root", "Test root", root_key, (-100, 100))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        _builder("Test signer", "Test root", key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
    )
    if usage:
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([ObjectIdentifier(usage)]), critical=False)
    signed = leaf.sign(root_key, hashes.SHA256())
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    root_pem = root.public_bytes(Encoding.PEM).decode()
    return Identity(
        signed.public_bytes(Encoding.PEM).decode() + root_pem,
        key.private_bytes(Encoding.PEM, key_format, encryption).decode(),
        root_pem,
    )


def _builder(
    name: str, issuer: str, key: CertificateIssuerPrivateKeyTypes, days: tuple[float, float]
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    first, last = (now + timedelta(days=number) for number in days)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests")]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
