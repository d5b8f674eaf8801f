import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oft_diffusion.evaluation import intervals
from oft_diffusion.evaluation.intervals import difference_interval, mean_interval, ratio_interval


@given(values=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
@settings(max_examples=10)
def test_an_interval_holds_its_mean_and_stays_within_zero_and_one(values):
    i = mean_interval(values)
    assert 0 <= i.low <= i.mean <= i.high <= 1
    assert i.mean == pytest.approx(np.mean(values))
    assert i.pictures == len(values)
    assert i.low < i.high, "no finite sample is sure"


def test_about_ninety_five_of_a_hundred_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3):
        held = 0
        for _ in range(100):
            i = mean_interval((rng.random(150) < share).astype(float).tolist())
            held += i.low <= share <= i.high
        assert held >= 90


def test_what_never_happened_in_24_pictures_may_still_happen():
    assert mean_interval([0.0] * 24).high == pytest.approx(0.138, abs=0.002)  # Wilson's bound
    unchanged = mean_interval([0.25] * 30)
    assert unchanged.low == pytest.approx(0.15)
    assert unchanged.high == pytest.approx(0.35)


def test_more_pictures_give_narrower_intervals():
    values = (np.random.default_rng(1).random(400) < 0.5).astype(float)
    few, many = mean_interval(values[:40].tolist()), mean_interval(values.tolist())
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_pictures_of_one_subject_count_as_one_subject():
    values = [0.0] * 200 + [1.0] * 200  # two subjects, one all wrong and one all right, two runs each
    groups = [("ab"[i // 200], i // 100 % 2) for i in range(400)]
    nested, plain = mean_interval(values, groups), mean_interval(values)
    assert (nested.low, nested.high) == (0.0, 1.0)
    assert plain.high - plain.low < 0.15


def test_a_difference_may_go_either_way_where_nothing_was_lost_or_won():
    level = difference_interval([1.0, 0.0] * 3, [1.0, 0.0] * 3)
    assert level.low == -level.high < -0.3
    won = difference_interval([1.0] * 6, [1.0] * 5 + [0.0])
    assert won.mean == pytest.approx(1 / 6)
    assert won.low < -0.1, "that none of six was lost does not mean that none can be"
    many = difference_interval([1.0] * 600, ([1.0] * 5 + [0.0]) * 100)
    assert many.low > 0.1
    quarters = difference_interval([0.25] * 6, [0.5] * 6)
    assert (quarters.low, quarters.mean, quarters.high) == (-0.75, -0.25, 0.25)


@given(pairs=st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 2), min_size=1, max_size=40))
@settings(max_examples=10)
def test_a_difference_holds_its_mean_and_stays_between_minus_one_and_one(pairs):
    above, below = zip(*pairs, strict=True)
    i, mirrored = difference_interval(above, below), difference_interval(below, above)
    assert -1 <= i.low <= i.mean <= i.high <= 1
    assert i.low < i.high
    assert i.mean == pytest.approx(np.mean(above) - np.mean(below))
    assert mirrored.mean == -i.mean


def test_a_ratio_of_paired_shares():
    above, below = [1.0, 1.0, 0.0, 0.0] * 25, [1.0, 1.0, 1.0, 1.0] * 25
    i = ratio_interval(above, below)
    assert i.mean == 0.5
    assert 0.38 < i.low < 0.5 < i.high < 0.62
    alike = ratio_interval([1.0, 0.0] * 50, [1.0, 0.0] * 50)  # a hundred pairs prove no equality
    assert (alike.low, alike.mean, alike.high) == (0.97, 1.0, 1.03)
    with pytest.raises(ValueError, match="denominator"):
        ratio_interval([1.0], [0.0])


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="at least one"):
        difference_interval([], [])
