"""Joining rankings by place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egemma.fusion import reciprocal_rank_fusion

rankings = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), max_size=4)


def test_scores_are_those_worked_out_by_hand() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "a"]])
    assert [key for key, _ in fused] == ["a", "c", "b"]
    assert dict(fused) == pytest.approx(
        {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62}, abs=1e-15
    )


def test_equal_scores_keep_the_order_of_the_lists() -> None:
    assert [key for key, _ in reciprocal_rank_fusion([["v1", "v2"], ["t1", "t2"]])] == [
        "v1",
        "t1",
        "v2",
        "t2",
    ]
    assert [key for key, _ in reciprocal_rank_fusion([["t1", "t2"], ["v1", "v2"]])] == [
        "t1",
        "v1",
        "t2",
        "v2",
    ]


def test_the_same_places_in_other_lists_tie_exactly() -> None:
    first, second = ["a", "x1", "x2", "x3", "b"], ["x4", "b", "a"]
    scores = dict(reciprocal_rank_fusion([first, second, ["y", "y2", "y3", "b", "y5", "y6", "a"]]))
    swapped = dict(reciprocal_rank_fusion([["y", "y2", "y3", "b", "y5", "y6", "a"], second, first]))
    assert scores == swapped


def test_a_smaller_constant_favours_first_places() -> None:
    lists = [["a", "x", "b"], ["y", "b", "z"], ["w", "b", "a"]]
    assert reciprocal_rank_fusion(lists)[0][0] == "b"
    assert reciprocal_rank_fusion(lists, k=0)[0][0] == "a"


def test_nothing_joined_is_nothing() -> None:
    assert reciprocal_rank_fusion([]) == []
    assert reciprocal_rank_fusion([[], []]) == []


def test_a_ranking_that_names_something_twice_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="twice"):
        reciprocal_rank_fusion([["a", "a"]])


@given(rankings)
def test_one_list_comes_back_in_its_order_and_every_key_once(lists: list[list[int]]) -> None:
    fused = reciprocal_rank_fusion(lists)
    assert sorted(key for key, _ in fused) == sorted(set().union(*lists))
    assert [score for _, score in fused] == sorted((score for _, score in fused), reverse=True)
    if len(lists) == 1:
        assert [key for key, _ in fused] == lists[0]
