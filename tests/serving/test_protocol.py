"""Heads of requests, as httptools leaves them to the server."""

from typing import Any

import pytest

from pdjax.serving.errors import ApiError
from pdjax.serving.protocol import check_head

HOST, CHUNKED = (b"host", b"x"), (b"transfer-encoding", b"chunked")


def head(*headers: tuple[bytes, bytes], version: str = "1.1") -> dict[str, Any]:
    return {"headers": [*headers], "http_version": version}


@pytest.mark.parametrize(
    "scope",
    [
        head(HOST),
        head(HOST, CHUNKED),
        head(HOST, (b"transfer-encoding", b" Chunked ")),
        head(version="1.0"),
    ],
)
def test_a_head_of_one_reading_passes(scope: dict[str, Any]):
    check_head(scope)


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        (head(), "0 Host headers"),
        (head(HOST, HOST), "2 Host headers"),
        (head(HOST, HOST, version="1.0"), "2 Host headers"),
        (head(HOST, (b"transfer-encoding", b"gzip, chunked")), "Transfer-Encoding"),
        (head(HOST, CHUNKED, (b"transfer-encoding", b"identity")), "Transfer-Encoding"),
    ],
)
def test_a_head_of_two_readings_is_refused(scope: dict[str, Any], said: str):
    with pytest.raises(ApiError, match=said) as caught:
        check_head(scope)
    assert caught.value.status == 400
    assert caught.value.headers == {"Connection": "close"}
