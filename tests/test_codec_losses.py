"""vita_jax/codec_losses.py: mel bins, what each part is, rows, and the same in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, perturbed, random_params, torch_gradients

from vita_jax import params as trees
from vita_jax import peer
from vita_jax.codec_losses import (
    MEL_SCALES,
    discriminator_losses,
    generator_losses,
    log_mel,
    mel_filters,
    mel_loss,
    timbre_loss,
)
from vita_jax.models.discriminators import Discriminators, Judgement

RATE_HZ = 24000
SMALL = Discriminators(4)
GENERATOR = jax.jit(generator_losses, static_argnums=7)


def inputs(num_rows, num_samples, seed=0):
    """Waveforms, losses of quantizers and timbres."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    real = 0.3 * normal(num_rows, num_samples)
    fake = real * 0.5 + 0.1 * normal(num_rows, num_samples)
    return real, fake, normal(num_rows) ** 2, normal(num_rows, 8), normal(num_rows, 8)


def both(params, real, fake, loss, timbre, other):
    """The losses of generator and discriminators, as a training step makes them."""
    judged_real, judged_fake = (SMALL.apply({"params": params}, x) for x in (real, fake))
    made = generator_losses(real, fake, judged_real, judged_fake, loss, timbre, other, RATE_HZ)
    return made, discriminator_losses(judged_real, judged_fake)


@pytest.mark.parametrize(
    "how", [(1024, 80, 24000), (512, 80, 24000), (256, 64, 24000), (400, 40, 16000), (64, 4, 1500)]
)
def test_filters_are_librosas(how):
    from librosa.filters import mel

    n_fft, num_mels, rate = how
    filters = mel_filters(*how)
    assert filters.dtype == np.float32 and filters.max(axis=0).min() > 0
    np.testing.assert_allclose(filters.T, mel(sr=rate, n_fft=n_fft, n_mels=num_mels), atol=1e-8)


