"""vita_jax/losses.py: next tokens in pieces and whole, targets of packed rows, CTC, state head;
and the loop's losses on batches of the loader.
"""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from parity import assert_close, qwen2

import vita_jax
from vita_jax import feed, objectives, tables
from vita_jax import params as trees
from vita_jax.config import load_config, override
from vita_jax.data import prompts, synthetic
from vita_jax.data.collate import collate
from vita_jax.losses import (
    NO_WORD,
    STATE_WEIGHTS,
    TEMPERATURE,
    WORD_TEMPERATURE,
    ctc_loss,
    ctc_read,
    ctc_targets,
    edit_distance,
    match_pairs,
    next_token_loss,
    next_token_targets,
    of_conversations,
    state_loss,
    state_targets,
    word_logits,
)
from vita_jax.models.vita import Vita, init_params

ROOT = pathlib.Path(vita_jax.__file__).parents[1]

B, T, D, V = 3, 13, 8, 50


def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))
    return hidden, head, targets, (rng.random((B, T)) < 0.7).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_pieces_add_up_to_the_plain_loss(chunk):
    hidden, head, targets, weights = arrays()

    def plain(hidden, head):
        nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return (nats * weights).sum()

    def ours(hidden, head):
        nats, _ = next_token_loss(hidden, lambda x: x @ head, targets, weights, chunk)
        return (nats * weights).sum()

    expected, grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    found, our_grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(our_grads, grads):
        np.testing.assert_allclose(a, b, atol=1e-5)
    nats, right = next_token_loss(hidden, lambda x: x @ head, targets, weights, chunk)
    best = (hidden @ head).argmax(axis=-1)
    np.testing.assert_array_equal(right, (best == targets) & (weights > 0))
    assert not nats[weights == 0].any() and right.dtype == bool


