"""vita_jax/models/codec.py: the recorded codec, and what padding and folding must not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from parity import assert_close, recorded_params, shapes_of

from vita_jax import params as trees
from vita_jax import tables
from vita_jax.config import CodecConfig, vita_7b
from vita_jax.models.codec import BatchNorm, Codec, fold_weight_norm, quantize

SMALL = CodecConfig(
    upsample_rates=(4, 3),
    upsample_kernels=(8, 5),
    channels=16,
    encoder_channels=4,
    code_dim=16,
    num_codes=32,
    global_dim=8,
    num_global_tokens=2,
    global_conv=(8, 4, 8),
    global_tokens=(3, 1),
    resblock_kernels=(3, 5),
    resblock_dilations=((1, 3), (1,)),
)


def recorded_codec(golden, part):
    """(tensors, metadata, config, parameters of the codebooks and of `part`) of a recording."""
    tensors, meta = golden(f"ticodec_{part}")
    h = meta["h"]
    config = CodecConfig(
        upsample_rates=tuple(h["upsample_rates"]),
        upsample_kernels=tuple(h["upsample_kernel_sizes"]),
        channels=h["upsample_initial_channel"],
        encoder_channels=meta["enc_base"],
        code_dim=meta["code_dim"],
        num_codes=h["n_codes"],
        global_dim=meta["global_dim"],
        num_global_tokens=h["global_code_num"],
        global_conv=tuple(h["global_feature_conv"][:3]),
        global_tokens=(0,) * h["global_code_num"],
        resblock_kernels=tuple(h["resblock_kernel_sizes"]),
        resblock_dilations=tuple(map(tuple, h["resblock_dilation_sizes"])),
        codebook_loss_weight=h["codebook_loss_lambda"],
        commitment_loss_weight=h["commitment_loss_lambda"],
    )
    rules = tables.codec_rules(config, (part,))
    return tensors, meta, config, recorded_params(tensors, rules, shapes_of_part(config, part))


def shapes_of_part(config, part):
    """{path: shape} of the codebooks and of "decoder" or "encoder", which alone is called."""
    if part == "encoder":
        waveform = jnp.zeros((1, config.samples_per_token))
        return shapes_of(Codec(config), waveform, method="encode")
    global_tokens = jnp.zeros((1, config.num_global_tokens), int)
    return shapes_of(Codec(config), jnp.zeros((1, 1), int), global_tokens, method="decode")


def random_codec(config, seed=0):
    """Random parameters, none of them trivial."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        x = rng.normal(size=shape).astype(np.float32)
        if path.endswith(("/g", "scale", "running_var")):
            return 1 + 0.1 * np.abs(x)
        return x if "codebooks" in path else x / np.sqrt(np.prod(shape[:-1]) + 10)

    shapes = shapes_of_part(config, "decoder") | shapes_of_part(config, "encoder")
    return trees.unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def random_tokens(config, shape, seed=0):
    return np.random.default_rng(seed).integers(config.num_codes, size=shape, dtype=np.int32)


def run(config, params, method, *args):
    return jax.jit(lambda p, *a: Codec(config).apply({"params": p}, *a, method=method))(
        params, *args
    )


def channel_first(x):
    return np.asarray(x).swapaxes(1, 2)


def test_parameter_counts_of_the_release():
    codec = Codec(vita_7b().codec)
    shapes = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((1, 600)))["params"]
    shapes = nn.unbox(shapes)
    expected = {"decoder": 15_369_857, "encoder": 47_332_032, "codebooks": 655_360}
    assert {part: trees.count(tree) for part, tree in shapes.items()} == expected
    folded = jax.eval_shape(fold_weight_norm, shapes)
    assert {part: trees.count(tree) for part, tree in folded.items()} == expected
    assert shapes["codebooks"]["code"].shape == (1024, 512)
    assert shapes["codebooks"]["global"].shape == (8, 1024, 16)


