"""TLS: a certificate and its key, read and checked before anything is loaded."""

import ssl


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """What a server needs to speak TLS 1.2 or later; None where no certificate is given.

    Args:
      certificate: path of a PEM file: the certificate, then those that have signed it.
      key: path of a PEM file with its private key, unencrypted; None where the certificate's file
        has it.

    Raises:
      ValueError: a key without a certificate, a file that can't be read, no PEM, an encrypted key,
        or a key of another certificate.
    """
    where = f"tls_cert_file={certificate!r}, tls_key_file={key!r}"
    if certificate is None:
        if key is not None:
            raise ValueError(f"{where}: a key needs its certificate")
        return None

    def no_password() -> str:
        raise ValueError(f"{where}: the key is encrypted; give one that is not")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, no_password)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{where}: {error.strerror or error}") from error
    return context
