"""vita_jax/models/vita.py against the recorded whole model: embeddings, logits, loss, gradients,
greedy tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, recorded_params, run

from vita_jax import params as trees
from vita_jax import sharding, tables
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN, Batch
from vita_jax.config import (
    AudioConfig,
    DataConfig,
    LlmConfig,
    OptimConfig,
    TrainConfig,
    VisionConfig,
    VitaConfig,
    vita_tiny,
)
from vita_jax.models.attention import conversation_mask
from vita_jax.models.llm import init_llm_cache
from vita_jax.models.vita import Vita, boxed_shapes, init_params, param_shapes
from vita_jax.objectives import read_loss

RULES = (
    tables.below(tables.VISION, "model.vision_tower.vision_tower.", "vision/")
    + tables.below(tables.PROJECTOR, "model.mm_projector.", "vision/")
    + tables.below(tables.AUDIO_ENCODER + tables.AUDIO_ADAPTER, "model.audio_encoder.", "audio/")
    + tables.below(tables.LLM, "", "llm/")
)
PROMPTS = tables.below(tables.AUDIO_PROMPTS, "model.audio_encoder.", "audio/")


def llm(model, *args):
    return model.llm(*args)


def embed(model, tokens):
    return model.llm.embed(tokens)


def logits_of(model, hidden):
    return model.llm.logits(hidden)


def config_of(meta):
    llm, vit, whale = meta["llm"], meta["vit"], meta["whale"]
    return VitaConfig(
        name="recording",
        vision=VisionConfig(
            tile_px=vit["image"],
            patch_px=vit["patch"],
            embed_dim=vit["dim"],
            num_layers=vit["layers"],
            num_heads=vit["heads"],
            mlp_dim=vit["ff"],
            out_dim=llm["dim"],
        ),
        audio=AudioConfig(
            num_mel_bins=whale["mel"],
            embed_dim=whale["dim"],
            num_layers=whale["layers"],
            num_heads=whale["heads"],
            mlp_dim=whale["ff"],
            adapter_dim=2 * whale["dim"],
            out_dim=whale["llm"],
            num_prompts=whale["prompts"],
            adapter_kernel=whale["kernel"],
            chunk_size=whale["chunk_size"],
            left_chunks=whale["left_chunks"],
        ),
        llm=LlmConfig(
            vocab_size=llm["vocab"],
            embed_dim=llm["dim"],
            num_layers=llm["layers"],
            num_heads=llm["heads"],
            num_kv_heads=llm["kv_heads"],
            head_dim=llm["dim"] // llm["heads"],
            mlp_dim=llm["ff"],
            max_positions=32768,
            rope_theta=llm["theta"],
            norm_eps=llm["eps"],
        ),
        speech=None,
        codec=None,
    )


def batch_of(tensors, meta, config):
    """The recorded batch without the dummy tiles and clips of rows that have none; also labels, row
    by row.
    """
    rows = meta["rows"]
    counts = [
        {kind: sum(n for k, n in row if k == kind) for kind in ("img", "aud")} for row in rows
    ]
    ids, labels, num_ids = (
        tensors["in.input_ids"],
        tensors["in.labels"],
        tensors["in.attention_mask"].sum(axis=1),
    )
    tile_at = clip_at = 0
    tokens, targets, tiles, clips = [], [], [], []
    for row, count in enumerate(counts):
        new, mask = [], []
        row_clips = list(range(clip_at, clip_at + count["aud"]))
        clip_at += max(count["aud"], 1)
        clips.append(row_clips)
        tiles.append(list(range(tile_at, tile_at + count["img"])))
        tile_at += max(count["img"], 1)
        for token, label in zip(ids[row, : num_ids[row]], labels[row, : num_ids[row]]):
            if token == IMAGE_TOKEN:
                n = config.vision.embeddings_per_tile
            elif token == AUDIO_TOKEN:
                n = (
                    int(tensors["in.audio_lengths_for_llm"][row_clips.pop(0)])
                    + config.audio.num_prompts
                )
            else:
                n = 1
            new += [int(token)] * n
            mask += [int(label)] * n if n == 1 else [-100] * n
        tokens.append(new)
        targets.append(mask)
        clips[-1] = list(
            range(clip_at - max(count["aud"], 1), clip_at - max(count["aud"], 1) + count["aud"])
        )
    b, t = len(rows), max(map(len, tokens))
    out = np.zeros((b, t), np.int32), np.full((b, t), -100), np.zeros((b, t), np.int32)
    num_tiles, num_clips = max(map(len, tiles)), max(map(len, clips))
    pixels = np.zeros((b, num_tiles, config.vision.tile_px, config.vision.tile_px, 3), np.float32)
    frames = np.zeros((b, num_clips, *tensors["in.audios"].shape[1:]), np.float32)
    frame_mask = np.zeros(frames.shape[:3], bool)
    for row in range(b):
        n = len(tokens[row])
        out[0][row, :n], out[1][row, :n], out[2][row, :n] = tokens[row], targets[row], 1
        for i, tile in enumerate(tiles[row]):
            pixels[row, i] = tensors["in.images"][tile].transpose(1, 2, 0)
        for i, clip in enumerate(clips[row]):
            frames[row, i] = tensors["in.audios"][clip]
            frame_mask[row, i, : tensors["in.audio_lengths"][clip]] = True
    tile_mask = np.arange(num_tiles) < np.array([len(x) for x in tiles])[:, None]
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    batch = Batch(out[0], positions, out[2], out[1] >= 0, pixels, tile_mask, frames, frame_mask)
    return jax.tree.map(jnp.asarray, batch), out[1]


@pytest.fixture(scope="module")
def recording(golden):
    tensors, meta = golden("multimodal_llm")
    config = config_of(meta)
    rules = RULES + (PROMPTS if config.audio.num_prompts else ())
    shapes = trees.flatten(param_shapes(config))
    params = recorded_params(tensors, rules, shapes)
    batch, labels = batch_of(tensors, meta, config)
    return tensors, meta, config, params, batch, labels, tables.assign(rules, shapes)


@pytest.mark.golden
def test_embeddings_and_layers(recording):
    tensors, _, config, params, batch, labels, _ = recording
    real = tensors["out.attention_mask"].astype(bool)
    np.testing.assert_array_equal(np.asarray(batch.segment_ids) > 0, real)
    np.testing.assert_array_equal(labels[real], tensors["out.labels"][real])
    model = Vita(config)
    tiles = run(model, params, batch.tiles, method="encode_tiles")
    flat = np.asarray(tiles)[np.asarray(batch.tile_mask)]
    recorded = tensors["mid.image_features"]
    used = [
        t
        for t in range(len(recorded))
        if any(np.allclose(flat_t, recorded[t], atol=1e-4) for flat_t in flat)
    ]
    assert len(used) == len(flat)  # every real tile; the dummies of the recording are not encoded
    assert_close(flat, recorded[used])
    embeddings = run(model, params, batch, method="embed")
    assert_close(np.asarray(embeddings)[real], tensors["out.inputs_embeds"][real])
    assert_close(np.asarray(embeddings)[real], tensors["mid.hidden0"][real])
    mask = conversation_mask(batch.segment_ids)
    last, _ = run(model, params, embeddings, batch.positions, mask, method=llm)
    assert_close(np.asarray(last)[real], tensors[f"mid.hidden{config.llm.num_layers}"][real])
    for n in range(1, config.llm.num_layers):

        def blocks(model, x, n=n):
            return model.llm.blocks((x, None), jnp.arange(n), batch.positions, mask)[0][0]

        short = dataclasses.replace(config, llm=dataclasses.replace(config.llm, num_layers=n))
        first = jax.tree.map(lambda p, n=n: p[:n], params["llm"]["blocks"])
        cut = params | {"llm": params["llm"] | {"blocks": first}}
        hidden = run(Vita(short), cut, embeddings, method=blocks)
        assert_close(np.asarray(hidden)[real], tensors[f"mid.hidden{n}"][real])


@pytest.mark.golden
def test_audio_embeddings(recording):
    tensors, _, config, params, batch, _, _ = recording
    clips, counts = run(Vita(config), params, batch.audio, batch.audio_mask, method="encode_audio")
    recorded = tensors["mid.audio_features"]
    lengths = np.asarray(tensors["in.audio_lengths"])
    found = 0

    def clip_frames(i, num_frames):
        return tensors["in.audios"][i][:num_frames]

    for row, clip in zip(*np.nonzero(np.asarray(counts))):
        num_frames = int(batch.audio_mask[row, clip].sum())
        (match,) = [
            i
            for i in np.flatnonzero(lengths == num_frames)
            if np.allclose(clip_frames(i, num_frames), batch.audio[row, clip][:num_frames])
        ]
        n = int(counts[row, clip])
        assert n == tensors["in.audio_lengths_for_llm"][match] + config.audio.num_prompts
        assert_close(clips[row, clip, :n], recorded[match, :n])
        found += 1
    assert found == int(batch.audio_mask.any(axis=-1).sum())


@pytest.mark.golden
def test_logits(recording):
    tensors, _, config, params, batch, *_ = recording
    real = tensors["out.attention_mask"].astype(bool)
    logits = run(Vita(config), params, batch)
    assert_close(np.asarray(logits)[real], tensors["out.logits"][real])


def packed(batch):
    """The batch's rows as one."""
    real, clips = batch.segment_ids > 0, batch.audio_mask.any(axis=-1)
    rows = jnp.arange(1, len(real) + 1)[:, None]
    return Batch(
        tokens=batch.tokens[real][None],
        positions=batch.positions[real][None],
        segment_ids=(rows * batch.segment_ids)[real][None],
        loss_mask=batch.loss_mask[real][None],
        tiles=batch.tiles[batch.tile_mask][None],
        tile_mask=batch.tile_mask[batch.tile_mask][None],
        audio=batch.audio[clips][None],
        audio_mask=batch.audio_mask[clips][None],
    )


