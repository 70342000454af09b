"""vita_jax/models/llm.py against a live peer: Qwen2 of transformers, random weights."""

import numpy as np
import pytest
from parity import assert_close, qwen2, run

from vita_jax.config import LlmConfig
from vita_jax.models.llm import Llm, init_llm_cache

CONFIG = LlmConfig(
    vocab_size=211,
    embed_dim=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=80,
    max_positions=512,
)


def from_tokens(model, tokens, *rest):
    hidden, cache = model(model.embed(tokens), *rest)
    return model.logits(hidden), cache


@pytest.fixture(scope="module")
def peer():
    import torch

    model, params, _ = qwen2(CONFIG)

    def logits(tokens, mask, positions):
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
            )
        return out.logits.numpy()

    return params, logits, model


def causal(mask):
    mask = np.asarray(mask, bool)
    return (np.tril(np.ones((mask.shape[1],) * 2, bool)) & mask[:, None])[:, None]


@pytest.mark.peer
@pytest.mark.parametrize("offset", [0, 40])
def test_left_padding_and_explicit_positions(peer, offset):
    params, logits, _ = peer
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 17))
    mask = np.ones((2, 17), np.int64)
    mask[1, :6] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) + offset
    expected = logits(tokens, mask, positions)
    ours, _ = run(Llm(CONFIG), params, tokens, positions, causal(mask), None, method=from_tokens)
    real = mask.astype(bool)
    assert_close(np.asarray(ours)[real], expected[real])


@pytest.mark.peer
def test_cached_steps(peer):
    import torch

    params, _, model = peer
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 9))
    cache, past = init_llm_cache(CONFIG, 2, 24), None
    at = 0
    for size in (5, 1, 1, 2):
        piece = tokens[:, at : at + size]
        with torch.no_grad():
            out = model(torch.tensor(piece), past_key_values=past, use_cache=True)
        past = out.past_key_values
        positions = np.broadcast_to(np.arange(at, at + size), (2, size))
        mask = cache.causal_mask(size)
        ours, cache = run(Llm(CONFIG), params, piece, positions, mask, cache, method=from_tokens)
        assert_close(ours, out.logits.numpy())
        at += size
