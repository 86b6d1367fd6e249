"""What an answer is worth: right, wrong and tricky ones, made by hand."""

import pytest

from linearize.tasks import scorers


@pytest.mark.parametrize(
    ("text", "contains", "strict"),
    [
        (" 1234567.", 1, True),
        (" 1234567\x0b1", 1, True),
        (" I think 7654321, or 1234567.", 1, False),
        ("12345671", 1, False),  # RULER's rule takes a part of a longer number
        ("", 0, False),
        ("1,234,567", 0, False),
    ],
)
def test_numbers(text, contains, strict):
    assert scorers.contains(text, ["1234567"]) == contains
    assert scorers.strict(text, ["1234567"], "number") is strict


def test_several_references_count_in_part():
    wanted = ["1111111", "2222222", "3333333", "4444444"]
    assert scorers.contains("1111111, 3333333", wanted) == 0.5
    assert scorers.strict("4444444, 3333333, 2222222 and 1111111", wanted, "number")
    assert not scorers.strict("4444444, 3333333, 9999999, 2222222 and 1111111", wanted, "number")
    assert scorers.contains("4444444, 3333333, 9999999, 2222222 and 1111111", wanted) == 1
    assert not scorers.strict("1111111", wanted, "number")


def test_other_kinds():
    uuid = "8cfe0e6f-07a0-4c31-8ad8-a2cd3c3ab2ba"
    assert scorers.strict(f" {uuid.upper()}", [uuid], "uuid")
    assert not scorers.strict(f" {uuid}0", [uuid], "uuid")
    assert scorers.strict("ABCDE, FGHIJ", ["FGHIJ", "ABCDE"], "name")
    assert not scorers.strict("ABCDEF FGHIJ", ["FGHIJ", "ABCDE"], "name")
    assert scorers.strict("1. cat 2. wool-yarn", ["wool-yarn", "cat"], "word")
    assert scorers.strict("abcdef ghijkl", ["ghijkl", "abcdef"], "code")
    assert scorers.strict(" 07.", ["07"], "integer")
    assert not scorers.strict(" 1 71432", ["71432"], "integer")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" garden.", True),
        (" The Garden", True),
        (" garden or office.", False),
        (" garden. Or was it the office?", True),
        (" office. garden.", False),
        (" the kitchen and then the garden", True),  # the question's own place does not count
        (" gardener", False),
        ("", False),
        ("\ngarden<", True),
    ],
)
def test_places(text, right):
    assert scorers.place(text, "garden", "Where was the milk before the kitchen?") is right


def test_copies_are_scored_by_token():
    assert scorers.tokens([1, 2, 9, 4], [1, 2, 3, 4]) == (0.75, 0.5, False)
    assert scorers.tokens([1, 2], [1, 2, 3, 4]) == (0.5, 0.5, False)
    assert scorers.tokens([1, 2, 3, 4, 5], [1, 2, 3, 4]) == (1, 1, True)
