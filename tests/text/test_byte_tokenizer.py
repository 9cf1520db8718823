"""The tokenizer whose tokens are bytes."""

import threading
import time
from pathlib import Path

import pytest

from pdjax.text.byte_tokenizer import END, END_TEXT, VOCAB_SIZE, byte_tokenizer
from pdjax.text.tokenizer import Tokenizer

TEXTS = ["low lower", "  12\n\n\t x", "naïve 日本語 😀", "".join(map(chr, range(256))), ""]


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_is_a_byte(text: str):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_every_byte_has_a_token_and_the_end_is_the_last():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.eos_token_ids) == (END_TEXT, (END,))
    assert tokenizer.encode(f"a{END_TEXT}b") == [97, END, 98]
    assert tokenizer.decode([97, END, 98]) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_a_saved_one_is_equal(tmp_path: Path):
    byte_tokenizer().save(tmp_path)
    copy = Tokenizer.open(tmp_path)
    for text in TEXTS:
        assert copy.encode(text) == list(text.encode())
    assert (copy.vocab_size, copy.eos_token_ids) == (VOCAB_SIZE, (END,))


def test_a_long_text_is_cut_while_other_threads_go_on():
    """Engines are driven by threads of the same interpreter."""
    tokenizer, text = byte_tokenizer(), f"a b{END_TEXT}" * 200_000
    cut: list[list[int]] = []
    began = threading.Event()

    def encode() -> None:
        began.set()
        cut.append(tokenizer.encode(text))

    thread, turns = threading.Thread(target=encode), 0
    thread.start()
    began.wait()
    while not cut:
        turns += 1
        time.sleep(0.001)
    thread.join()
    assert turns > 10
    assert cut == [[*b"a b", END] * 200_000]
