"""Wording of messages."""

from mac.formatting import counted, listed, share


def test_one_is_singular_and_all_else_plural():
    assert [counted(n, "episode") for n in (0, 1, 2, 1200)] == [
        "0 episodes",
        "1 episode",
        "2 episodes",
        "1,200 episodes",
    ]


def test_shares_have_three_digits():
    assert [share(*x) for x in ((1, 3), (3, 3), (1, 3000), (0, 0))] == ["33.3%", "100%", "0.0333%", "0%"]


def test_names_of_a_message_are_few_short_and_printable():
    assert listed([]) == "nothing" and listed(["a", "b"]) == "a, b"
    assert listed(["a\nb\udcff\x1b"]) == "a?b??"
    assert listed(["c" * 60_000]) == "c" * 37 + "..."
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
