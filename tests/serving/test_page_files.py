"""The files of the page at `/`, without a browser: their headers, what they need, their colors."""

import re
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from pdjax.serving.keys import ApiKey, digest_of
from pdjax.serving.live_page import FILES, FOLDER
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.fences import ROOT
from tests.helpers.http_client import Http, error_of

TEXTS = {path: path.read_text("utf-8") for path in sorted(FOLDER.iterdir())}
LOADS = re.compile(r"""(?:\b(?:src|href)=|\b(?:from|import) |\burl\()["']([^"']+)["']""")
UNSAFE = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")
LEAST = {
    ("ink", "ground"): 7.0,
    ("ink", "sunk"): 7.0,
    ("quiet", "ground"): 4.5,
    ("mark", "ground"): 4.5,
    ("good", "ground"): 4.5,
    ("bad", "ground"): 4.5,
    **{
        (name, "ground"): 3.0
        for name in ("queue", "prefill", "wait-for-row", "transfer", "wait-for-tick", "decode")
    },
    ("wire", "ground"): 4.5,
}
"""Least contrasts, as WCAG has them: 4.5 for text, 3 for what is drawn, which stands beside its
numbers here."""


@pytest.mark.parametrize("path", FILES)
def test_a_file_needs_no_key_and_may_load_nothing_from_elsewhere(backend: FakeBackend, path: str):
    http = Http(backend, api_keys=(ApiKey("me", digest_of("secret")),))
    response = http.get(path)
    assert response.status_code == 200 and response.content == FILES[path].body
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    head = http.request("HEAD", path)
    assert head.status_code == 200 and head.headers["etag"] == response.headers["etag"]
    again = http.get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_data_need_the_key(backend: FakeBackend):
    http = Http(backend, api_keys=(ApiKey("me", digest_of("secret")),))
    for path in ("/engines", "/requests", "/page/", "/page/none.js", "/page/../engines"):
        error_of(http.get(path), 401)
    authorized = {"authorization": "Bearer secret"}
    assert http.get("/requests", headers=authorized).json() == {"requests": []}
    error_of(http.get("/page/none.js", headers=authorized), 404)


def test_the_files_name_only_one_another():
    known = {path.removeprefix("/") for path in FILES}
    for path, text in TEXTS.items():
        assert not UNSAFE.search(text), path.name
        for name in LOADS.findall(text):
            if not name.startswith("#"):
                base = "" if path.suffix == ".html" else "page/"
                assert base + name.removeprefix("./") in known, (path.name, name)


def test_a_wheel_has_the_files():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    package = Path("pdjax")
    found = {file for each in patterns["package-data"]["pdjax"] for file in package.glob(each)}
    assert {path.relative_to(ROOT) for path in TEXTS} <= {*found}


def palettes(css: str) -> Iterator[dict[str, str]]:
    """The colors of the light scheme, and of the dark one."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    for text in (light, dark):
        yield dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", text))


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (int(color[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_colors_can_be_told_from_their_ground():
    for palette, ((name, ground), least) in product(
        palettes(TEXTS[FOLDER / "page.css"]), LEAST.items()
    ):
        both = sorted((luminance(palette[name]), luminance(palette[ground])))
        contrast = (both[1] + 0.05) / (both[0] + 0.05)
        assert contrast >= least, (name, ground, palette[name], round(contrast, 2))
