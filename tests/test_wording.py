import pytest

from flux_lora.wording import complain, printable, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a tomato, “red” – カラス 🍅", "a tomato, “red” – カラス 🍅"),
        ("\u3000\u00a0 ", "\u3000\u00a0 "),
        ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nready in 0 s", "a\\nready in 0 s"),
        ("a\r\tb\0", "a\\r\\tb\\x00"),
        ("\u202egnp.exe\u2066\u200f\u2028", "\\u202egnp.exe\\u2066\\u200f\\u2028"),
        ("\ud800", "\\ud800"),
        ("C:\\x1b", "C:\\x1b"),
    ],
)
def test_what_strangers_wrote_steers_no_terminal(capsys: pytest.CaptureFixture[str], text: str, shown: str) -> None:
    assert printable(text) == shown
    say(text)
    complain(text)
    assert capsys.readouterr() == (f"{shown}\n", f"{shown}\n")