@pytest.mark.golden
@pytest.mark.parametrize("in_one_row", [False, True])
def test_loss_and_gradients_of_the_loop(recording, in_one_row):
    tensors, _, config, params, batch, labels, slots = recording
    np.testing.assert_array_equal(batch.tokens[labels >= 0], labels[labels >= 0])
    batch = packed(batch) if in_one_row else batch
    stage = TrainConfig(
        model=config,
        trainable=(".*",),
        data=DataConfig(mixture={}, batch_size=1, max_tokens=1),
        optim=OptimConfig(learning_rate=0.0),
        num_steps=1,
        loss_chunk=7,
    )

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        nats, sums = read_loss(stage, Vita(config), params, {}, batch)
        return nats / sums["targets"]

    value, gradients = loss(params)
    assert_close(value[None], tensors["out.loss"], 1e-5)
    published = tables.to_published(trees.flatten(jax.tree.map(np.asarray, gradients)), slots)
    names = [name.removeprefix("out.grad.") for name in tensors if name.startswith("out.grad.")]
    assert names
    for name in names:
        assert_close(published[name], tensors[f"out.grad.{name}"], 1e-3)


@pytest.mark.golden
def test_greedy_tokens_with_cache(recording):
    tensors, meta, config, params, batch, _, _ = recording
    num_tokens = int(tensors["out.attention_mask"][0].sum())
    row = jax.tree.map(lambda x: x[:1], batch)
    embeddings = run(Vita(config), params, row, method="embed")
    model = Vita(config)
    cache = init_llm_cache(config.llm, 1, embeddings.shape[1] + meta["gen"])
    mask = cache.causal_mask(embeddings.shape[1])
    hidden, cache = run(model, params, embeddings, row.positions, mask, cache, method=llm)
    assert_close(
        run(model, params, hidden, method=logits_of)[:, :num_tokens], tensors["out.row0.logits"]
    )
    cache = cache.replace(length=jnp.array([num_tokens]))
    logits, tokens = [run(model, params, hidden[:, num_tokens - 1], method=logits_of)], []
    for _ in range(meta["gen"]):
        tokens.append(int(logits[-1].argmax()))
        x = run(model, params, jnp.array([tokens[-1:]]), method=embed)
        hidden, cache = run(
            model, params, x, cache.length[:, None], cache.causal_mask(1), cache, method=llm
        )
        logits.append(run(model, params, hidden[:, 0], method=logits_of))
    np.testing.assert_array_equal(tokens, tensors["out.row0.greedy_tokens"])
    assert_close(np.concatenate(logits[:-1]), tensors["out.row0.greedy_logits"])