def test_the_bin_of_a_tone():
    waveform = np.sin(2 * np.pi * 1000 * np.arange(4800) / RATE_HZ)[None].astype(np.float32)
    for n_fft, hop, num_mels, _ in MEL_SCALES:
        mels = log_mel(waveform, n_fft, hop, num_mels, RATE_HZ)
        assert mels.shape == (1, 4800 // hop, num_mels)
        loudest = np.unique(np.asarray(mels[0]).argmax(axis=1))
        frequencies = mel_filters(n_fft, num_mels, RATE_HZ)[:, loudest].argmax(axis=0)
        assert (np.abs(frequencies - 1000 / RATE_HZ * n_fft) <= 2).all()
    doubled = log_mel(2 * waveform, n_fft, hop, num_mels, RATE_HZ)
    np.testing.assert_allclose(doubled.max(axis=-1) - mels.max(axis=-1), np.log(2), rtol=1e-4)


def test_silence_has_a_finite_loss_and_gradient():
    silent = jnp.zeros((1, 2400))
    noise = inputs(1, 2400)[0]
    of_noise = jax.value_and_grad(lambda x: mel_loss(noise, x, RATE_HZ).sum())
    loss, gradient = jax.jit(of_noise)(silent)
    assert 100 < loss < 1000 and np.isfinite(gradient).all()
    assert not mel_loss(noise, noise, RATE_HZ).any()


def test_timbre():
    a = jnp.array([[1.0, 2.0], [0.0, 3.0], [4.0, 0.0], [0.0, 0.0]])
    b = jnp.array([[2.0, 4.0], [0.0, -1.0], [0.0, 5.0], [1.0, 1.0]])
    np.testing.assert_allclose(timbre_loss(a, b), [0, 2, 1, 1], atol=1e-6)
    to_a, to_b = jax.grad(lambda a, b: timbre_loss(a, b).sum(), (0, 1))(a, b)
    assert np.isfinite(to_a).all() and to_a[2, 1] < 0 and not to_b.any()


def test_parts_by_hand():
    real, fake, loss, timbre, other = inputs(2, 2400)
    score = jnp.array([[0.0, 0.5], [1.0, -1.0]])
    judged_fake = (Judgement(score, (jnp.zeros((2, 3, 1)), jnp.ones((2, 2)))),) * 2
    judged_real = (Judgement(score[::-1], (jnp.full((2, 3, 1), 0.5), -jnp.ones((2, 2)))),) * 2
    made = GENERATOR(real, fake, judged_real, judged_fake, loss, timbre, other, RATE_HZ)
    np.testing.assert_allclose(made["adversarial"], [2 * (1 + 0.25) / 2, 2 * (0 + 4) / 2])
    np.testing.assert_allclose(made["features"], [2 * 2 * (0.5 + 2)] * 2)
    np.testing.assert_allclose(made["quantizer"], 10 * loss, rtol=1e-6)
    np.testing.assert_allclose(made["timbre"], 5 * timbre_loss(timbre, other), rtol=1e-6)
    judged = discriminator_losses(judged_real, judged_fake)
    np.testing.assert_allclose(judged["real"], [2 * (0 + 4) / 2, 2 * (1 + 0.25) / 2])
    np.testing.assert_allclose(judged["fake"], [2 * (0 + 0.25) / 2, 2 * (1 + 1) / 2])

    without = GENERATOR(real, fake, (), (), loss, timbre, other, RATE_HZ)
    assert set(without) == {"mel", "quantizer", "timbre"} and discriminator_losses((), ()) == {}
    for name, part in without.items():
        np.testing.assert_array_equal(part, made[name])


def test_the_first_scale_counts_most():
    real, fake, *_ = inputs(1, 2400)
    parts = [
        weight * jnp.abs(log_mel(real, *how, RATE_HZ) - log_mel(fake, *how, RATE_HZ)).mean()
        for *how, weight in MEL_SCALES
    ]
    np.testing.assert_allclose(mel_loss(real, fake, RATE_HZ), sum(parts)[None], rtol=1e-6)
    assert parts[0] > 10 * sum(parts[1:])


def test_rows_add_up():
    rng = np.random.default_rng(3)
    judged_real, judged_fake = (
        tuple(
            Judgement(rng.random((3, 5, 1)), (rng.random((3, 7, 2, 4)), rng.random((3, 5, 1))))
            for _ in range(2)
        )
        for _ in range(2)
    )
    real, fake, *rest = inputs(3, 2400)
    made = GENERATOR(real, fake, judged_real, judged_fake, *rest, RATE_HZ)
    judged = discriminator_losses(judged_real, judged_fake)
    for row in range(3):
        one = slice(row, row + 1)
        of_real, of_fake = jax.tree.map(lambda x: x[one], (judged_real, judged_fake))  # noqa: B023
        rest_of_row = (x[one] for x in rest)
        alone = GENERATOR(real[one], fake[one], of_real, of_fake, *rest_of_row, RATE_HZ)
        for ours, whole in ((alone, made), (discriminator_losses(of_real, of_fake), judged)):
            assert set(ours) == set(whole)
            for name, part in ours.items():
                assert part.shape == (1,) and whole[name].shape == (3,), name
                np.testing.assert_allclose(part[0], whole[name][row], rtol=1e-5, err_msg=name)


@pytest.mark.peer
def test_peer():
    import torch

    params = perturbed(random_params(SMALL, jnp.zeros((1, 2048))))
    batch = inputs(2, 6000)
    weights = jnp.array([1.0, 3.0])  # of rows, so that one cannot stand for the other

    def generator(fake, timbre):
        real, _, loss, _, other = batch
        made, _ = both(params, real, fake, loss, timbre, other)
        return (weights * sum(made.values())).sum(), made

    def discriminators(params):
        _, judged = both(params, *batch)
        return (weights * sum(judged.values())).sum(), judged

    def gradient(function, *args):
        return jax.jit(jax.grad(function, tuple(range(len(args))), has_aux=True))(*args)

    (to_fake, to_timbre), made = gradient(generator, batch[1], batch[3])
    (to_params,), judged = gradient(discriminators, params)

    model = peer.discriminators(4)
    peer.load(model, params, peer.discriminator_rules())
    real, fake, loss, timbre, other = map(torch.tensor, batch)
    fake.requires_grad_(), timbre.requires_grad_()
    their_real, their_fake = model(real), model(fake)
    their_made = peer.generator_losses(
        real, fake, their_real, their_fake, loss, timbre, other, RATE_HZ
    )
    their_judged = peer.discriminator_losses(their_real, their_fake)
    for ours, theirs in ((made, their_made), (judged, their_judged)):
        assert set(ours) == set(theirs)
        for name, part in ours.items():
            np.testing.assert_allclose(part, theirs[name].detach(), rtol=1e-4, err_msg=name)

    rows = torch.tensor(np.asarray(weights))
    total = (rows * sum(their_made.values())).sum()
    for ours, theirs in zip(
        (to_fake, to_timbre), torch.autograd.grad(total, (fake, timbre), retain_graph=True)
    ):
        assert_close(ours, theirs)
    (rows * sum(their_judged.values())).sum().backward()
    expected = torch_gradients(model, peer.discriminator_rules(), params)
    for path, value in trees.flatten(to_params).items():
        assert_close(value, expected[path])
