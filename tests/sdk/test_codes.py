"""Codes lose no more than their steps say, in every layout; cosines are those of float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from egemma.index.codes import (
    FINE,
    MAX_CODE,
    Layout,
    check_vectors,
    cosines,
    decode,
    encode,
    squares,
)
from egemma_core.errors import InputError
from egemma_core.vectors import normalize

LAYOUTS = [
    ((768, 512, 256, 128), 128),
    ((768, 512, 256, 128), 768),
    ((64, 32, 16), 32),
    ((16,), 16),
    ((9, 7, 3), 7),
    ((5, 1), 1),
    ((3, 2), 3),
]


def step_errors(vectors: NDArray[np.float32], layout: Layout) -> NDArray[np.float64]:
    """(N, D) the largest rounding that a channel can suffer: half a step of its segment, worked out
    from the definition alone.
    """
    bounds = np.empty(vectors.shape)
    start = 0
    for stop in (layout.head, *layout.edges):
        steps = MAX_CODE * (FINE if start == 0 else 1)
        bounds[:, start:stop] = (
            np.abs(vectors[:, start:stop]).max(axis=1, keepdims=True).astype(np.float64) / steps / 2
        )
        start = stop
    return bounds


@pytest.mark.parametrize(("dims", "head"), LAYOUTS)
def test_no_channel_loses_more_than_half_a_step_of_its_segment(
    dims: tuple[int, ...], head: int
) -> None:
    layout = Layout.of(dims, head)
    # channels of very different sizes, as models have them
    sizes = np.random.default_rng(0).lognormal(sigma=2, size=dims[0])
    vectors = normalize(
        (np.random.default_rng(1).normal(size=(200, dims[0])) * sizes).astype(np.float32)
    )
    heads, scales, rests = encode(vectors, layout)
    assert (heads.dtype, scales.dtype, rests.dtype) == (np.int8, np.float32, np.uint8)
    assert (heads.shape, scales.shape, rests.shape) == (
        (200, head),
        (200, layout.scales),
        (200, layout.rest_bytes),
    )
    stored = decode(heads, scales, rests, layout)
    assert stored.dtype == np.float64
    bounds = step_errors(vectors, layout)
    # float32 arithmetic at the edge of a step
    assert (np.abs(stored - vectors) <= bounds * 1.001 + 1e-12).all()
    # and it does round: the bound is not an idle one
    assert np.abs(stored - vectors).max() > bounds.min() / 4


@pytest.mark.parametrize(
    ("dims", "head", "rest_bytes", "scales"),
    [
        ((768, 512, 256, 128), 128, 64 + 640, 4),
        ((768, 512, 256, 128), 768, 384, 1),
        ((9, 7, 3), 7, 4 + 2, 2),
        ((5, 1), 1, 1 + 4, 2),
    ],
)
def test_a_vector_takes_the_bytes_of_its_layout(
    dims: tuple[int, ...], head: int, rest_bytes: int, scales: int
) -> None:
    layout = Layout.of(dims, head)
    assert (layout.dim, layout.rest_bytes, layout.scales) == (dims[0], rest_bytes, scales)


def test_codes_of_a_vector_worked_out_by_hand() -> None:
    layout = Layout.of((5, 3), 3)
    # Head: scale 0.5 / 127, so 0.5 is 127 and -0.25 is -63.5 = -64 + 8/16; 0.1 is 25.4, in
    # sixteenths 406.4 -> 406 = 16 * 25 + 6. Rest: scale 0.8 / 127, so -0.8 is -127 and 0.2 is 31.75
    # -> 32.
    heads, scales, rests = encode(np.array([[0.5, -0.25, 0.1, -0.8, 0.2]], np.float32), layout)
    # -63.5 is -63 and 8 sixteenths below: the remainder is -8 to 7
    assert heads.tolist() == [[127, -63, 25]]
    np.testing.assert_allclose(scales, [[0.5 / 127, 0.8 / 127]], rtol=1e-6)
    assert rests.tolist() == [[(0 + 8) | (-8 + 8) << 4, (6 + 8) | 8 << 4, 256 - 127, 32]]
    np.testing.assert_allclose(
        decode(heads, scales, rests, layout),
        [[0.5, -0.25, 406 / 16 * 0.5 / 127, -0.8, 32 * 0.8 / 127]],
        rtol=1e-6,
    )


def test_a_segment_of_zeros_comes_back_as_zeros() -> None:
    layout = Layout.of((6, 4, 2), 2)
    for zeros in (slice(0, 2), slice(2, 4), slice(4, 6)):
        vector = np.full((1, 6), 0.5, np.float32)
        vector[:, zeros] = 0
        with np.errstate(all="raise"):
            stored = decode(*encode(vector, layout), layout)
        np.testing.assert_allclose(stored, vector, rtol=1e-6)
        assert (stored[:, zeros] == 0).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-37, 1e-40, 1e-43, 1e-45])
def test_channels_too_small_for_a_float32_scale_come_back_as_nearly_nothing(size: float) -> None:
    layout = Layout.of((4, 2), 2)
    vector = np.array([[size, 0, 1, 0], [-size, size / 2, 1, 0]], np.float32)
    heads, scales, rests = encode(vector, layout)
    assert np.abs(heads.astype(int)).max() <= MAX_CODE
    np.testing.assert_allclose(decode(heads, scales, rests, layout), vector, atol=2e-37, rtol=1e-6)


@given(st.data())
def test_what_is_coded_comes_back_in_any_layout_and_coding_it_again_changes_no_code(
    data: st.DataObject,
) -> None:
    dims = tuple(
        sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)), reverse=True)
    )
    layout = Layout.of(dims, data.draw(st.sampled_from(dims)))
    rows = data.draw(
        st.lists(
            st.lists(st.floats(-1, 1, width=32), min_size=dims[0], max_size=dims[0]),
            min_size=1,
            max_size=4,
        )
    )
    vectors = np.array(rows, np.float32)
    # Beside a channel of ordinary size, denormal ones have no float32 scale of full precision; no
    # model gives a whole segment of them.
    vectors[np.abs(vectors) < 1e-30] = 0
    heads, scales, rests = encode(vectors, layout)
    stored = decode(heads, scales, rests, layout)
    assert (np.abs(stored - vectors) <= step_errors(vectors, layout) * 1.001).all()
    assert np.abs(heads.astype(int)).max(initial=0) <= MAX_CODE
    again = encode(stored.astype(np.float32), layout)
    np.testing.assert_array_equal(again[0], heads)
    np.testing.assert_array_equal(again[2], rests)
    np.testing.assert_allclose(again[1], scales, rtol=3e-7)


def test_squares_are_exact_where_int8_and_int16_sums_would_overflow() -> None:
    codes = np.full((2, 16_384), -127, np.int8)
    codes[1, 0] = 126
    assert squares(codes).tolist() == [127 * 127 * 16_384, 127 * 127 * 16_383 + 126 * 126]


@given(st.integers(1, 200), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_cosines_are_those_of_numpy_and_do_not_depend_on_the_rows_beside(
    dim: int, count: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    query = generator.normal(size=dim)
    query /= np.linalg.norm(query)
    wide = generator.normal(size=(count, dim + 5)) * 10.0 ** generator.integers(
        -6, 6, size=(count, 1)
    )
    wide[count // 2] = wide[0]
    stored = wide[:, :dim]  # a prefix, as it is passed
    found = cosines(query, stored)
    np.testing.assert_allclose(found, stored @ query / np.linalg.norm(stored, axis=1), atol=1e-12)
    assert found[count // 2] == found[0]
    for row in range(count):
        assert cosines(query, stored[row : row + 1])[0] == found[row]


def test_a_row_without_a_direction_scores_0_and_none_scores_above_1() -> None:
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(1000, 48))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = np.concatenate([cosines(row, row[None] * 3.7) for row in rows])
    assert scores.max() <= 1.0
    assert scores.min() > 1 - 1e-12
    assert cosines(rows[0], np.zeros((2, 48))).tolist() == [0.0, 0.0]


UNIT = np.full((2, 16), 0.25, np.float32)


@pytest.mark.parametrize(
    "vectors",
    [
        UNIT,
        UNIT.astype(np.float64),
        UNIT.astype(np.float16),
        UNIT.tolist(),
        np.asfortranarray(UNIT),
        UNIT.astype(">f4"),
        UNIT * np.float32(1.0004),
        np.empty((0, 16), np.float32),
    ],
)
def test_unit_vectors_of_any_float_type_are_taken_as_float32(vectors: Any) -> None:
    checked = check_vectors(vectors, 16)
    assert checked.dtype == np.float32
    assert checked.dtype.isnative
    np.testing.assert_allclose(checked, np.asarray(vectors, np.float32).reshape(-1, 16))


def changed(value: float) -> NDArray[np.float32]:
    vectors = UNIT.copy()
    vectors[1, 3] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (changed(np.nan), "vector 1 has length nan"),
        (changed(np.inf), "vector 1 has length inf"),
        (changed(-np.inf), "vector 1"),
        (changed(1e38), "vector 1"),
        (changed(0.3), "vector 1 has length 1.014"),
        (UNIT * np.float32(0.99), "vector 0 has length 0.99"),
        (np.r_[UNIT[:1], np.zeros((1, 16), np.float32)], "vector 1 has length 0"),
        (UNIT.astype(np.float64) * 1e300, "vector 0"),
        (UNIT[0], r"shape \(16,\)"),
        (UNIT[:, :15], r"shape \(2, 15\)"),
        (UNIT[None], r"shape \(1, 2, 16\)"),
        (UNIT.T, r"shape \(16, 2\)"),
        (np.ones((2, 16), np.int8), "type int8"),
        (UNIT.astype(bool), "type bool"),
        (UNIT.astype(complex), "type complex"),
        (UNIT.astype(object), "type object"),
        (UNIT.astype(str), "type <U"),
        ("vectors", "shape"),
        (None, "shape"),
        (7, "shape"),
        ([[0.5] * 16, [0.5] * 15], "rows of floats"),
        ([], "shape"),
    ],
)
def test_what_is_no_unit_vector_of_floats_is_refused_with_its_row(vectors: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_vectors(vectors, 16)
