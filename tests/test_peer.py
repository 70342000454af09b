"""vita_jax/peer.py: the codec and the speech decoder in PyTorch give our numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import assert_close, packed, perturbed, random_params, torch_gradients

from vita_jax import params as trees
from vita_jax import peer, tables
from vita_jax.batch import TEXT_TOKEN
from vita_jax.config import OptimConfig, vita_tiny
from vita_jax.losses import next_token_targets
from vita_jax.models.codec import Codec
from vita_jax.models.speech import Speech

CODEC, SPEECH = vita_tiny().codec, vita_tiny().speech
RULES = tables.codec_rules(CODEC)


@pytest.fixture(scope="module")
def codec():
    """The waveform, our parameters and the peer with them."""
    rng = np.random.default_rng(0)
    waveform = 0.3 * rng.standard_normal((2, 4800), np.float32)
    params = perturbed(random_params(Codec(CODEC), waveform))
    model = peer.codec(CODEC)
    peer.load(model, params, RULES)
    return waveform, params, model


@pytest.mark.peer
def test_codec(codec):
    import torch

    waveform, params, model = codec
    direction = np.random.default_rng(1).standard_normal(waveform.shape, np.float32)

    def ours(params):
        fake, latents = Codec(CODEC).apply({"params": params}, waveform)
        total = (fake * direction).sum() + latents.loss.mean() + latents.timbre.sum()
        return total, (fake, latents)

    (_, (fake, latents)), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    model.eval()
    their_fake, their_timbre, their_loss = model(torch.tensor(waveform))
    assert_close(fake, their_fake.detach())
    assert_close(latents.timbre, their_timbre.detach())
    np.testing.assert_allclose(latents.loss.mean(), their_loss.detach().mean(), rtol=1e-4)
    assert_close(model.timbre(torch.tensor(waveform)).detach(), their_timbre.detach(), 1e-6)

    model.zero_grad()
    total = (their_fake * torch.tensor(direction)).sum() + their_loss.mean() + their_timbre.sum()
    total.backward()
    expected = torch_gradients(model, RULES, params)
    ours_only = {path for path in trees.flatten(gradients) if path not in expected}
    assert {path.rsplit("/", 1)[-1] for path in ours_only} == {
        "unused", "unused_bias", "running_mean", "running_var"
    }  # fmt: skip
    for path, value in expected.items():
        assert_close(trees.flatten(gradients)[path], value)


@pytest.mark.peer
def test_loss_of_quantizers_is_each_rows_own(codec):
    import torch

    waveform, _, model = codec
    model.eval()
    together = model(torch.tensor(waveform))[2]
    for row in range(2):
        alone = model(torch.tensor(waveform[row : row + 1]))[2]
        np.testing.assert_allclose(alone[0].item(), together[row].item(), rtol=1e-5)
    assert abs(together[0] - together[1]) > 1e-4


@pytest.mark.peer
def test_training_codec_normalises_with_the_batch(codec):
    import torch

    waveform, params, model = codec
    norm = trees.flatten(params)
    before = {"scale": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - 1e-5}
    plain = norm | {
        f"encoder/timbre/norm/{k}": jnp.full(CODEC.global_dim, v) for k, v in before.items()
    }
    x = jax.jit(lambda p: Codec(CODEC).apply({"params": p}, waveform, method="encode")[2].timbre)(
        trees.unflatten(plain)
    )
    scale, shift = (norm[f"encoder/timbre/norm/{k}"] for k in ("scale", "bias"))
    expected = (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-5) * scale + shift
    model.train()
    assert_close(model.timbre(torch.tensor(waveform)).detach(), expected)


def touch(model, *args):
    return model.logits(model(*args))


@pytest.mark.peer
def test_speech():
    import torch

    rng = np.random.default_rng(0)
    text = rng.standard_normal((2, 8, SPEECH.embed_dim), np.float32)
    num_pieces, num_codes = np.array([8, 5]), np.array([7, 12])
    codes = rng.integers(0, SPEECH.num_codes, (2, 12))
    codes[np.arange(12) >= num_codes[:, None]] = SPEECH.pad_id
    args = packed(SPEECH, text, num_pieces, codes, num_codes, padded=True)
    params = perturbed(random_params(Speech(SPEECH), *args, method=touch))
    model = peer.speech(SPEECH)
    peer.load(model, params, tables.SPEECH)
    tokens, ids = args[2], args[4]
    is_target = (tokens != TEXT_TOKEN) & (tokens != SPEECH.bos_id) & (tokens != SPEECH.sos_id)
    targets, weights = next_token_targets(tokens, ids, is_target)

    def ours(params):
        logits = Speech(SPEECH).apply({"params": params}, *args, method=touch)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return (nats * weights).sum(), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    text_mask = torch.tensor(np.arange(8) < num_pieces[:, None])
    theirs = model(torch.tensor(text), text_mask, torch.tensor(codes))
    for row, number in enumerate(num_codes):
        ours_of_row = np.asarray(logits)[0][np.asarray((weights > 0) & (ids == row + 1))[0]]
        assert_close(ours_of_row, theirs[row, : number + 1].detach())
    their_loss = peer.speech_loss(theirs, torch.tensor(codes), torch.tensor(num_codes), SPEECH)
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    their_loss.backward()
    expected = torch_gradients(model, tables.SPEECH, params)
    for path, value in trees.flatten(gradients).items():
        assert_close(value, expected[path])


@pytest.mark.peer
def test_steps_learn():
    import torch

    torch.manual_seed(0)
    optim = OptimConfig(learning_rate=2e-3)
    config = dataclasses.replace(CODEC, resblock_kernels=(3,), resblock_dilations=((1,),))
    parts = peer.codec(config), peer.discriminators(4)
    optimizers = [peer.adamw(part, optim) for part in parts]
    waveform, other = 0.3 * torch.randn(2, 4800), 0.3 * torch.randn(2, 4800)
    given = waveform, other, 24000, 1000.0
    losses = [peer.codec_step(*parts, optimizers, *given) for _ in range(6)]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    alone = peer.codec_step(parts[0], None, optimizers[:1], *given)
    assert alone < losses[0]

    model = peer.speech(SPEECH)
    text, codes = torch.randn(2, 8, SPEECH.embed_dim), torch.randint(0, SPEECH.num_codes, (2, 12))
    given = text, torch.ones(2, 8, dtype=torch.bool), codes, torch.tensor([12, 12]), SPEECH, 1.0
    optimizer = peer.adamw(model, optim)
    losses = [peer.speech_step(model, optimizer, *given) for _ in range(6)]
    assert losses[-1] < losses[0]
