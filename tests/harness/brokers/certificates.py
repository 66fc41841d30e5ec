"""A certificate authority for tests, with certificates for a server on 127.0.0.1 and for a client."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = dt.timedelta(days=1)


class Certificates:
    """PEM files in a folder. `server` and `client` have the names localhost, 127.0.0.1 and the user of the tests.

    `other_ca` is an authority that signed none of them: a client that trusts it alone must refuse the server.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.ca, key = self._authority("ca")
        self.other_ca, _ = self._authority("other_ca")
        self.server, self.server_key = self._signed("server", "localhost", key)
        self.client, self.client_key = self._signed("client", "bridge", key)

    def client_context(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        """Return a context that trusts the authority, for clients that take one."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if with_certificate:
            context.load_cert_chain(self.client, self.client_key)
        return context

    def server_context(self) -> ssl.SSLContext:
        """Return a context for a server in this process."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.server, self.server_key)
        return context

    def _authority(self, name: str) -> tuple[Path, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = self._builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        return self._write(f"{name}.crt", builder.add_extension(usage, True).sign(key, hashes.SHA256())), key

    def _signed(self, name: str, common_name: str, ca_key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = self._builder(common_name, "ca", key).add_extension(x509.SubjectAlternativeName(names), False)
        file = self._folder / f"{name}.key"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return self._write(f"{name}.crt", builder.sign(ca_key, hashes.SHA256())), file

    @staticmethod
    def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        named = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
        return (
            x509.CertificateBuilder()
            .subject_name(named[0])
            .issuer_name(named[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 30 * DAY)
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        file = self._folder / name
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return file
