"""The page at `/` in a real browser, over a fake backend. Without a Chromium there is nothing to
test it with."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pdjax.serving.front import Settings
from pdjax.serving.keys import ApiKey, digest_of
from pdjax.serving.loading import answering
from pdjax.serving.server import listening_socket, url_of
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.browser import NAMES, Browser, Page, browser, found_browser
from tests.helpers.fake_backend import FakeBackend, served
from tests.helpers.tiny_tokenizer import write_directory

HOSTILE = "<img src=x onerror='document.title=1'>&amp;<script>document.title=2</script> Grüße"
IS_LIVE = "document.getElementById('status').dataset.state === 'live'"
ANSWER = "document.querySelector('.assistant .said').textContent"
NOTE = "document.querySelector('.assistant .note').textContent"
KEYED = Settings(api_keys=(ApiKey("me", digest_of("secret")),))

pytestmark = pytest.mark.skipif(
    found_browser() is None, reason=f"needs a browser: one of {', '.join(NAMES)} on the path"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = found_browser()
    assert path is not None
    with browser(path, tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def page(chromium: Browser) -> Page:
    return chromium.page()


def backend(folder: Path, token_s: float = 0.0, template: bool = True) -> FakeBackend:
    made = FakeBackend(folder, HOSTILE)
    made.token_s = token_s
    if not template:
        made.tokenizer = Tokenizer.open(write_directory(folder / "plain", {}))
    return made


def ask(page: Page, text: str) -> None:
    page.value("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter")


def test_the_state_is_shown_and_nothing_comes_from_elsewhere(page: Page, tmp_path: Path):
    with served(lambda: backend(tmp_path)) as at:
        page.show(1280, 800)
        page.open(at.url)
        page.until(IS_LIVE)
        assert page.value("document.title") == "fake · pdjax"
        cells = "[...document.querySelectorAll('#engine-rows tr')].map((row) => row.innerText)"
        [row] = page.value(cells)
        assert row.split("\t")[0] == "decode/0" and "1 of 4" in row
        told = page.value("document.getElementById('board').innerText")
        for part in (
            "2 of 9",
            "2 used, 1 cached, 5 free",
            "hbm/0 → hbm/1",
            "64 B in 1 shipment",
        ):
            assert part in told
        page.until(f"document.getElementById('status') && {IS_LIVE}")
        for size in ((1280, 800), (390, 844)):
            page.show(*size, scheme="dark")
            assert page.value("document.documentElement.scrollWidth") == size[0]
    asked = [each["request"]["url"] for each in page.of("Network.requestWillBeSent")]
    assert len(asked) > 8 and {urlsplit(url).netloc for url in asked} == {urlsplit(at.url).netloc}
    assert page.complaints() == []


def test_an_answer_streams_as_text_and_its_request_is_shown(page: Page, tmp_path: Path):
    with served(lambda: backend(tmp_path, token_s=0.01)) as at:
        page.open(at.url)
        page.until(IS_LIVE)
        ask(page, HOSTILE)
        lengths = f"(window.seen ??= new Set()).add({ANSWER}.length) && window.seen.size > 2"
        page.until(lengths)
        page.until(f"{NOTE}.includes('chunks')")
        assert page.value(ANSWER) == HOSTILE
        assert page.value("document.querySelector('.user .said').textContent") == HOSTILE
        assert page.value("document.title") == "fake · pdjax"
        assert (
            page.value("document.querySelectorAll('main img, aside img, aside script').length") == 0
        )
        [answer] = at.front.backend.answers  # type: ignore[attr-defined]
        assert answer.ask.params.max_tokens == 128 and answer.ask.params.temperature == 0

        page.until(
            "document.querySelector('#request-rows li')?.ariaLabel.includes('ended by stop')"
        )
        page.value("document.querySelector('#request-rows li').focus()")
        assert page.value("document.getElementById('about').textContent").startswith("r1: ")
        chips = page.value("document.getElementById('phases').innerText")
        assert "decode 1" in chips or "ms" in chips
        ask(page, "and?")
        page.until("document.querySelectorAll('#request-rows li').length === 2")
        page.value("document.querySelector('#request-rows li').focus()")
        page.press("ArrowDown")
        assert page.value("document.activeElement.querySelector('.id').textContent") == "r1"
    assert page.complaints() == []


def test_stop_ends_an_answer(page: Page, tmp_path: Path):
    with served(lambda: backend(tmp_path, token_s=0.1)) as at:
        page.open(at.url)
        page.until(IS_LIVE)
        ask(page, "hello")
        page.until(f"{ANSWER}.length")
        page.value("document.getElementById('stop').click()")
        page.until(f"{NOTE} === 'stopped'")
        [answer] = at.front.backend.answers  # type: ignore[attr-defined]
        at.until(lambda: answer.closed)


def test_without_a_template_a_text_is_continued(page: Page, tmp_path: Path):
    with served(lambda: backend(tmp_path, template=False)) as at:
        page.open(at.url)
        page.until(IS_LIVE)
        ask(page, "hello")
        page.until(f"{NOTE}.includes('chunks')")
        assert page.value(ANSWER) == HOSTILE
        paths = [
            urlsplit(each["request"]["url"]).path for each in page.of("Network.requestWillBeSent")
        ]
        assert "/v1/completions" in paths and "/v1/chat/completions" not in paths


def test_a_key_is_asked_for_and_stays_in_memory(page: Page, tmp_path: Path):
    with served(lambda: backend(tmp_path), KEYED) as at:
        page.open(at.url)
        status = "document.getElementById('status').textContent"
        page.until(f"{status} === 'an API key is needed'")
        assert page.value("document.getElementById('engine-rows').childElementCount") == 0
        for key, after in (("wrong", "this key is not known"), ("secret", "live")):
            page.value("document.getElementById('key').select()")
            page.type(key)
            page.press("Enter", text="\r")
            page.until(f"{status} === '{after}'")
        stored = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert "secret" not in page.value(stored)
        ask(page, "hello")
        page.until(f"{NOTE}.includes('chunks')")


def test_while_the_model_loads_the_page_says_so(page: Page):
    with listening_socket("127.0.0.1", 0) as found, answering(found):
        page.open(url_of(found))
        page.until(
            "document.getElementById('status').textContent.startsWith('the model is loading')"
        )


def test_a_server_that_has_gone_is_told_and_found_again(page: Page, tmp_path: Path):
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    with served(lambda: backend(tmp_path)) as at:
        page.open(at.url)
        page.until(IS_LIVE)
        page.call("Network.emulateNetworkConditions", offline=True, **network)
        page.until("document.getElementById('status').textContent.startsWith('server gone')")
        page.call("Network.emulateNetworkConditions", offline=False, **network)
        page.until(IS_LIVE)
