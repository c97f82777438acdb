import pytest

from pipeline import errors
from pipeline.errors import TagmillError, shown

# what a scheduler acts on: sysexits
CODES = {
    "DataError": 65,
    "InputError": 66,
    "ServiceError": 69,
    "TagmillError": 70,
    "StorageError": 74,
    "LockedError": 75,
    "PermissionError_": 77,
    "ConfigError": 78,
}


def families():
    return {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_family_has_its_exit_code():
    assert {name: family.code for name, family in families().items()} == CODES
    assert all(issubclass(family, TagmillError) for family in families().values())
    assert (errors.USAGE, errors.INTERRUPTED, errors.TERMINATED) == (2, 130, 143)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, ünïcode 文字 …", "plain text, ünïcode 文字 …"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x00\x07\x7f\x85", r"\x00\x07\x7f\x85"),
        ("\u202eevil\u2066\u200b", r"\u202eevil\u2066\u200b"),
        ("line\u2028and\u2029paragraph", r"line\u2028and\u2029paragraph"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
        (17, "17"),
        (ValueError("x\ny"), r"x\ny"),
    ],
)
def test_shown_escapes_what_does_not_print(text, expected):
    assert shown(text) == expected
    assert shown(text).isprintable()


def test_shown_cuts_at_the_limit():
    assert shown("x" * 80) == "x" * 80
    assert shown("x" * 81) == "x" * 79 + "…"
    assert shown("\n" * 50, 10) == r"\n\n\n\n\…"
    assert len(shown("x" * 10**6, 300)) == 300
