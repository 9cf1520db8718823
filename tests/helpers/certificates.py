"""A certificate for localhost and its keys, made by openssl when a test first asks: no private key
is kept in the repository."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Files(NamedTuple):
    """Paths of PEM files."""

    certificate: str
    key: str
    encrypted_key: str


def made_in(folder: Path) -> Files:
    """Make all three, or skip the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    files = Files(*(str(folder / f"{name}.pem") for name in Files._fields))
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    keep = ["-keyout", files.key, "-out", files.certificate]
    encrypted = ["-aes128", "-passout", "pass:secret", "-out", files.encrypted_key]
    for command in (["req", "-x509", *kind, *names, *keep], ["ec", "-in", files.key, *encrypted]):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return files