@pytest.mark.golden
def test_decoder(golden):
    tensors, _, config, params = recorded_codec(golden, "decoder")
    codes, global_tokens = tensors["in.tokens"][..., 0], tensors["in.global_tokens"][:, 0]
    codes, global_tokens = codes.astype(np.int32), global_tokens.astype(np.int32)
    words = run(config, params, lambda m, x: m.codebooks.codewords(x), codes)
    timbre = run(config, params, lambda m, x: m.codebooks.timbre(x), global_tokens)
    assert_close(channel_first(words), tensors["mid.code_embedding"])
    assert_close(timbre, tensors["mid.global_embedding"])

    x = run(config, params, lambda m, x: m.decoder.conv_pre(x), words)
    assert_close(channel_first(x), tensors["mid.conv_pre"])
    x = run(config, params, lambda m, x: m.decoder.ups[0](nn.leaky_relu(x, 0.1)), x)
    assert_close(channel_first(x), tensors["mid.up0"])
    x = run(config, params, lambda m, x: m.decoder.resblocks[0](x), x)
    assert_close(channel_first(x), tensors["mid.resblock0"])

    for name, theirs in (("conv_pre", "conv_pre"), ("ups_0", "up0")):
        kernel = fold_weight_norm(params)["decoder"][name]["kernel"]
        expected = tensors[f"mid.{theirs}_weight_folded"]
        assert_close(np.asarray(kernel).T.swapaxes(1, 2)[: len(expected)].swapaxes(1, 2), expected)

    waveform = run(config, params, "decode", codes, global_tokens)
    np.testing.assert_allclose(waveform, tensors["out.waveform"][:, 0], rtol=0, atol=1e-4)


@pytest.mark.golden
def test_encoder(golden):
    tensors, _, config, params = recorded_codec(golden, "encoder")
    codes, global_tokens, latents = run(config, params, "encode", tensors["in.waveform"])
    assert_close(channel_first(latents.encoded), tensors["mid.encoder_out"])
    assert_close(latents.timbre, tensors["mid.global_features"])
    np.testing.assert_array_equal(codes, tensors["out.tokens"][..., 0])
    np.testing.assert_array_equal(global_tokens, tensors["out.global_tokens"][:, 0])
    assert_close(channel_first(latents.quantized), tensors["out.quantized"])
    assert_close(latents.quantized_timbre, tensors["out.global_quantized"])
    assert_close(latents.loss.mean()[None], tensors["out.quantizer_loss"])