def test_chunks_without_a_target_have_no_logits():
    hidden, head, targets, weights = arrays()
    weights[:, 5:] = 0
    made = []

    def logits_of(x):
        jax.debug.callback(lambda: made.append(x.shape))
        return x @ head

    jax.block_until_ready(next_token_loss(hidden, logits_of, targets, weights, 2))
    jax.effects_barrier()
    needed = -(-int((weights > 0).sum(axis=1).max()) // 2)
    assert len(made) == needed < hidden.shape[1] // 2


def test_whole_logits_are_never_in_memory():
    long, wide = 4096, 2048
    shape = jax.ShapeDtypeStruct((1, long, D), jnp.float32)
    row = jax.ShapeDtypeStruct((1, long), jnp.int32)

    def memory(chunk):
        def loss(hidden, head, targets):
            ones = jnp.ones(targets.shape)
            return next_token_loss(hidden, lambda x: x @ head, targets, ones, chunk)[0].sum()

        wide_head = jax.ShapeDtypeStruct((D, wide), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(shape, wide_head, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(64) < long * wide * 4 / 8 < memory(long)


def test_targets_stay_in_their_conversation():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    mask = np.array([[0, 0, 1, 1, 1, 1]], np.float32)
    targets, weights = next_token_targets(tokens, segments, mask)
    np.testing.assert_array_equal(
        weights, [[0, 1, 0, 1, 0, 0]]
    )  # 8 starts one, so none predicts it
    np.testing.assert_array_equal(targets[weights > 0], [7, 9])


def test_matched_pairs_are_cosines_both_ways():
    rng = np.random.default_rng(0)
    pictures, words = rng.standard_normal((2, 6, D)).astype(np.float32)
    real = np.array([1, 1, 0, 1, 1, 0], bool)
    a, b = pictures[real], words[real] - words[real].mean(axis=0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    scores = a @ b.T / TEMPERATURE
    both = [
        optax.softmax_cross_entropy_with_integer_labels(x, np.arange(4)) for x in (scores, scores.T)
    ]
    nats, right = jax.jit(match_pairs)(pictures, words, real, words[:0])
    np.testing.assert_allclose(nats[real], np.mean(both, axis=0), rtol=1e-4)
    np.testing.assert_array_equal(right[real], scores.argmax(axis=1) == np.arange(4))
    assert not nats[~real].any() and not right[~real].any()


def test_equal_words_are_not_told_apart():
    rng = np.random.default_rng(0)
    words = np.eye(4, D, dtype=np.float32)[[0, 1, 0, 2]]
    real = np.ones(4, bool)
    centred = words - words.mean(axis=0)
    nats, right = match_pairs(centred, words, real, words[:0])
    assert right.all() and nats.max() < 1e-3  # each at one of its own: that is all there is to do
    pictures = rng.standard_normal((4, D)).astype(np.float32)
    nats, right = match_pairs(pictures, words, real, words[:0])
    assert not right.all() and nats.max() > 1


def test_pictures_are_told_from_words_of_no_picture():
    rng = np.random.default_rng(0)
    pictures, words = rng.standard_normal((2, 4, D)).astype(np.float32)
    real = np.array([1, 1, 0, 1], bool)
    others = np.concatenate([words[:1], rng.standard_normal((5, D)).astype(np.float32)])
    told = np.concatenate([words[real], others])
    told -= told.mean(axis=0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures[real], told))
    scores = (a @ b.T / TEMPERATURE).astype(np.float64)
    own = np.pad(np.eye(3, dtype=bool), ((0, 0), (0, 6)))
    own[0, 3] = True  # the first of the others is what the first picture shows
    of_words = np.log(np.exp(scores).sum(axis=1) / (np.exp(scores) * own).sum(axis=1))
    of_pictures = np.log(np.exp(scores).sum(axis=0)[:3] / np.exp(scores).diagonal())
    nats, right = jax.jit(match_pairs)(pictures, words, real, others)
    expected = (of_words + of_pictures) / 2  # of scores up to 50, which float32 knows to 4e-6
    np.testing.assert_allclose(nats[real], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(right[real], own[range(3), scores.argmax(axis=1)])
    assert not nats[~real].any()


def test_pictures_are_matched_with_the_words_of_their_conversation():
    words = ("objective=match",)
    config = load_config(ROOT / "configs" / "stage1_1_vision_alignment.py", words, tiny=True)
    processor = feed.make_processor(config, feed.load_tokenizer(config))
    examples = [processor.sample(sample) for sample in synthetic.samples("captions", 4, 0)]
    alone = collate(examples, 768, 1)
    alone = jax.tree.map(lambda x: np.append(x, np.zeros_like(x[:2]), axis=0), alone)
    batch = jax.tree.map(lambda x: x.reshape(3, -1, *x.shape[2:]), alone)  # two in a row, and none
    batch.segment_ids[:, :768] *= 4  # three without a picture were before it
    batch.segment_ids[:, 768:] *= 6
    model, params = Vita(config.model), init_params(config.model, 0)
    parts = feed.used_parts(config, batch)
    small = {k: v for k, v in trees.flatten(params).items() if k.startswith(parts)}
    loss = functools.partial(objectives.match_loss, config, model, None, frozen={}, batch=batch)
    (nats, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trees.unflatten(small))

    def expected(params):
        tiles = model.apply({"params": params}, alone.tiles[:4], method="encode_tiles")
        table = params["llm"]["embedding"]
        said = [table[x.tokens[x.loss_mask > 0]].mean(axis=0) for x in examples]
        tiles /= jnp.linalg.norm(tiles, axis=-1, keepdims=True)
        pictures = tiles.mean(axis=(1, 2))
        return match_pairs(pictures, jnp.stack(said), jnp.ones(4, bool), table[:0])[0].sum()

    value, their_grads = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(nats, value, rtol=1e-5)
    assert sums["targets"] == sums["replies"] == 4 and sums["wrong"] + sums["exact"] == 4
    for path in ("vision/projector/up", "vision/encoder/patch/kernel"):
        assert_close(trees.flatten(grads)[path], trees.flatten(their_grads)[path], 1e-5)
    without = batch.replace(tiles=None, tile_mask=None)
    with pytest.raises(ValueError, match="no pictures, which objective='match' is about"):
        feed.used_parts(config, without)


def test_four_replies_are_about_the_quarters_of_their_picture():
    words = ("objective=match", "data.max_tokens=768")
    config = load_config(ROOT / "configs" / "stage1_1_vision_alignment.py", words, tiny=True)
    processor = feed.make_processor(config, feed.load_tokenizer(config))
    whole, other = synthetic.samples("captions", 2, 0)
    told = [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}] * 4
    told = [dict(turn) for turn in told]
    told[0]["value"] = "<image>\n"
    for turn, reply in zip(told[1::2], ("cat", "a red dog", "boat", "two keys")):
        turn["value"] = reply
    samples = (whole, dict(other, conversations=told))
    examples = [processor.sample(sample) for sample in samples]
    batch = collate(examples, 1536, 1)
    batch = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)  # in a row
    batch.segment_ids[:, 1536:] *= 2
    model, params = Vita(config.model), init_params(config.model, 0)
    loss = functools.partial(objectives.match_loss, config, model, None, frozen={}, batch=batch)
    (nats, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def expected(params):
        tiles = model.apply({"params": params}, batch.tiles, method="encode_tiles")[0]
        tiles /= jnp.linalg.norm(tiles, axis=-1, keepdims=True)
        edge = math.isqrt(tiles.shape[1])
        grid = tiles[1].reshape(2, edge // 2, 2, edge // 2, -1)
        quarters = grid.mean(axis=(1, 3)).reshape(4, -1)  # as they are read
        table = params["llm"]["embedding"]
        said = [table[examples[0].tokens[examples[0].loss_mask > 0]].mean(axis=0)]
        _, second = examples
        edges = np.flatnonzero(np.diff(second.loss_mask, prepend=0, append=0)).reshape(4, 2)
        said += [table[second.tokens[a:b]].mean(axis=0) for a, b in edges]
        pictures = jnp.concatenate([tiles[:1].mean(axis=1), quarters])
        return match_pairs(pictures, jnp.stack(said), jnp.ones(5, bool), table[:0])[0].sum()

    value, their_grads = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(nats, value, rtol=1e-5)
    assert sums["targets"] == 5
    for path in ("vision/projector/up", "vision/encoder/patch/kernel"):
        assert_close(trees.flatten(grads)[path], trees.flatten(their_grads)[path], 1e-5)


def test_pictures_are_matched_with_captions_from_a_file(tmp_path):
    file = tmp_path / "captions.json"
    words = ("objective=match", f"data.captions={file}")
    config = load_config(ROOT / "configs" / "stage1_1_vision_alignment.py", tiny=True)
    config = override(config, words)
    processor = feed.make_processor(config, feed.load_tokenizer(config))
    samples = list(synthetic.samples("captions", 4, 0))
    replies = [sample["conversations"][1]["value"] for sample in samples]
    file.write_text(json.dumps([replies[0], "A much longer reply than the others are.", "no"]))
    captions = feed.load_captions(config, processor)
    examples = [processor.sample(sample) for sample in samples]
    said = [x.tokens[x.loss_mask > 0] for x in examples]
    np.testing.assert_array_equal(captions[0][captions[0] >= 0], said[0])
    batch = collate(examples, 768, 1)
    model, params = Vita(config.model), init_params(config.model, 0)
    loss = objectives.make_loss(config, captions=captions)
    nats, sums = jax.jit(loss)(params, {}, batch)
    table = np.asarray(params["llm"]["embedding"])
    others = np.stack([table[row[row >= 0]].mean(axis=0) for row in captions])
    tiles = model.apply({"params": params}, batch.tiles, method="encode_tiles")
    pictures = (tiles / jnp.linalg.norm(tiles, axis=-1, keepdims=True)).mean(axis=(1, 2))
    own = np.stack([table[ids].mean(axis=0) for ids in said])
    expected, _ = match_pairs(pictures, own, np.ones(4, bool), others)
    np.testing.assert_allclose(nats, expected.sum(), rtol=1e-5)
    assert sums["targets"] == 4
    for text in ("{}", "[1]", "[]", "no list"):
        file.write_text(text)
        with pytest.raises(ValueError, match="captions.json: expected a JSON list of replies"):
            feed.load_captions(config, processor)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="captions.json: no such file; `vita data build`"):
        feed.load_captions(config, processor)
    with pytest.raises(ValueError, match="only objective='match' has a use for them, not 'ctc'"):
        override(config, ("objective=ctc",))


def ctc_batch(b=4, t=12, v=7, s=4):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((b, t, v)).astype(np.float32)
    labels = rng.integers(1, v, (b, s))
    return logits, np.array([12, 9, 10, 12]), labels, np.array([4, 2, 3, 1])


def test_ctc_sums_over_all_alignments():
    logits, labels = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])), [1, 2]
    p = np.exp(logits)
    total = 0
    for path in itertools.product(range(3), repeat=3):
        read = [k for k, _ in itertools.groupby(path) if k]
        total += (read == labels) * np.prod([p[t, k] for t, k in enumerate(path)])
    found = ctc_loss(logits[None], np.array([3]), np.array([labels]), np.array([2]))
    np.testing.assert_allclose(found, [-np.log(total)], rtol=1e-5)


