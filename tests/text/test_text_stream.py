"""Streaming text: shown text is never taken back, and no part of a stop string is shown."""

import random

import pytest

from pdjax.core.request import SamplingParams
from pdjax.core.stop_strings import StopStrings
from pdjax.text.text_stream import TextStream


class Pieces:
    """A decoder: token i is the i-th piece; "~" is a byte held back until the next token."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.held = ""

    def push(self, token_id: int) -> str:
        text = self.held + self.pieces[token_id]
        self.held = "~" if text.endswith("~") else ""
        return text.removesuffix("~")

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def stream(pieces: list[str], *stop: str) -> tuple[list[str], str, str | None]:
    """Stream pieces; return the deltas, the text and the stop string matched."""
    text = TextStream(Pieces(pieces), stop)
    deltas, match = [], None
    for token in range(len(pieces)):
        match = text.push(token)
        deltas.append(text.take())
        if match is not None:
            break
    text.finish()
    deltas.append(text.take())
    return deltas, text.text, match


def test_without_stop_strings_text_flows():
    assert stream(["Hel", "lo", ""]) == (["Hel", "lo", "", ""], "Hello", None)


def test_text_is_cut_before_the_stop_string():
    assert stream(["one", " END two"], "END") == (["one", " ", ""], "one ", "END")


def test_a_stop_string_over_several_tokens_is_never_shown():
    deltas, text, match = stream(["a<", "|e", "nd", "|>b"], "<|end|>")
    assert deltas == ["a", "", "", "", ""]
    assert (text, match) == ("a", "<|end|>")


def test_what_turns_out_not_to_be_a_stop_string_is_shown():
    assert stream(["a<", "|e", "x"], "<|end|>") == (["a", "", "<|ex", ""], "a<|ex", None)


def test_a_half_stop_string_at_the_end_is_shown_at_the_end():
    assert stream(["a<|en"], "<|end|>") == (["a", "<|en"], "a<|en", None)


def test_the_earliest_stop_string_wins():
    assert stream(["abcdef"], "e", "cd")[1:] == ("ab", "cd")
    assert stream(["abcdef"], "cd", "c")[1:] == ("ab", "c")


def test_the_shorter_of_two_that_end_alike_may_lie_within_the_longer():
    assert stream(["xab", "c"], "abc", "c")[1:] == ("x", "abc")


def test_a_repeated_beginning_is_held_back_from_the_right_place():
    assert stream(["aa", "a", "b"], "aab")[1:] == ("a", "aab")
    assert stream(["aa", "a", "c"], "aab") == (["", "a", "aac", ""], "aaac", None)


def test_bytes_of_a_half_character_come_with_its_end_or_with_finish():
    assert stream(["a~", "b"]) == (["a", "~b", ""], "a~b", None)
    assert stream(["a~"]) == (["a", "~"], "a~", None)


def test_a_stop_string_completed_by_the_flush_cuts_the_text():
    assert stream(["ab~"], "b~")[1] == "a"


def test_finish_twice_is_finish_once():
    text = TextStream(Pieces(["a~"]))
    text.push(0)
    text.finish()
    text.finish()
    assert text.text == text.take() == "a~"


def test_no_token_after_the_end():
    text = TextStream(Pieces(["stop", "more"]), ("stop",))
    assert text.push(0) == "stop"
    with pytest.raises(AssertionError):
        text.push(1)


def test_random_streams_keep_their_promises():
    rng = random.Random(0)

    def word(longest: int) -> str:
        return "".join(rng.choice("ab~") for _ in range(rng.randint(1, longest)))

    matched = 0
    for _ in range(3000):
        pieces = [word(3) if rng.random() < 0.9 else "" for _ in range(rng.randint(1, 12))]
        stop = tuple(word(5) for _ in range(rng.randint(0, 3)))
        deltas, text, match = stream(pieces, *stop)
        assert "".join(deltas) == text
        whole = "".join(pieces)
        assert whole.startswith(text)
        assert not any(string in text for string in stop)
        if match is None:
            assert text == whole or any(whole.startswith(text + string) for string in stop)
        else:
            matched += 1
            assert whole.startswith(text + match)
    assert 500 < matched < 2900


def naive(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Find text and match by definition: the earliest string in the text after some piece."""
    text = ""
    for piece in pieces:
        text += piece
        found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
        if found:
            start, _, stop = min(found)
            return text[:start], stop
    return text, None


def test_random_stop_strings_are_found_where_they_begin():
    rng = random.Random(1)

    def word(longest: int) -> str:
        return "".join(rng.choice("aab😀") for _ in range(rng.randint(1, longest)))

    matched = 0
    for _ in range(3000):
        pieces = [word(4) for _ in range(rng.randint(1, 10))]
        stops = tuple(word(6) for _ in range(rng.randint(1, 4)))
        text, match = naive(pieces, stops)
        deltas, streamed, found = stream(pieces, *stops)
        assert (streamed, found) == (text, match)
        assert "".join(deltas) == text
        matched += match is not None
    assert matched > 1000


def test_no_more_is_held_back_than_may_become_a_stop_string():
    rng = random.Random(2)
    for _ in range(500):
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(3))
        text, shown = TextStream(Pieces(list("ab")), stops), ""
        for _ in range(12):
            if text.push(rng.randrange(2)) is not None:
                break
            shown += text.take()
            held = text.text[len(shown) :]
            assert any(len(held) < len(stop) and stop.startswith(held) for stop in stops)


def test_what_a_token_costs_depends_on_nothing_but_its_own_text(monkeypatch: pytest.MonkeyPatch):
    """Count the steps of the search over strings that nearly match all the time."""
    stops = StopStrings(["a" * 2000 + "b", *("a" * i + "c" for i in range(1, 100))])
    reads = 0

    class Counting(dict):
        def get(self, *args):
            nonlocal reads
            reads += 1
            return dict.get(self, *args)

    monkeypatch.setattr(stops, "_edges", Counting(stops._edges))
    text = TextStream(Pieces(["aaaa", "d"]), stops)
    for token in range(4000):
        assert text.push(int(token % 1000 == 999)) is None
        text.take()
    assert reads <= 2 * len(text.text)


def test_the_choices_of_a_request_share_its_stop_strings():
    params = SamplingParams(stop=["END", "end"], n=2)
    assert params.stop_strings is params.stop_strings
    first, second = (TextStream(Pieces(["EN", "D"]), params.stop_strings) for _ in range(2))
    assert first.push(0) is None
    assert second.push(1) is None
    assert first.push(1) == "END"
    assert (first.text, second.text) == ("", "D")