@pytest.mark.golden
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_weights_go_back_unchanged(golden, part):
    tensors, _, config, params = recorded_codec(golden, part)
    flat = jax.tree.map(np.asarray, trees.flatten(params))
    back = tables.to_published(flat, tables.assign(tables.codec_rules(config, (part,)), flat))
    weights = {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
    assert set(weights) - set(back) <= {n for n in weights if n.endswith("num_batches_tracked")}
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_folded_equals_unfolded():
    params = random_codec(SMALL)
    codes, global_tokens = random_tokens(SMALL, (2, 5)), random_tokens(SMALL, (2, 2))
    waveform = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
    folded, config = fold_weight_norm(params), dataclasses.replace(SMALL, weight_norm=False)
    assert_close(
        run(config, folded, "decode", codes, global_tokens),
        run(SMALL, params, "decode", codes, global_tokens),
        1e-5,
    )
    encoded, unfolded = (
        run(*how, "encode", waveform)[2] for how in ((config, folded), (SMALL, params))
    )
    assert_close(encoded.encoded, unfolded.encoded, 1e-5)
    assert_close(encoded.timbre, unfolded.timbre, 1e-5)
    shapes = shapes_of(Codec(config), jnp.zeros((1, SMALL.samples_per_token)))
    assert {path: leaf.shape for path, leaf in trees.flatten(folded).items()} == {
        path: leaf.shape for path, leaf in shapes.items()
    }


# Kernel and rate differ by even numbers, by an odd one, by two of them.
@pytest.mark.parametrize("kernels", [(8, 5), (7, 5), (7, 6)])
def test_padding_changes_nothing(kernels):
    config = dataclasses.replace(SMALL, upsample_kernels=kernels)
    params = random_codec(config)
    codes, global_tokens = random_tokens(config, (3, 9)), random_tokens(config, (3, 2))
    num_tokens = np.array([9, 1, 6], np.int32)
    padded = run(config, params, "decode", codes, global_tokens, num_tokens)
    for row, length in enumerate(num_tokens):
        one = slice(row, row + 1)
        alone = run(config, params, "decode", codes[one, :length], global_tokens[one])
        for rate, kernel in zip(config.upsample_rates, kernels):
            length = length * rate + (kernel - rate) % 2
        assert alone.shape == (1, length)
        np.testing.assert_allclose(padded[row, :length], alone[0], atol=1e-6)
        assert not padded[row, length:].any()


@pytest.mark.parametrize("kernels", [(8, 5), (7, 5), (7, 6)])
def test_clips_of_different_lengths(kernels):
    config = dataclasses.replace(SMALL, upsample_kernels=kernels, encoder_channels=16)
    config = dataclasses.replace(config, global_dim=32, global_conv=(32, 4, 8), code_dim=64)
    params = random_codec(config)
    waveform = np.random.default_rng(1).normal(size=(3, 108)).astype(np.float32)
    num_samples = np.array([108, 36, 72], np.int32)
    codes, global_tokens, latents = run(config, params, "encode", waveform, num_samples)
    np.testing.assert_allclose(
        run(config, params, "timbre", waveform, num_samples), latents.timbre, atol=1e-6
    )
    for row, length in enumerate(num_samples):
        one = slice(row, row + 1)
        alone = run(config, params, "encode", waveform[one, :length])
        size = alone[0].shape[1]
        np.testing.assert_array_equal(codes[one, :size], alone[0])
        np.testing.assert_array_equal(global_tokens[one], alone[1])
        assert_close(latents.encoded[one, :size], alone[2].encoded, 1e-5)
        assert_close(latents.timbre[one], alone[2].timbre, 1e-5)


def test_timbre_alone():
    params, waveform = random_codec(SMALL), np.random.default_rng(1).normal(size=(2, 48))
    waveform = waveform.astype(np.float32)
    _, global_tokens, latents = run(SMALL, params, "encode", waveform)
    timbre = run(SMALL, params, "timbre", waveform)
    np.testing.assert_allclose(timbre, latents.timbre, atol=1e-6)
    np.testing.assert_array_equal(run(SMALL, params, "global_tokens", timbre), global_tokens)
    assert set(np.unique(global_tokens)) != {0}


def batch_norm_twice(statistics):
    """Outputs and running statistics of BatchNorm for two batches in one `apply`."""
    rng = np.random.default_rng(0)
    batches = rng.normal(2.0, 3.0, size=(2, 5, 4)).astype(np.float32)
    apply = lambda norm: [norm(x) for x in batches]  # noqa: E731
    outputs, new = nn.apply(apply, BatchNorm(), mutable=["batch_stats"])({"params": statistics})
    return batches, outputs, new["batch_stats"]


def test_batch_norm_takes_the_batch_when_training():
    statistics = {"scale": [1, 2, 3, 4], "bias": [0, 1, 2, 3], "running_mean": [1.0] * 4}
    statistics = {k: np.array(v, np.float32) for k, v in statistics.items()}
    statistics["running_var"] = np.full(4, 2.0, np.float32)
    batches, outputs, new = batch_norm_twice(statistics)
    mean, var = statistics["running_mean"], statistics["running_var"]
    for x, y in zip(batches, outputs):
        expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        assert_close(y, expected * statistics["scale"] + statistics["bias"], 1e-5)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
    assert new.keys() == {"running_mean", "running_var"}
    assert_close(new["running_mean"], mean, 1e-6)
    assert_close(new["running_var"], var, 1e-6)
    fixed = BatchNorm().apply({"params": statistics}, batches[0])
    assert_close(fixed, (batches[0] - 1) / np.sqrt(2 + 1e-5) * [1, 2, 3, 4] + [0, 1, 2, 3], 1e-5)


def test_new_statistics_lie_where_the_parameters_do():
    params, waveform = random_codec(SMALL), np.random.default_rng(1).normal(size=(3, 48))
    waveform = waveform.astype(np.float32)
    both = lambda codec, x: (codec(x), codec.timbre(x[:, ::-1]))  # noqa: E731
    train = jax.jit(
        lambda p: Codec(SMALL).apply({"params": p}, waveform, method=both, mutable=["batch_stats"])
    )
    new = trees.flatten(train(params)[1]["batch_stats"])
    assert set(new) == {f"encoder/timbre/norm/running_{name}" for name in ("mean", "var")}
    flat = trees.flatten(params)
    assert all(new[path].shape == flat[path].shape for path in new)
    assert all(np.abs(new[path] - flat[path]).max() > 1e-3 for path in new)


@pytest.mark.peer
def test_batch_norm_of_torch():
    import torch

    size = np.ones(4, np.float32)
    statistics = {"scale": size, "bias": 0 * size, "running_mean": 0 * size, "running_var": size}
    batches, outputs, new = batch_norm_twice(statistics)
    norm = torch.nn.BatchNorm1d(4)
    for x, y in zip(batches, outputs):
        assert_close(y, norm(torch.tensor(x)).detach(), 1e-5)
    assert_close(new["running_mean"], norm.running_mean, 1e-6)
    assert_close(new["running_var"], norm.running_var, 1e-6)


def test_first_weights_are_heard():
    config = dataclasses.replace(SMALL, resblock_kernels=(3,), resblock_dilations=((1,),))
    codes, global_tokens = random_tokens(config, (1, 100)), np.array([config.global_tokens])
    init = jax.jit(lambda key: Codec(config).init(key, codes, global_tokens, method="decode"))
    params = nn.unbox(init(jax.random.key(0)))["params"]
    waveform = run(config, params, "decode", codes, global_tokens)
    assert waveform.shape == (1, 100 * config.samples_per_token)
    assert 0.01 < np.std(waveform) < 0.5


def test_quantizer_passes_gradients_straight_through():
    config = SMALL
    x, codebook = jnp.array([[0.9, 0.2], [0.1, 0.8]]), jnp.eye(2)
    indices, nearest, loss = quantize(x, codebook, config)
    np.testing.assert_array_equal(indices, [0, 1])
    np.testing.assert_allclose(nearest, codebook, atol=1e-6)
    error = np.mean((np.asarray(x) - np.eye(2)) ** 2, axis=1)
    weights = config.codebook_loss_weight, config.commitment_loss_weight
    np.testing.assert_allclose(loss, sum(weights) * error, rtol=1e-6)

    direction = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    to_x, to_codebook = jax.grad(
        lambda x, c: jnp.sum(direction * quantize(x, c, config)[1]), argnums=(0, 1)
    )(x, codebook)
    np.testing.assert_array_equal(to_x, direction)
    assert not to_codebook.any()
    to_x, to_codebook = jax.grad(lambda x, c: quantize(x, c, config)[2].mean(), argnums=(0, 1))(
        x, codebook
    )
    np.testing.assert_allclose(to_x, weights[1] * 2 * (x - codebook) / 4, rtol=1e-5)
    np.testing.assert_allclose(to_codebook, weights[0] * 2 * (codebook - x) / 4, rtol=1e-5)


def test_gradients_reach_the_encoder():
    params = random_codec(SMALL)
    waveform = np.random.default_rng(1).normal(size=(2, 48)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        reconstruction, _ = Codec(SMALL).apply({"params": params}, waveform)
        assert reconstruction.shape == waveform.shape
        return jnp.mean((reconstruction - waveform) ** 2)

    gradients = trees.flatten(gradient(params))
    assert all(np.isfinite(g).all() for g in gradients.values())
    for path in ("encoder/conv_pre/v", "encoder/timbre/out", "decoder/conv_post/g"):
        assert gradients[path].any(), path
    assert not gradients["codebooks/code"].any()