def test_ctc_does_not_see_padding():
    logits, frames, labels, lengths = ctc_batch()
    found = ctc_loss(logits, frames, labels, lengths)
    for i in range(len(logits)):
        alone = ctc_loss(
            logits[i : i + 1, : frames[i]], frames[i : i + 1],
            labels[i : i + 1, : lengths[i]], lengths[i : i + 1],
        )  # fmt: skip
        np.testing.assert_allclose(alone, found[i : i + 1], rtol=1e-5)


def test_words_are_near_rows_of_the_table():
    rng = np.random.default_rng(0)
    table = 3 * rng.standard_normal((5, 64)).astype(np.float32)
    frames = np.stack([table[[2, 2, 4]], rng.standard_normal((3, 64)).astype(np.float32)])
    logits = np.asarray(word_logits(frames, table))
    assert logits.shape == (2, 3, 6)
    np.testing.assert_allclose(logits[..., 0] * WORD_TEMPERATURE, NO_WORD, rtol=1e-5)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (frames, table)]
    cosines = np.einsum("BTD,VD->BTV", *unit)
    np.testing.assert_allclose(logits[..., 1:] * WORD_TEMPERATURE, cosines, atol=1e-5)
    said = ctc_read(logits, np.array([3, 3]))
    np.testing.assert_array_equal(said, [[3, 5, 0], [0, 0, 0]])  # what is near no word says none