def tiny_batch(config, key, num_text=12):
    """Two rows: a picture of two tiles and a clip, and text alone."""
    frames = 41
    n_audio, n_tile = config.audio.num_embeddings(frames), config.vision.embeddings_per_tile
    row = [5, 6] + [IMAGE_TOKEN] * (2 * n_tile) + [7] + [AUDIO_TOKEN] * n_audio + [8, 9]
    t = len(row) + num_text
    tokens = np.array(
        [row + [10 + i for i in range(num_text)], [3 + i % 50 for i in range(t)]], np.int32
    )
    px = config.vision.tile_px
    return Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.broadcast_to(jnp.arange(t), (2, t)),
        segment_ids=jnp.ones((2, t), jnp.int32),
        loss_mask=jnp.ones((2, t)),
        tiles=jax.random.normal(key, (2, 2, px, px, 3)),
        tile_mask=jnp.array([[True, True], [False, False]]),
        audio=jax.random.normal(key, (2, 1, 48, config.audio.num_mel_bins)),
        audio_mask=jnp.broadcast_to(jnp.arange(48) < jnp.array([[[frames]], [[0]]]), (2, 1, 48)),
    )


def test_absent_modality_is_absent():
    config = vita_tiny()
    params = init_params(config, 0)
    batch = tiny_batch(config, jax.random.key(1))
    both = run(Vita(config), params, batch)
    text_row = jax.tree.map(lambda x: x[1:], batch).replace(
        tiles=None, tile_mask=None, audio=None, audio_mask=None
    )
    assert_close(run(Vita(config), params, text_row), both[1:], 1e-5)


