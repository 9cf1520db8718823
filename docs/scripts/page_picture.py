"""Writes docs/pictures/page.png: the page of a server that runs, under a load of its own.

pdjax serve --config.decode.engines=2 --config.handoff.layer_groups=3
python -m docs.scripts.page_picture http://127.0.0.1:8000
"""

import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from tests.helpers.browser import Page, browser, found_browser

PICTURE = Path(__file__).resolve().parent.parent / "pictures/page.png"
SIZE = 1280, 800
CLIENTS = 5
SECONDS = 45
PROMPT = "The sea was calm that morning, and the harbour lay in a thin mist. "


def client(url: str, number: int, end: threading.Event) -> None:
    """Ask for one answer after the other until the end, with pauses between them."""
    chance = random.Random(number)
    while not end.wait(chance.uniform(0, 1.5)):
        body = {
            "prompt": PROMPT * chance.randint(1, 16) + str(chance.random()),
            "max_tokens": chance.randint(8, 64),
            "ignore_eos": True,
        }
        headers = {"content-type": "application/json"}
        data = json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data, headers)):
            pass


def take(page: Page, url: str) -> None:
    """Ask a question in the chat, wait for the answer under the load, and take the picture."""
    page.show(*SIZE)
    page.open(url)
    page.until("document.getElementById('status').dataset.state === 'live'")
    time.sleep(SECONDS)
    page.value("document.getElementById('question').focus()")
    page.type("What is the capital of France?")
    page.press("Enter")
    page.until("document.querySelector('.assistant .note').textContent", SECONDS)
    ended = "[...document.querySelectorAll('#request-rows > li:not(.runs)')]"
    page.value(f"{ended}.find((row) => row.querySelectorAll('.wire').length > 2).focus()")
    page.picture(PICTURE)


def main(url: str) -> None:
    """Take the picture of the server at a URL."""
    path, end = found_browser(), threading.Event()
    if path is None:
        raise SystemExit("a Chromium is needed, on the path")
    clients = [threading.Thread(target=client, args=(url, i, end)) for i in range(CLIENTS)]
    for each in clients:
        each.start()
    try:
        with tempfile.TemporaryDirectory() as folder, browser(path, Path(folder)) as made:
            take(made.page(), url)
    finally:
        end.set()
        for each in clients:
            each.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
