import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from semroute.trainer.studies.statistics import (
    COMPARISON_SCHEMA,
    compare_arms,
    count_bias,
    counting,
    holm,
    over_captions,
    over_seeds,
)


def results(right, cfg_scale=3.0, split="test", skill="total", arms=("uniform", "depth")):
    """Results of right [A, S, C], one image per caption; two objects asked, 2 or 3 found."""
    rows = []
    for arm, seed, caption in itertools.product(*map(range, right.shape)):
        good = bool(right[arm, seed, caption])
        rows.append(
            {
                "arm": arms[arm],
                "seed": seed,
                "cfg_scale": cfg_scale,
                "caption": caption,
                "image": 0,
                "split": split,
                "skill": skill,
                "right": good,
                "num_asked": 2,
                "num_found": 2 if good else 3,
            }
        )
    return pa.Table.from_pylist(rows)


AGAINST = {"depth": "uniform", "uniform": "uniform"}


def row(comparison, arm, **where):
    found = [
        each
        for each in comparison.to_pylist()
        if each["arm"] == arm and all(each[key] == value for key, value in where.items())
    ]
    assert len(found) == 1
    return found[0]


class TestCompareArms:
    def test_means_are_over_seeds_of_means_over_captions(self):
        right = np.random.default_rng(0).random((2, 3, 40)) < [[[0.5]], [[0.8]]]
        comparison = compare_arms(results(right), AGAINST)
        assert comparison.schema == COMPARISON_SCHEMA
        for number, arm in enumerate(("uniform", "depth")):
            found = row(comparison, arm)
            assert found["seeds"] == pytest.approx(right[number].mean(1).tolist())
            assert found["accuracy"] == pytest.approx(right[number].mean())
            assert found["num_captions"] == 40

    def test_differences_are_paired_by_seed(self):
        """Seeds that differ much, and arms that differ alike in each: a narrow interval."""
        right = np.zeros((2, 4, 100), bool)
        for seed, share in enumerate((10, 30, 50, 70)):
            right[0, seed, :share] = True
            right[1, seed, : share + 8 + seed % 2] = True
        found = row(compare_arms(results(right), AGAINST), "depth")
        assert found["difference"] == pytest.approx(0.085)
        assert 0.07 < found["seeds_low"] < 0.085 < found["seeds_high"] < 0.1
        assert found["low"] < 0.1
        assert found["high"] > 0.7

    def test_the_reference_has_no_difference_and_one_seed_no_interval(self):
        right = np.random.default_rng(0).random((2, 1, 40)) < 0.5
        comparison = compare_arms(results(right), AGAINST)
        assert row(comparison, "uniform")["difference"] is None
        found = row(comparison, "depth")
        assert found["low"] is found["seeds_low"] is None
        assert found["captions_low"] <= found["difference"] <= found["captions_high"]

    def test_guidance_splits_and_skills_are_apart(self):
        right = np.random.default_rng(0).random((2, 2, 20)) < 0.5
        table = pa.concat_tables(
            [results(right), results(~right, cfg_scale=1.0, split="held-out", skill="all")]
        )
        comparison = compare_arms(table, AGAINST)
        first = row(comparison, "depth", cfg_scale=3.0, split="test", skill="total")
        other = row(comparison, "depth", cfg_scale=1.0, split="held-out", skill="all")
        assert first["accuracy"] == pytest.approx(1 - other["accuracy"])
        assert comparison.num_rows == 4

    def test_equal_arms_are_found_different_in_about_one_of_twenty(self):
        rng = np.random.default_rng(1)
        wrong = 0
        for _ in range(300):
            right = rng.random((2, 5, 30)) < 0.5
            found = row(compare_arms(results(right), AGAINST), "depth")
            wrong += not found["seeds_low"] <= 0 <= found["seeds_high"]
        assert 4 <= wrong <= 27


class TestHolm:
    def test_is_the_procedure_of_the_paper(self):
        # Limits 0.05 / 4, / 3, / 2, / 1 in order of size.
        assert holm([0.03, 0.012, 0.2, 0.016]) == [False, True, False, True]
        assert holm([0.04, 0.013, 0.013, 0.013]) == [False] * 4  # the first one fails
        assert holm([]) == []
        assert holm([0.05]) == [False]

    @given(st.lists(st.floats(0, 1), max_size=12))
    def test_is_between_bonferroni_and_none(self, values):
        for value, stands in zip(values, holm(values), strict=True):
            assert stands >= (value < 0.05 / len(values))
            assert stands <= (value < 0.05)

    def test_differences_that_stand_are_marked(self):
        rng = np.random.default_rng(0)
        right = np.zeros((2, 5, 100), bool)
        for seed in range(5):
            right[0, seed, : 30 + seed] = True
            right[1, seed, : 50 + seed + seed % 2] = True
        equal = rng.random((2, 5, 100)) < 0.5
        table = pa.concat_tables([results(right), results(equal, skill="all")])
        comparison = compare_arms(table, AGAINST)
        found = row(comparison, "depth", skill="total")
        assert found["p"] == pytest.approx(ttest_1samp([20, 21, 20, 21, 20], 0).pvalue)
        assert found["stands"] is True
        assert row(comparison, "depth", skill="all")["stands"] is False
        assert row(comparison, "uniform", skill="all")["p"] is None

    def test_equal_differences_are_not_tested(self):
        """Three seeds that differ by one caption each say nothing about a fourth."""
        right = np.zeros((2, 3, 100), bool)
        right[1, :, 0] = True
        found = row(compare_arms(results(right), AGAINST), "depth")
        assert (found["seeds_low"], found["p"], found["stands"]) == (
            pytest.approx(0.01),
            None,
            None,
        )

    def test_two_seeds_are_not_tested(self):
        right = np.random.default_rng(0).random((2, 2, 40)) < [[[0.1]], [[0.9]]]
        found = row(compare_arms(results(right), AGAINST), "depth")
        assert found["seeds_low"] is not None
        assert found["p"] is found["stands"] is None


class TestIntervals:
    def test_over_seeds_is_students(self):
        low, high = over_seeds(np.array([1.0, 2.0, 3.0]))
        assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))

    def test_over_captions_has_the_width_of_a_mean(self):
        values = np.random.default_rng(0).normal(1, 2, 400)
        low, high = over_captions(values)
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.12)


def test_counting_gives_the_number_of_generated_objects():
    right = np.zeros((2, 1, 4), bool)
    right[1] = True
    table = counting(results(right)).to_pylist()
    assert [(each["arm"], each["num_asked"], each["num_found"]) for each in table] == [
        ("depth", 2, 2.0),
        ("uniform", 2, 3.0),
    ]


def test_count_bias_is_in_objects_with_the_seed_as_its_unit():
    right = np.zeros((2, 3, 10), bool)
    right[0] = True  # of depth, every one is an object too many
    right[1, :, :5] = [[True], [False], [False]]
    table = count_bias(results(right)).to_pylist()
    found = {each["arm"]: each for each in table}
    assert found["uniform"]["objects"] == found["uniform"]["low"] == 0
    assert found["depth"]["objects"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["depth"]["low"] < found["depth"]["objects"] < found["depth"]["high"]
    alone = count_bias(results(right[:, :1])).to_pylist()
    assert {each["low"] for each in alone} == {None}
