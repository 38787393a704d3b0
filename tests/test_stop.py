"""Streaming text: pieces join to the decoded text, cut at the first stop string, whatever the tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from trtvlm.runtime.stop import TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence


class ByteVocabulary:
    """Tokens are ids into a list of byte strings; decoding joins and replaces what is not UTF-8, as byte BPE does."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace")


def stream(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    out = TextStream(ByteVocabulary(pieces).decode, stop)
    shown = []
    for token in range(len(pieces)):
        shown.append(out.push(token))
        if out.stopped:
            return shown, True
    shown.append(out.finish())
    return shown, out.stopped


@given(st.lists(st.binary(max_size=3), max_size=12) | st.text().map(lambda s: [bytes([b]) for b in s.encode()]))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole(pieces: list[bytes]) -> None:
    shown, _ = stream(pieces)
    assert "".join(shown) == b"".join(pieces).decode("utf-8", errors="replace")


@given(
    st.lists(st.text("abé", min_size=0, max_size=3), max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    shown, stopped = stream([piece.encode() for piece in pieces], stop)
    text = "".join(shown)
    whole = "".join(pieces)
    assert stopped == any(s in whole for s in stop)
    assert not any(s in text for s in stop)
    if stopped:
        # Read token by token, the first one that completes a stop string ends the text before it.
        for end in range(len(pieces) + 1):
            begun = "".join(pieces[:end])
            found = [begun.find(s) for s in stop if s in begun]
            if found:
                assert text == begun[: min(found)]
                break
    else:
        assert text == whole


def test_nothing_is_held_back_without_a_reason() -> None:
    shown, _ = stream([b"Total", b": 12", b".50"], ["\n\n"])
    assert shown == ["Total", ": 12", ".50", ""]


def test_a_stop_string_across_tokens_never_shows() -> None:
    shown, stopped = stream([b"one", b" EN", b"OUGH", b" EN", b"D two"], [" END"])
    assert (shown, stopped) == (["one", "", " ENOUGH", "", ""], True)


def test_an_unfinished_character_waits() -> None:
    euro = "€".encode()
    assert stream([b"5 ", euro[:1], euro[1:2], euro[2:] + b"!"])[0] == ["5 ", "", "", "€!", ""]
    assert stream([b"5 ", euro[:2]])[0] == ["5 ", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_stop_string_in_the_very_last_bytes() -> None:
    shown, stopped = stream([b"a", b"\xff"], ["\N{REPLACEMENT CHARACTER}"])
    assert ("".join(shown), stopped) == ("a", True)
