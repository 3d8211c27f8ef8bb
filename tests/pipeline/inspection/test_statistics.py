import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.inspection.statistics import linear_cka, measure_layers
from semroute.pipeline.store.open import open_features


def slow_cka(x, y):
    """The unbiased estimate of Song et al. on centred features, term by term."""
    k, l = (f @ f.T for f in (x - x.mean(0), y - y.mean(0)))  # noqa: E741
    n = len(k)

    def hsic(a, b):
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        ones = np.ones(n)
        pairs = np.trace(a @ b)
        sums = (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        mixed = 2 / (n - 2) * (ones @ a @ b @ ones)
        return (pairs + sums - mixed) / (n * (n - 3))

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


class TestCka:
    @given(st.integers(0, 99), st.integers(5, 40), st.integers(2, 12))
    def test_it_is_what_the_formula_says(self, seed, num, width):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(3, num, width))
        features[1] = features[0] + 0.5 * features[1]
        found = linear_cka(features)
        for one in range(3):
            for other in range(3):
                expected = slow_cka(features[one], features[other])
                assert found[one, other] == pytest.approx(expected, abs=2e-3)

    def test_rotation_scale_and_shift_do_not_matter(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(60, 8))
        rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        assert linear_cka(np.stack([x, 100 * x @ rotation + 3]))[0, 1] == pytest.approx(1, abs=1e-4)

    def test_what_has_nothing_in_common_has_none(self):
        """With so few rows, the biased estimate would be .5."""
        x = np.random.default_rng(0).normal(size=(2, 100, 100))
        assert abs(linear_cka(x)[0, 1]) < 0.1

    def test_too_few_rows_have_no_answer(self):
        assert np.isnan(linear_cka(np.ones((2, 3, 4)))).all()


class TestMeasureLayers:
    def test_norms_and_peaks_are_those_of_the_rows(self, feature_store):
        store = open_features(feature_store)
        found = measure_layers(store, num_rows=10**9, num_similar=50)
        rows = store.read(range(1, len(store))).numpy()
        assert found.num_rows == len(rows)
        assert found.num_captions == len(store) - 1
        norms = np.linalg.norm(rows, axis=2)
        np.testing.assert_allclose(found.norms[:, 1], np.median(norms, 0), rtol=1e-5)
        np.testing.assert_allclose(found.norms[:, 3], norms.max(0), rtol=1e-5)
        peaks = abs(rows).max(2) / np.median(abs(rows), 2)
        np.testing.assert_allclose(found.largest[:, 1], peaks.max(0), rtol=1e-5)
        assert found.massive_rows.tolist() == [0] * 4
        assert found.massive_channels == [[]] * 4
        np.testing.assert_allclose(np.diag(found.cosine), 1, rtol=1e-5)
        np.testing.assert_allclose(np.diag(found.cka), 1, rtol=1e-5)

    def test_a_sample_is_as_large_as_asked(self, feature_store):
        found = measure_layers(open_features(feature_store), num_rows=100)
        assert 100 <= found.num_rows < 200

    def test_massive_activations_are_found_in_their_channel(self, random_store, tmp_path):
        store = open_features(random_store("bf16"))
        real = store.read

        def read(ids):
            rows = real(ids)
            rows.bits[:] = 0x3F80  # 1.0
            rows.bits[0, 2, 5] = 0x4500  # 2048.0
            return rows

        store.read = read
        found = measure_layers(store)
        assert found.massive_channels == [[], [], [5], []]
        assert found.massive_rows[2] == pytest.approx(1 / found.num_rows)
        assert found.top3_energy[2] > 0
