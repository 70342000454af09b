"""The engine's programs in PyTorch: what `vita bench decode --peer` and its like race against.

Goes in: sizes, our parameters, and what the program is given. Comes out: a function to time, which
does the same work as a call of ours, and one that says what came of it. Greedy, on the CPU, without
gradients. PyTorch is of the extra `convert`; nothing but tests and `bench_programs.py` comes here.
"""

from __future__ import annotations

import os

import jax
import numpy as np

from vita_jax import params as trees
from vita_jax import peer, tables


def decode(config, params, ids, first, num_tokens, num_rows, compiled):
    """transformers' Qwen2 writes `num_tokens`, from int `first` on, in each of `num_rows` rows that
    hold int32[T] `ids`. What came of it: keys float32[B, num_tokens, K, H] of the last layer.
    """
    torch = _torch()
    c, length = config.llm, len(ids)
    model, slots = _qwen2(config, params), _Slots(c, num_rows, length + num_tokens)
    at = torch.arange(length + num_tokens)

    def run(tokens, places):
        slots.at = places
        mask = {"full_attention": (at <= places[:, None])[None, None]}
        positions = places[None].expand(num_rows, -1)
        return model.model(tokens, mask, positions, slots).last_hidden_state

    def step(token, place):
        return model.lm_head(run(token[:, None], place)[:, 0]).argmax(dim=-1)

    tokens = torch.tensor(np.array(ids), dtype=torch.long).expand(num_rows, -1)
    start, places = torch.full((num_rows,), first), at[length:].split(1)
    with torch.no_grad():
        run(tokens, at[:length])
    step = _compiled(step) if compiled else step

    def call():
        token = start
        with torch.no_grad():
            for place in places:
                token = step(token, place)

    return call, lambda: slots.k[-1][:, :, length:].transpose(1, 2).float().numpy()


def prefill(config, params, embeddings, compiled):
    """transformers' Qwen2 reads float32[1, T, D] at once, keys and values kept. What came of it:
    float32[D] after the last one.
    """
    torch = _torch()
    model, last = _qwen2(config, params), []
    x = torch.tensor(np.asarray(embeddings, np.float32)).to(model.dtype)
    run = model.model

    def read(x):
        return run(inputs_embeds=x, use_cache=True).last_hidden_state[0, -1]

    read = _compiled(read) if compiled else read

    def call():
        with torch.no_grad():
            last[:] = [read(x)]

    return call, lambda: last[0].float().numpy()


def speech(config, params, text, num_codes, num_rows, compiled):
    """The speech decoders read int32[T] `text`, a row at a time, then draw `num_codes` in each of
    the rows; EOS and what is no code are never drawn. What came of it: keys float32[B, num_codes,
    N, H] of the last layer.
    """
    torch = _torch()
    c = config.speech
    model = peer.speech(c).eval()
    peer.load(model, _arrays(params["speech"]), tables.SPEECH)
    dtype = getattr(torch, c.dtype)
    model = model.to(dtype)
    table = torch.tensor(np.asarray(params["llm"]["embedding"], np.float32)).to(dtype)
    ids = torch.tensor(np.array(text), dtype=torch.long)
    start = 1 + len(text) * config.speech_frames_per_token
    at = torch.arange(start + num_codes)
    shape = num_rows, c.num_heads, len(at), c.head_dim
    caches = [[torch.zeros(shape, dtype=dtype) for _ in "kv"] for _ in range(c.num_layers)]

    def begin(ids, *row):
        x = model.run(model.layers_pre_nn, table[ids].reshape(1, -1, c.embed_dim), None)
        x = torch.cat([model.embedding.weight[c.bos_id].expand(1, 1, -1), x], dim=1)
        caches = list(zip(row[::2], row[1::2]))
        model.run(model.layers, x, (at < start)[None, None, None], caches, at[:start])

    def step(code, place):
        x = model.embedding(code)[:, None]
        x = model.run(model.layers, x, (at <= place)[None, None, None], caches, place)
        return model.out_fnn(model.norm(x))[:, 0, : c.num_codes].argmax(dim=-1)

    if compiled:
        begin, step = _compiled(begin), _compiled(step)
    rows = [[x[row : row + 1] for pair in caches for x in pair] for row in range(num_rows)]
    first, places = torch.full((num_rows,), c.sos_id), at[start:].split(1)

    def call():
        code = first
        with torch.no_grad():
            for row in rows:
                begin(ids, *row)
            for place in places:
                code = step(code, place)

    return call, lambda: caches[-1][0][:, :, start:].transpose(1, 2).float().numpy()


def codec(config, params, codes, global_tokens, compiled):
    """The codec's decoder makes a waveform of int32[B, S] `codes` in the voice int32[G], its weight
    norm folded, as ours is. What came of it: float32[B, W].
    """
    torch = _torch()
    from torch import nn
    from torch.nn.utils import parametrize

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            whole = peer.codec(config.codec)
            self.generator, self.quantizer = whole.generator, whole.quantizer

        def forward(self, codes, global_tokens):
            words = self.quantizer.quantizer_modules[0].embedding(codes).transpose(1, 2)
            pairs = zip(self.quantizer.quantizer_modules_globaltokens, global_tokens)
            timbre = torch.cat([piece.embedding(token) for piece, token in pairs])
            return self.generator(words, timbre[None])

    model = Decoder().eval()
    held = {name: params["codec"][name] for name in ("decoder", "codebooks")}
    peer.load(model, _unfolded(_arrays(held)), tables.codec_rules(config.codec, ("decoder",)))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    given = [torch.tensor(np.array(x), dtype=torch.long) for x in (codes, global_tokens)]
    run, last = _compiled(model) if compiled else model, []

    def call():
        with torch.no_grad():
            last[:] = [run(*given)]

    return call, lambda: last[0].numpy()


class _Slots:
    """Stands for transformers' cache: a fixed number of places, written at those of `at`."""

    def __init__(self, config, num_rows, num_slots):
        import torch

        shape = num_rows, config.num_kv_heads, num_slots, config.head_dim
        dtype = getattr(torch, config.dtype)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)] for _ in "kv"
        )
        self.at = None

    def update(self, k, v, layer, *_, **__):
        """What the layer has seen, with what is new."""
        return (
            self.k[layer].index_copy_(2, self.at, k),
            self.v[layer].index_copy_(2, self.at, v),
        )


def _torch():
    """PyTorch, told how many threads it may use."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    return torch


def _compiled(function):
    """By Inductor, with the weights laid out once for all (`freezing`)."""
    import torch

    return torch.compile(function, dynamic=False, options={"freezing": True})


def _qwen2(config, params):
    import torch

    c = config.llm
    model = peer.qwen2(c).eval()
    held = {name: x for name, x in params["llm"].items() if not name.startswith("state")}
    peer.load(model, _arrays(held), tables.LLM)
    return model.to(getattr(torch, c.dtype))


def _arrays(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _unfolded(params):
    """The tree with every {kernel} as the {g, v} of a weight norm that changes nothing."""
    flat = {}
    for path, x in trees.flatten(params).items():
        if path.endswith("/kernel"):
            path = path.removesuffix("kernel")
            flat |= {path + "v": x, path + "g": np.sqrt((x**2).sum(axis=(0, 1)))}
        else:
            flat[path] = x
    return trees.unflatten(flat)
