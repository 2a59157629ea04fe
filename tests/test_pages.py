"""How our pages write numbers and texts."""

from lm import pages


def test_numbers():
    assert [pages.short(n) for n in (None, 0, 7, 999, 1049984, 17.4e12)] == "–;0;7;999;1.05 M;17.4 T".split(";")
    assert pages.interval({"low": -0.204, "high": 1.5}, "signed") == "[−0.20, +1.50]"
    assert pages.interval({"low": -0.001, "high": 0.004}) == "[0.00, 0.00]"  # no negative zero
    assert pages.signed(-0.001) == "+0.00"
    assert pages.visible("a\tb\n\x00\x7f\x9b") == "a\tb\n␀␡\ufffd"