def test_clips_are_aligned_with_words_but_for_their_prompts(tmp_path):
    words = "data.batch_size=2", "data.max_clips=3", "model.audio.num_prompts=2"
    stage = ROOT / "configs" / "stage2_1b_speech_adapter.py"
    samples = synthetic.samples("speech", 4, seed=0)
    for sample, text in zip(samples, ["a", "see", "b b", "1"]):
        sample["conversations"][1]["value"] = text
    stage = load_config(stage, (*words, "objective=align"), tiny=True)
    config, loader = loader_of(stage, tmp_path, samples)
    batch = next(loader)
    model, params = Vita(config.model), trees.flatten(init_params(config.model, 0))
    small = {k: v for k, v in params.items() if k.startswith(feed.used_parts(config, batch))}
    loss = functools.partial(objectives.align_loss, config, model, frozen={}, batch=batch)
    small = trees.unflatten(small)
    (nats, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(small)
    expected = 0
    for row in range(2):
        for clip in range(batch.segment_ids[row].max()):
            frames = batch.audio[row, clip][None, : batch.audio_mask[row, clip].sum()]
            heard = model.apply(
                {"params": small}, frames, np.array([frames.shape[1]]),
                method=lambda m, *x: m.audio(*x),
            )[:, 2:]  # fmt: skip
            said = batch.tokens[row][batch.segment_ids[row] == clip + 1][None]
            lengths = np.array([heard.shape[1]]), np.array([said.shape[1]])
            logits = word_logits(heard, small["llm"]["embedding"])
            expected += ctc_loss(logits, lengths[0], said + 1, lengths[1])[0]
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    assert sums["targets"] == (batch.segment_ids > 0).sum() and sums["replies"] > 2
    grads = {path: np.abs(grad).max() for path, grad in trees.flatten(grads).items()}
    assert not grads["audio/prompts"] and grads["audio/adapter/out"] > 0
    assert grads["audio/encoder/subsampling/conv1"] > 0


def test_ctc_targets_by_clip():
    tokens = np.array([[7, 8, 5, 6, 9, 0], [4, 0, 0, 0, 0, 0]])
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    positions = np.array([[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]])
    labels, lengths = ctc_targets(tokens, positions, segments, 3, 4)
    np.testing.assert_array_equal(lengths, [2, 3, 0, 1, 0, 0])
    np.testing.assert_array_equal(labels[:4], [[8, 9, 0, 0], [6, 7, 10, 0], [0] * 4, [5, 0, 0, 0]])


def test_ctc_read_drops_repetitions_and_blanks():
    best = np.array([[0, 3, 3, 0, 3, 1, 1, 2], [2, 2, 1, 1, 4, 4, 4, 4]])
    units = ctc_read(np.eye(5, dtype=np.float32)[best], np.array([8, 4]))
    np.testing.assert_array_equal(units, [[3, 3, 1, 2, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]])


@pytest.mark.peer
def test_ctc_equals_torch():
    import torch

    logits, frames, labels, lengths = ctc_batch()
    x = torch.tensor(logits, requires_grad=True)
    peer = torch.nn.CTCLoss(reduction="none")(
        x.log_softmax(-1).transpose(0, 1), torch.tensor(labels), torch.tensor(frames),
        torch.tensor(lengths),
    )  # fmt: skip
    peer.sum().backward()
    np.testing.assert_allclose(ctc_loss(logits, frames, labels, lengths), peer.detach(), rtol=1e-5)
    grad = jax.grad(lambda x: ctc_loss(x, frames, labels, lengths).sum())(logits)
    np.testing.assert_allclose(grad, x.grad, atol=1e-5)


@pytest.mark.peer
def test_next_token_loss_equals_torch():
    import torch

    hidden, head, targets, weights = arrays()
    x = torch.tensor(hidden, requires_grad=True)
    labels = torch.where(torch.tensor(weights) > 0, torch.tensor(targets), -100)
    peer = torch.nn.functional.cross_entropy(
        (x @ torch.tensor(head)).reshape(-1, V), labels.reshape(-1)
    )
    peer.backward()

    def ours(hidden):
        nats, _ = next_token_loss(hidden, lambda x: x @ head, targets, weights, 5)
        return (nats * weights).sum() / weights.sum()

    loss, grad = jax.value_and_grad(ours)(hidden)
    np.testing.assert_allclose(loss, peer.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, x.grad, atol=1e-5)


def test_of_conversations():
    segments = np.array([[1, 1, 2, 2, 3, 0], [1, 0, 0, 0, 0, 0]])
    flags = np.array([[0, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]], bool)
    found = of_conversations(flags, segments)
    np.testing.assert_array_equal(found, [[1, 0, 1, 0, 0, 0], [0] * 6])


def slow_distance(a, b):
    """By the recursion as it is written in books."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_edit_distance():
    rng = np.random.default_rng(5)
    found, expected = np.zeros((60, 9), int), np.zeros((60, 7), int)
    for row in range(60):
        for array in (found, expected):
            length = rng.integers(0, array.shape[1] + 1)
            array[row, :length] = rng.integers(1, 4, length)
    by_hand = [slow_distance(a[a > 0], b[b > 0]) for a, b in zip(found, expected)]
    np.testing.assert_array_equal(edit_distance(found, expected), by_hand)
    assert len(set(by_hand)) > 5


STATE_IDS = (7, 8, 9)


def state_batch():
    """Two rows; where replies start and what they answer, written down by hand."""
    tokens = np.random.default_rng(2).integers(20, 40, (2, 12))
    segments = np.array([[1] * 12, [1] * 6 + [2] * 5 + [0]])
    mask = np.zeros((2, 12), np.float32)
    tokens[0, 3], mask[0, 3:6] = 7, 1
    tokens[0, 8], mask[0, 8:11] = 8, 1
    tokens[1, 2], mask[1, 2:5] = 9, 1
    tokens[1, 4] = 8  # within a reply
    tokens[1, 6], mask[1, 6:8] = 8, 1  # no one predicts it: it starts a conversation
    mask[1, 9:11] = 1  # a reply without a state token
    return (tokens, segments, mask), ([0, 0, 1], [2, 7, 1]), [0, 1, 2]


@pytest.mark.peer
def test_state_loss_equals_torch():
    import torch

    arrays, at, classes = state_batch()
    logits = np.random.default_rng(3).standard_normal((2, 12, 3)).astype(np.float32)
    x = torch.tensor(logits, requires_grad=True)
    peer = torch.nn.CrossEntropyLoss(weight=torch.tensor(STATE_WEIGHTS))(
        x[at], torch.tensor(classes)
    )
    peer.backward()

    targets = state_targets(*arrays, STATE_IDS)
    number = next_token_targets(*arrays)[1].sum()
    nats, right, replies = state_loss(logits, targets)
    np.testing.assert_allclose(nats / number, peer.item(), rtol=1e-5)
    grad = jax.grad(lambda x: state_loss(x, targets)[0] / number)(logits)
    np.testing.assert_allclose(grad, x.grad, atol=1e-6)
    assert (right, replies) == ((logits[at].argmax(-1) == classes).sum(), 3)
    rows = [state_loss(logits[row : row + 1], targets[row : row + 1]) for row in (0, 1)]
    np.testing.assert_allclose(np.sum(rows, axis=0), (nats, right, replies), rtol=1e-6)


def test_no_reply_no_state_loss():
    tokens = np.ones((1, 4), int)
    targets = state_targets(tokens, tokens, 0.0 * tokens, STATE_IDS)
    assert [float(x) for x in state_loss(np.ones((1, 4, 3)), targets)] == [0, 0, 0]


def loader_of(config, folder, samples):
    """The stage's loader of these samples, written to files."""
    for sample in samples:
        for i, (waveform, rate_hz) in enumerate(sample.get("audio", [])):
            (folder / "audio").mkdir(exist_ok=True)
            sample["audio"][i] = f"{sample['id']} {i}.wav"
            soundfile.write(folder / "audio" / sample["audio"][i], waveform, rate_hz)
    (folder / "samples.json").write_text(json.dumps(samples))
    words = f'data.mixture={{"{folder}": 1}}', "data.num_shards=1", "data.held_out=[]"
    config = override(config, words)
    return config, feed.make_loaders(config, feed.load_tokenizer(config), folder)[0]


def labels_of(ids, tokenizer):
    """What transformers predicts: each reply, found by what stands before it; -100 elsewhere."""
    opening, labels, inside = tokenizer.encode(prompts.ASSISTANT), [], False
    for i, token in enumerate(ids):
        inside = inside or ids[i - len(opening) : i] == opening
        labels.append(token if inside else -100)
        inside = inside and token != tokenizer.eos_id
    return labels


@pytest.mark.peer
def test_loop_loss_of_packed_rows_equals_transformers(tmp_path):
    import torch

    words = "data.batch_size=2", "data.max_tokens=1700", "loss_chunk=100"
    stage = load_config(ROOT / "configs" / "stage0_text.py", words, tiny=True)
    samples = synthetic.samples("text", 9, seed=0)
    for a, b in zip(samples[:4], samples[4:]):  # some of two turns, and of different lengths
        a["conversations"] += b["conversations"]
    samples[5]["end_tag"] = False
    config, loader = loader_of(stage, tmp_path, samples)
    batch, tokenizer = next(loader), feed.load_tokenizer(stage)
    assert batch.segment_ids.max() >= 3
    talks = [
        row[segments == k].tolist()
        for row, segments in zip(batch.tokens, batch.segment_ids)
        for k in range(1, segments.max() + 1)
    ]
    length = max(map(len, talks))
    padded = lambda rows, value: torch.tensor([r + [value] * (length - len(r)) for r in rows])  # noqa: E731
    labels = padded([labels_of(ids, tokenizer) for ids in talks], -100)
    model, params, slots = qwen2(stage.model.llm)
    peer = model(
        input_ids=padded(talks, 0),
        attention_mask=padded([[1] * len(ids) for ids in talks], 0),
        labels=labels,
    )
    peer.loss.backward()

    def loss(params):
        nats, sums = objectives.read_loss(config, Vita(config.model), params, {}, batch)
        return nats / sums["targets"], sums["targets"]

    (value, number), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))({"llm": params})
    assert number == (labels[:, 1:] >= 0).sum().item()
    np.testing.assert_allclose(value, peer.loss.item(), rtol=1e-5)
    grads = tables.to_published(trees.flatten(jax.tree.map(np.asarray, grads["llm"])), slots)
    for name, parameter in model.named_parameters():
        assert_close(grads[name], parameter.grad, 1e-5)


