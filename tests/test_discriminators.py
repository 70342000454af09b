"""vita_jax/models/discriminators.py: sizes, rows, and the same in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, perturbed, random_params, run, shapes_of, torch_gradients

from vita_jax import params as trees
from vita_jax import peer
from vita_jax.models.discriminators import FFT_SIZES, PERIODS, Discriminators, stft
from vita_jax.models.layers import Drawn

SMALL = Discriminators(4)
SHORTEST = max(FFT_SIZES)


@pytest.fixture(scope="module")
def params():
    return perturbed(random_params(SMALL, jnp.zeros((1, SHORTEST))))


def waveforms(num_rows, num_samples, seed=0):
    rng = np.random.default_rng(seed)
    return 0.3 * rng.standard_normal((num_rows, num_samples), np.float32)


def test_parameter_counts_of_full_size():
    shapes = trees.unflatten(shapes_of(Discriminators(32), jnp.zeros((1, SHORTEST))))
    # Width x inputs x outputs and a bias for each output, layer by layer.
    period = (
        (5 * 1 * 32 + 32) + (5 * 32 * 128 + 128) + (5 * 128 * 512 + 512)
        + (5 * 512 * 1024 + 1024) + (5 * 1024 * 1024 + 1024) + (3 * 1024 * 1 + 1)
    )  # fmt: skip
    scale = (
        (15 * 1 * 128 + 128) + (41 * 32 * 128 + 128) + (41 * 8 * 256 + 256) + (41 * 16 * 512 + 512)
        + (41 * 32 * 1024 + 1024) + (41 * 64 * 1024 + 1024) + (5 * 1024 * 1024 + 1024)
        + (3 * 1024 * 1 + 1)
    )  # fmt: skip
    spectrum = (27 * 2 * 32 + 32) + 3 * (27 * 32 * 32 + 32) + (9 * 32 * 32 + 32) + (9 * 32 * 1 + 1)
    assert (period, scale, spectrum) == (8_218_433, 9_870_209, 94_337)
    expected = {f"period_{p}": period for p in (2, 3, 5, 7, 11)}
    expected |= {f"scale_{s}": scale for s in (1, 2, 4)}
    expected |= {f"stft_{n}": spectrum for n in (512, 1024, 2048)}
    assert {name: trees.count(tree) for name, tree in shapes.items()} == expected


@pytest.mark.parametrize("channels", [0, -4, 6])
def test_width_that_groups_do_not_divide(channels):
    with pytest.raises(ValueError, match=f"channels={channels}: expected a positive multiple of 4"):
        Discriminators(channels)


def test_every_parameter_says_its_axes_and_its_start():
    boxed = jax.eval_shape(lambda: SMALL.init(jax.random.key(0), jnp.zeros((1, SHORTEST))))
    for path, box in trees.flatten(boxed["params"]).items():
        assert isinstance(box, Drawn) and len(box.names) == box.value.ndim, path
        kind = path.rsplit("/", 1)[-1]
        assert (box.mean, box.std > 0) == {"v": (0, True), "g": (1, False), "bias": (0, False)}[
            kind
        ]


def test_rows_are_judged_alone(params):
    a, b, c = waveforms(3, 2401)
    first, second = (run(SMALL, params, np.stack(rows)) for rows in ((a, b), (b, c)))
    assert len(first) == 11
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert x.dtype == jnp.float32 and len(x) == 2
        np.testing.assert_allclose(x[1], y[0], rtol=1e-5, atol=1e-6)
        assert (x[0] != y[0]).any()


def test_start_is_neither_quiet_nor_loud():
    params = random_params(SMALL, jnp.zeros((1, SHORTEST)))
    for judged in run(SMALL, params, waveforms(2, 2401)):
        assert 1e-4 < np.std(judged.scores) < 1


@pytest.mark.parametrize("hop", [256, 240, 1024, 1100])
def test_windows(hop):
    rows = waveforms(2, 5003)
    real, imaginary = stft(rows, 1024, hop)
    window = np.hanning(1025)[:-1]
    for i, start in enumerate(range(0, 5003 - 1024 + 1, hop)):
        expected = np.fft.rfft(rows[:, start : start + 1024] * window)
        np.testing.assert_allclose(real[:, i], expected.real, atol=1e-4)
        np.testing.assert_allclose(imaginary[:, i], expected.imag, atol=1e-4)
    assert real.shape == imaginary.shape == (2, i + 1, 513)


@pytest.mark.peer
@pytest.mark.parametrize("num_samples", [4800, 6931])
def test_peer(params, num_samples):
    import torch

    rows = waveforms(2, num_samples)
    model = peer.discriminators(4)
    peer.load(model, params, peer.discriminator_rules())
    theirs_in = torch.tensor(rows, requires_grad=True)
    theirs = model(theirs_in)

    def ours(params, rows):
        judgements = SMALL.apply({"params": params}, rows)
        total = sum(
            jnp.mean((1 - j.scores) ** 2) + sum(jnp.abs(f).mean() for f in j.features)
            for j in judgements
        )
        return total, judgements

    (total, judgements), (to_params, to_rows) = jax.jit(
        jax.value_and_grad(ours, (0, 1), has_aux=True)
    )(params, rows)
    assert len(judgements) == len(theirs) == 11
    for judged, (scores, features) in zip(judgements, theirs):
        assert_close(as_torch(judged.scores), scores.detach())
        assert len(judged.features) == len(features)
        for a, b in zip(judged.features, features):
            assert_close(as_torch(a), b.detach())

    loss = sum((1 - s).square().mean() + sum(f.abs().mean() for f in fs) for s, fs in theirs)
    loss.backward()
    np.testing.assert_allclose(total, loss.item(), rtol=1e-5)
    assert_close(to_rows, theirs_in.grad)
    expected = torch_gradients(model, peer.discriminator_rules(), params)
    flat = trees.flatten(to_params)
    assert set(expected) == set(flat)
    for path, value in flat.items():
        assert_close(value, expected[path])


def as_torch(x):
    """Our layout in PyTorch's: [B, ..., C] as [B, C, ...], periods behind time."""
    x = np.asarray(x)
    if x.ndim == 4 and x.shape[1] in PERIODS:
        x = x.swapaxes(1, 2)
    return np.moveaxis(x, -1, 1)
