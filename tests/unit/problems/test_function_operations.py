"""Each operation of the functions to write computes a result that is told by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from d2f.problems.functions import OPERATIONS
from d2f.problems.functions.operation import TYPES
from d2f.problems.functions.pipeline import _ARGUMENTS, PARAMETERS, PLAIN_NAMES

XS = [3, -1, 4, 4, 0, 5]
WORDS = ["river", "Anna", "noon", "ice2", "noon"]
TEXT = "Noon at 42"

EXPECTED: dict[str, tuple[Any, ...]] = {
    # Each: value, argument (if any), result.
    "ints.even": (XS, [4, 4, 0]),
    "ints.odd": (XS, [3, -1, 5]),
    "ints.positive": (XS, [3, 4, 4, 5]),
    "ints.negative": (XS, [-1]),
    "ints.above": (XS, 3, [4, 4, 5]),
    "ints.below": (XS, 3, [-1, 0]),
    "ints.multiples": (XS, 3, [3, 0]),
    "ints.non_multiples": (XS, 3, [-1, 4, 4, 5]),
    "ints.without": (XS, 4, [3, -1, 0, 5]),
    "ints.common": (XS, [4, 3], [3, 4, 4]),
    "ints.exclude": (XS, [4, 3], [-1, 0, 5]),
    "ints.no_max": ([2, 5, 5], [2]),
    "ints.no_min": ([2, 5, 2], [5]),
    "ints.add": (XS, 2, [5, 1, 6, 6, 2, 7]),
    "ints.subtract": (XS, 2, [1, -3, 2, 2, -2, 3]),
    "ints.multiply": (XS, 2, [6, -2, 8, 8, 0, 10]),
    "ints.divide": (XS, 2, [1, -1, 2, 2, 0, 2]),
    "ints.mod": (XS, 3, [0, 2, 1, 1, 0, 2]),
    "ints.square": (XS, [9, 1, 16, 16, 0, 25]),
    "ints.cube": ([2, -3], [8, -27]),
    "ints.abs": (XS, [3, 1, 4, 4, 0, 5]),
    "ints.negate": ([2, -3], [-2, 3]),
    "ints.cap": (XS, 3, [3, -1, 3, 3, 0, 3]),
    "ints.floor": (XS, 3, [3, 3, 4, 4, 3, 5]),
    "ints.digit_sums": ([12, -34, 0], [3, 7, 0]),
    "ints.weighted": ([5, 6, 7], [0, 6, 14]),
    "ints.pair_sums": ([1, 2, 3], [10, 20], [11, 22]),
    "ints.pair_products": ([1, 2, 3], [10, 20], [10, 40]),
    "ints.pair_max": ([1, 25, 3], [10, 20], [10, 25]),
    "ints.sort": (XS, [-1, 0, 3, 4, 4, 5]),
    "ints.sort_down": (XS, [5, 4, 4, 3, 0, -1]),
    "ints.reverse": (XS, [5, 0, 4, 4, -1, 3]),
    "ints.unique": (XS, [3, -1, 4, 0, 5]),
    "ints.running_sums": ([1, 2, -4], [1, 3, -1]),
    "ints.running_max": ([2, 1, 5, 4], [2, 2, 5, 5]),
    "ints.differences": ([2, 1, 5], [-1, 4]),
    "ints.neighbour_sums": ([2, 1, 5], [3, 6]),
    "ints.take": (XS, 2, [3, -1]),
    "ints.drop": (XS, 2, [4, 4, 0, 5]),
    "ints.tail": (XS, 2, [0, 5]),
    "ints.every_second": (XS, [3, 4, 0]),
    "ints.rotate": (XS, 2, [4, 4, 0, 5, 3, -1]),
    "ints.append": ([1], 9, [1, 9]),
    "ints.prepend": ([1], 9, [9, 1]),
    "ints.concat": ([1], [2, 3], [1, 2, 3]),
    "ints.sum": (XS, 15),
    "ints.max": (XS, 5),
    "ints.min": (XS, -1),
    "ints.count": (XS, 6),
    "ints.product": ([2, -3, 4], -24),
    "ints.spread": (XS, 6),
    "ints.count_of": (XS, 4, 2),
    "ints.count_above": (XS, 3, 3),
    "ints.count_even": (XS, 3),
    "ints.first": (XS, 3),
    "ints.last": (XS, 5),
    "ints.runner_up": (XS, 4),
    "ints.argmax": ([1, 7, 7], 1),
    "ints.distinct": (XS, 5),
    "ints.mean": (XS, 2),
    "ints.alternating": ([5, 2, 4], 7),
    "ints.dot": ([1, 2], [3, 4], 11),
    "ints.is_sorted": ([1, 1, 2], True),
    "ints.has": (XS, 7, False),
    "ints.all_positive": ([1, 0], False),
    "ints.any_even": ([1, 3], False),
    "ints.repeats": (XS, True),
    "ints.same_ends": ([1, 2, 1], True),
    "ints.texts": ([1, -2], ["1", "-2"]),
    "ints.joined": ([1, -2], "/", "1/-2"),
    "ints.signs": ([1, -2, 0], "+--"),
    "int.plus": (5, 3, 8),
    "int.minus": (5, 3, 2),
    "int.times": (5, 3, 15),
    "int.over": (-5, 3, -2),
    "int.modulo": (5, 3, 2),
    "int.squared": (-5, 25),
    "int.absolute": (-5, 5),
    "int.opposite": (-5, 5),
    "int.at_most": (5, 3, 3),
    "int.at_least": (5, 3, 5),
    "int.gap": (5, 8, 3),
    "int.digit_sum": (-57, 12),
    "int.digit_count": (-57, 2),
    "int.flipped": (570, 75),
    "int.factorial": (4, 24),
    "int.triangle": (4, 10),
    "int.collatz": (5, 16),
    "int.gcd": (12, 18, 6),
    "int.divisor_count": (12, 6),
    "int.bit_count": (11, 3),
    "int.is_even": (4, True),
    "int.is_prime": (9, False),
    "int.is_multiple": (9, 3, True),
    "int.exceeds": (9, 9, False),
    "int.digits_text": (-9, "-9"),
    "int.fizz": (9, 3, "fizz"),
    "int.sign": (-9, "minus"),
    "int.parity": (9, "odd"),
    "int.binary": (6, "110"),
    "int.stars": (3, "***"),
    "int.digit_list": (-907, [9, 0, 7]),
    "int.up_to": (3, [1, 2, 3]),
    "int.down_from": (3, [3, 2, 1]),
    "int.divisors": (6, [1, 2, 3, 6]),
    "int.table": (7, 3, [7, 14, 21]),
    "str.reversed": (TEXT, "24 ta nooN"),
    "str.upper": (TEXT, "NOON AT 42"),
    "str.lower": (TEXT, "noon at 42"),
    "str.swapcase": (TEXT, "nOON AT 42"),
    "str.title": ("nOON at 42", "Noon At 42"),
    "str.no_vowels": (TEXT, "Nn t 42"),
    "str.vowels": (TEXT, "ooa"),
    "str.letters": (TEXT, "Noonat"),
    "str.digits": (TEXT, "42"),
    "str.no_digits": (TEXT, "Noon at "),
    "str.capitals": (TEXT, "N"),
    "str.no_spaces": (TEXT, "Noonat42"),
    "str.snake": (TEXT, "Noon_at_42"),
    "str.hide_digits": (TEXT, "Noon at ##"),
    "str.hide_vowels": (TEXT, "N**n *t 42"),
    "str.doubled": ("ab", "aabb"),
    "str.sorted_chars": ("cab", "abc"),
    "str.unique_chars": ("noon", "no"),
    "str.squeezed": ("noonn", "non"),
    "str.prefix": (TEXT, 3, "Noo"),
    "str.suffix": (TEXT, 3, " 42"),
    "str.without_first": (TEXT, 3, "n at 42"),
    "str.without_last": (TEXT, 3, "Noon at"),
    "str.every_other": ("abcde", "ace"),
    "str.rotated": ("abcde", 2, "cdeab"),
    "str.remove": (TEXT, "o", "Nn at 42"),
    "str.dash": (TEXT, "o", "N--n at 42"),
    "str.starting": ("ab", "x", "xab"),
    "str.ending": ("ab", "x", "abx"),
    "str.after": ("ab", "xy", "abxy"),
    "str.before": ("ab", "xy", "xyab"),
    "str.shared": ("banana", "nb", "bnn"),
    "str.foreign": ("banana", "nb", "aaa"),
    "str.repeat": ("ab", 3, "ababab"),
    "str.mirror": ("ab", "abba"),
    "str.brackets": ("ab", "(ab)"),
    "str.spaced": ("abc", "a b c"),
    "str.length": (TEXT, 10),
    "str.vowel_count": (TEXT, 3),
    "str.letter_count": (TEXT, 6),
    "str.digit_count": (TEXT, 2),
    "str.capital_count": (TEXT, 1),
    "str.word_count": (TEXT, 3),
    "str.char_count": (TEXT, "o", 2),
    "str.find": (TEXT, "x", -1),
    "str.char_kinds": ("noon", 2),
    "str.text_digit_sum": (TEXT, 6),
    "str.longest_length": (TEXT, 4),
    "str.palindrome": ("noon", True),
    "str.starts": (TEXT, "n", False),
    "str.ends": (TEXT, "2", True),
    "str.contains": (TEXT, "t", True),
    "str.all_unique": ("noon", False),
    "str.has_digit": (TEXT, True),
    "str.longer": ("noon", 4, False),
    "str.split": (TEXT, ["Noon", "at", "42"]),
    "str.chars": ("ab", ["a", "b"]),
    "str.word_lengths": (TEXT, [4, 2, 2]),
    "str.digit_values": (TEXT, [4, 2]),
    "str.places": (TEXT, "o", [1, 2]),
    "strs.longer": (WORDS, 4, ["river"]),
    "strs.shorter": (WORDS, 5, ["Anna", "noon", "ice2", "noon"]),
    "strs.starting": (WORDS, "n", ["noon", "noon"]),
    "strs.containing": (WORDS, "i", ["river", "ice2"]),
    "strs.lacking": (WORDS, "n", ["river", "ice2"]),
    "strs.palindromes": (WORDS, ["noon", "noon"]),
    "strs.uppercase": (["aB"], ["AB"]),
    "strs.lowercase": (["aB"], ["ab"]),
    "strs.capitalised": (["aB c"], ["Ab c"]),
    "strs.reversed_words": (["ab", "c"], ["ba", "c"]),
    "strs.initials": (["ab", "c", ""], ["a", "c", ""]),
    "strs.cut": (["abc", "d"], 2, ["ab", "d"]),
    "strs.twice": (["ab"], ["abab"]),
    "strs.with_ending": (["ab"], "s", ["abs"]),
    "strs.sort": (WORDS, ["Anna", "ice2", "noon", "noon", "river"]),
    "strs.by_length": (["abc", "d", "ef"], ["d", "ef", "abc"]),
    "strs.backwards": (["a", "b"], ["b", "a"]),
    "strs.unique": (WORDS, ["river", "Anna", "noon", "ice2"]),
    "strs.take": (WORDS, 2, ["river", "Anna"]),
    "strs.drop": (WORDS, 3, ["ice2", "noon"]),
    "strs.every_second": (WORDS, ["river", "noon", "noon"]),
    "strs.numbered": (["a", "b"], ["0a", "1b"]),
    "strs.concatenated": (["a", "b"], "ab"),
    "strs.joined": (["a", "b"], "-", "a-b"),
    "strs.acronym": (WORDS, "rAnin"),
    "strs.longest": (WORDS, "river"),
    "strs.shortest": (WORDS, "Anna"),
    "strs.first_word": (WORDS, "river"),
    "strs.last_word": (WORDS, "noon"),
    "strs.alphabetical": (WORDS, "Anna"),
    "strs.lengths": (WORDS, [5, 4, 4, 4, 4]),
    "strs.size": (WORDS, 5),
    "strs.total_length": (WORDS, 21),
    "strs.count_with": (WORDS, "n", 3),
    "strs.is_sorted": (WORDS, False),
    "strs.has_repeats": (WORDS, True),
    "strs.same_length": (["ab", "cd"], True),
}


def test_every_operation_is_told() -> None:
    assert set(EXPECTED) == set(OPERATIONS)
    assert len(OPERATIONS) > 60


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_computes_what_it_says(name: str) -> None:
    value, *argument, result = EXPECTED[name]
    operation = OPERATIONS[name]
    assert bool(argument) == (operation.argument is not None)
    before = repr(value)
    assert repr(operation.apply(value, *(argument or [None]))) == repr(result)
    # A test's literals are fresh, but a step may also read the same list twice.
    assert repr(value) == before


def test_wordings_are_unique_and_end_in_the_right_place() -> None:
    seen: dict[tuple[str, str], str] = {}
    for operation in OPERATIONS.values():
        assert operation.takes in TYPES
        assert operation.gives in TYPES
        assert len(set(operation.texts)) >= 3
        for text in operation.texts:
            assert not re.search(r"[.,;:!?]$|  |, ", text), text
            assert ("{k}" in text) == (operation.argument is not None), text
            plain = re.sub(r"\{(it|them|each)\}", "it", text)
            assert seen.setdefault((operation.takes, plain), operation.id) == operation.id


def test_no_name_is_used_for_two_things() -> None:
    """Results, parameters, loop variables and functions never hide each other."""
    outs = {operation.out for operation in OPERATIONS.values()} - {""}
    inside = {"c", "d", "i", "w", "x", "y", "out", "sums", "tops", "total", "left", "right"}
    firsts = {name for names in PARAMETERS.values() for name in names}
    others = {name for names in _ARGUMENTS.values() for name in names}
    groups = [outs | inside, firsts, others, set(PLAIN_NAMES), {"answer", "space"} - outs]
    names = [name for group in groups for name in group]
    assert len(set(names)) == len(names)
    builtins = vars(__import__("builtins"))
    assert not any(name in builtins for name in names)


def test_a_loop_writes_a_variable_that_no_other_step_gives() -> None:
    """Any step may come before a loop, which must not overwrite what it reads."""
    outs = [operation.out for operation in OPERATIONS.values() if operation.out]
    for operation in OPERATIONS.values():
        if "\n" in operation.code and operation.out:
            assert outs.count(operation.out) == 1, operation.id