@pytest.mark.peer
def test_loop_loss_of_clips_equals_torch(tmp_path):
    import torch

    words = "data.batch_size=2", "data.max_tokens=40", "data.max_clips=3"
    stage = load_config(ROOT / "configs" / "stage2_1a_speech_encoder.py", words, tiny=True)
    samples = synthetic.samples("speech", 7, seed=0)
    said = ["a", "look", "see me", "ooo", "yes, so", "b b", "1 + 1"]
    for i, (sample, text) in enumerate(zip(samples, said)):
        sample["conversations"][1]["value"] = text
        waveform, rate_hz = sample["audio"][0]
        sample["audio"] = [(waveform[800 * i :], rate_hz)]
    config, loader = loader_of(stage, tmp_path, samples)
    batch, tokenizer = next(loader), feed.load_tokenizer(stage)
    model, params = Vita(config.model), init_params(config.model, 0)
    params = {"audio": params["audio"]}
    loss = functools.partial(objectives.hear_loss, config, model, frozen={}, batch=batch)
    (nats, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    # The peer takes the encoder's frames from us, everything behind them is its own.
    clips, num_frames = batch.audio.reshape(-1, *batch.audio.shape[2:]), batch.audio_mask.sum(-1)
    frames = model.apply(
        {"params": params},
        clips,
        num_frames.reshape(-1),
        method=lambda m, *x: m.audio.encoder(*x)[0],
    )
    head, bias = (torch.tensor(params["audio"][k], requires_grad=True) for k in ("ctc", "ctc_bias"))
    log_p = (torch.tensor(np.asarray(frames)) @ head + bias).log_softmax(-1)
    total, heard = 0, []
    for row in range(2):
        for clip in range(batch.segment_ids[row].max()):
            words = tokenizer.decode(batch.tokens[row][batch.segment_ids[row] == clip + 1])
            heard.append(words)
            units = torch.tensor([[token + 1 for token in tokenizer.encode(words)]])
            length = config.model.audio.encoder_frames(num_frames[row, clip])
            total = total + torch.nn.functional.ctc_loss(
                log_p[3 * row + clip][:length, None], units, [length], [units.shape[1]],
                reduction="sum",
            )  # fmt: skip
    total.backward()
    assert set(heard) <= set(said) and len(heard) > 3 and not batch.audio_mask.all()
    assert sums["targets"] == sum(map(len, heard))
    np.testing.assert_allclose(nats, total.item(), rtol=1e-5)
    assert_close(grads["audio"]["ctc"], head.grad, 1e-5)
    assert_close(grads["audio"]["ctc_bias"], bias.grad, 1e-5)