def test_prefill_and_steps_equal_whole_pass():
    config = vita_tiny()
    params = init_params(config, 0)
    batch = tiny_batch(config, jax.random.key(1))
    model = Vita(config)
    whole = run(model, params, batch)
    x = run(model, params, batch, method="embed")
    t, first = x.shape[1], x.shape[1] - 6
    cache = init_llm_cache(config.llm, 2, t)
    pieces = []
    for piece in [(0, first)] + [(i, i + 1) for i in range(first, t)]:
        mask = cache.causal_mask(piece[1] - piece[0])
        hidden, cache = run(
            model,
            params,
            x[:, slice(*piece)],
            batch.positions[:, slice(*piece)],
            mask,
            cache,
            method=llm,
        )
        pieces.append(hidden)
    hidden = jnp.concatenate(pieces, axis=1)
    logits = run(model, params, hidden, method=logits_of)
    assert_close(logits, whole, 1e-5)


def test_packed_conversations_do_not_see_each_other():
    config = vita_tiny()
    params = init_params(config, 0)
    tokens = jax.random.randint(jax.random.key(1), (1, 24), 0, config.llm.vocab_size)
    ones = jnp.ones((1, 24))
    alone = Batch(tokens[:, 10:], jnp.arange(14)[None], jnp.ones((1, 14), jnp.int32), ones[:, 10:])
    segments = jnp.where(jnp.arange(24) < 10, 1, 2)[None]
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(14)])[None]
    packed = run(Vita(config), params, Batch(tokens, positions, segments, ones))
    assert_close(packed[:, 10:], run(Vita(config), params, alone), 1e-5)


def test_bfloat16_computes_in_every_part():
    config = vita_tiny()
    params = init_params(config, 0)
    batch = tiny_batch(config, jax.random.key(1))
    full = run(Vita(config), params, batch)
    half_config = config.with_dtype("bfloat16")
    half = run(Vita(half_config), params, batch)
    embeddings = run(Vita(half_config), params, batch, method="embed")
    assert embeddings.dtype == jnp.bfloat16 and half.dtype == jnp.float32
    assert_close(half, full, 6e-2)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 2)])
def test_mesh_gives_the_same_tokens(shape):
    config = vita_tiny()
    params = init_params(config, 0)
    batch = tiny_batch(config, jax.random.key(1))
    alone = run(Vita(config), params, batch)
    mesh = sharding.make_mesh(shape)
    sharded = jax.device_put(params, sharding.param_shardings(boxed_shapes(config), mesh))
    spread = [
        s
        for s in jax.tree.leaves(sharded)
        if len(s.sharding.device_set) > 1 and not s.is_fully_replicated
    ]
    assert len(spread) > 10
    with jax.set_mesh(mesh), sharding.rules():
        together = jax.jit(lambda p, b: Vita(config).apply({"params": p}, b))(sharded, batch)
    assert_close(together, alone, 1e-5)
    np.testing.assert_array_equal(together.argmax(-1), alone.argmax(-1))


def test_row_without_image_needs_no_dummy():
    config = dataclasses.replace(vita_tiny(), speech=None, codec=None)
    assert "speech" not in param_shapes(config)
