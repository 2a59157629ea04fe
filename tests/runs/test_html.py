"""How our pages write numbers and texts."""

from lm.runs import html


def test_numbers():
    assert [html.short_number(n) for n in (None, 0, 7, 999, 1049984, 17.4e12)] == "–;0;7;999;1.05 M;17.4 T".split(";")
    assert html.interval_text({"low": -0.204, "high": 1.5}, "signed") == "[−0.20, +1.50]"
    assert html.interval_text({"low": -0.001, "high": 0.004}) == "[0.00, 0.00]"  # no negative zero
    assert html.signed_number(-0.001) == "+0.00"
    assert html.visible_text("a\tb\n\x00\x7f\x9b") == "a\tb\n␀␡\ufffd"
