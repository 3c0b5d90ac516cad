"""Accuracy under parallelism on cases that can be done by hand."""

import math

import pytest
from benchmarks.paper.aup import accuracy_under_parallelism

from d2f.errors import ConfigError


def test_single_point_is_a_rectangle():
    assert accuracy_under_parallelism([(2.5, 80)], best=90) == 200


def test_points_below_the_best_weigh_less():
    # W(80) = exp(-3 (1 - 80 / 100)) = exp(-0.6), W(78) = exp(-0.66).
    area = (4 - 1) * (78 * math.exp(-0.66) + 80 * math.exp(-0.6)) / 2
    points = [(4, 78), (1, 80)]  # in any order
    assert accuracy_under_parallelism(points, best=100) == pytest.approx(80 + area)


def test_best_of_all_has_full_weight():
    assert accuracy_under_parallelism([(1, 90), (3, 90)], best=90) == pytest.approx(270)


def test_a_rival_that_is_better_lowers_it():
    points = [(1, 80), (2, 80)]
    assert accuracy_under_parallelism(points, 90) < accuracy_under_parallelism(points, 80)


def test_points_more_than_five_below_the_first_are_dropped():
    kept = [(1, 80), (2, 75)]
    both = accuracy_under_parallelism([*kept, (9, 74.9)], best=80)
    assert both == accuracy_under_parallelism(kept, best=80)
    assert both > accuracy_under_parallelism(kept[:1], best=80)


@pytest.mark.parametrize(
    ("points", "best", "words"),
    [
        ([], 80, "no points"),
        ([(1, 80)], 79, "not between 0 and the best"),
        ([(1, -1)], 79, "not between 0 and the best"),
        ([(0, 50)], 79, "tokens per forward"),
        ([(math.inf, 50)], 79, "tokens per forward"),
        ([(1, 0)], 0, "best accuracy"),
    ],
)
def test_refuses_what_has_no_area(points, best, words):
    with pytest.raises(ConfigError, match=words):
        accuracy_under_parallelism(points, best)
