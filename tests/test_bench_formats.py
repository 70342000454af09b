"""vita_jax/bench_formats.py: distributions in other number formats, beside float32's."""

import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax import bench_formats, checkpoint
from vita_jax.bench_chat import QUESTIONS
from vita_jax.bench_programs import Work


def test_divergence_of_two_distributions():
    p, q = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), np.array([[0.25, 0.5, 0.25]] * 2)
    kl, same = bench_formats._compare(jnp.log(p), jnp.log(q))
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(axis=1), rtol=1e-5)
    assert same.tolist() == [False, False]
    assert bench_formats._compare(jnp.log(p), jnp.log(p))[1].all()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats") / "tiny"
    checkpoint.initialize("vita_tiny", folder)
    few = QUESTIONS[2:]
    return {
        "preset": bench_formats.formats(Work("vita_tiny", num_tokens=40)),
        "checkpoint": bench_formats.formats(Work(str(folder)), few),
    }


@pytest.mark.parametrize("model", ["preset", "checkpoint"])
def test_each_format_is_near_float32_and_not_the_same(reports, model):
    report = reports[model]
    assert report["n"] == 40 if model == "preset" else report["n"] > 100
    rows = {row["format"]: row for row in report["rows"]}
    assert list(rows) == list(bench_formats.FORMATS)
    for row in rows.values():
        assert 1e-6 < row["kl"] <= row["worst"] < 0.02 and 0.8 < row["same"] <= 1
    assert rows["weights int8"]["kl"] > rows["cache int8"]["kl"]
    assert bench_formats.table(report).row_count == len(rows)
