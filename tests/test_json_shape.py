"""The shape of JSON and TOML that others wrote: what does not fit is told by file, key, actual and expected value."""

import math

import pytest

from pytest_logprob_parity import UsageError
from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.json_shape import (
    COUNT,
    NUMBER_OR_NULL,
    WHOLE,
    Closed,
    Fits,
    Items,
    Number,
    OneOf,
    OptionalKey,
    OrNull,
    check_shape,
)  # fmt: skip


def told(value, shape, **arguments):
    """What is said of a value; "" where it fits."""
    try:
        check_shape(value, shape, "plan.toml", **arguments)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("a", str), (True, bool), (1, int), (1, (int, float)), (1.5, float), (None, NUMBER_OR_NULL), ([], list), ({}, dict),
        *((value, object) for value in (True, None, 1, "a", [1], {})),
        ([], [str]), (["a", "b"], [str]), ([1, 2], Items(int, 2, least=2)), ([], Items(int)),
        ({"a": 1, "more": 2}, {"a": int}), ({}, {"a": OptionalKey(int)}), ({"x": 1, "y": 2}, {str: int}), ({}, Closed({})),
        ({"a": 1, "b": "c"}, {"a": int, str: (int, str)}), ({"a": 1}, Closed({"a": int, "b": OptionalKey(str)})),
        (None, OrNull(str)), ("a", OrNull(str)), (0, COUNT), (-1, WHOLE), (2**53, COUNT), (1.5, Number(1, 2)),
        (9, Number(low=1)),         (-9, Number(high=1, whole=True)), ("b", OneOf(("a", "b"))),
        (2, Fits("an even number", lambda v: v % 2 == 0)),
    ],
)  # fmt: skip
def test_what_fits(value, shape):
    assert told(value, shape) == ""


@pytest.mark.parametrize(
    ("value", "shape", "text"),
    [
        (True, int, "its content is true, expected a whole number"),
        (True, (int, float), "its content is true, expected a number"),
        (True, COUNT, "its content is true, expected a whole number from 0 to 2**53"),
        (1, bool, "its content is 1, expected true or false"),
        (None, (str, int), "its content is null, expected a string or a whole number"),
        ({"a": "x"}, {"a": NUMBER_OR_NULL}, 'a is "x", expected a number or null'),
        ({"a": [{"b": 1}, {"b": []}]}, {"a": [{"b": int}]}, "a[1].b is a list of 0 items, expected a whole number"),
        ({"a": {"x y": {}}}, {"a": {str: str}}, 'a["x y"] is a mapping of 0 items, expected a string'),
        ({}, {"a": OrNull(str)}, "a is missing, expected a string or null"),
        ({"a": None}, {"a": OptionalKey(str)}, "a is null, expected a string"),
        ({"a": 3}, {"a": {"b": int}}, "a is 3, expected a mapping"),
        ("ab", [str], 'its content is "ab", expected a list'),
        ([1, 2, 3], Items(int, 2), "its content has 3 items, expected at most 2"),
        ([1], Items(int, 3, least=2), "its content has 1 item, expected 2 to 3"),
        ([], Items(int, least=1), "its content has 0 items, expected at least 1"),
        ([1], Items(int, 2, least=2), "its content has 1 item, expected 2"),
        ({"a": 1, "b": 1}, Closed({"a": int}), 'its content has the key "b", expected no other keys than a'),
        ({"a": 1}, Closed({"ab": int}), 'its content has the key "a", expected no other keys than ab; did you mean \'ab\'?'),
        ({"x": {"a": {"b": 1}}}, {"x": {str: Closed({"c": int})}}, 'x.a has the key "b", expected no other keys than c'),
        (1.5, WHOLE, "its content is 1.5, expected a whole number from -2**53 to 2**53"),
        (math.nan, Number(), "its content is NaN, expected a number"),
        (0, Number(low=1), "its content is 0, expected a number, 1 or more"),
        (5, Number(high=4, whole=True), "its content is 5, expected a whole number, at most 4"),
        ("c", OneOf(("a", "b")), 'its content is "c", expected one of a, b'),
        ([], OneOf(("a", "b")), "its content is a list of 0 items, expected one of a, b"),
        (3, Fits("an even number", lambda v: v % 2 == 0), "its content is 3, expected an even number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_by_place_key_actual_and_expected(value, shape, text):
    assert told(value, shape) == f"plan.toml: {text}"


def test_the_error_is_the_callers_and_says_what_to_do():
    assert (
        told(3, str, key="cell.new", advice="see docs/how-to/diagnosis.md")
        == "plan.toml: cell.new is 3, expected a string; see docs/how-to/diagnosis.md"
    )
    with pytest.raises(EngineError, match=r"the server\'s answer: choices\[0\].text is missing, expected a string"):
        check_shape({"choices": [{}]}, {"choices": [{"text": str}]}, "the server's answer", error=EngineError, key="")


def test_hostile_and_long_values_are_cut_and_shown():
    assert (
        told("\u202e" * 9, int)
        == 'plan.toml: its content is "\\u202e\\u202e\\u202e\\u202e\\u202e\\u202e\\u2…, expected a whole number'
    )
    assert len(told("x" * 10**6, int)) < 120
    assert len(told(10**99, COUNT)) < 150
    assert len(told({"k" * 10**6: 1}, {str: str})) < 150
    assert "\n" not in told({"\n::error::": 1}, {str: str})


def test_the_place_in_a_long_list_of_lists_is_told():
    assert told({"a": [[1.0] * 9] * 1000 + [["b"]]}, {"a": [[NUMBER_OR_NULL]]}).startswith('plan.toml: a[1000][0] is "b"')
