"""How likely a model finds each of many given replies: one pass over a tree of their beginnings.

Goes in: an engine, a turn, replies. Comes out: a log-probability a reply. Replies are alike ("This
is a cat.", "This is a car."), so their tokens are laid out as trees in which each node is a token
that sees the prompt and the tokens on the way to it; nothing is computed twice. Read next:
`eval_nano.py`, which ranks the names of things by it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.collate import bucket, collate
from vita_jax.data.processor import Turn
from vita_jax.data.prompts import END, STATES
from vita_jax.infer.decode import embed_prompt
from vita_jax.infer.engine import Engine
from vita_jax.models.llm import init_llm_cache
from vita_jax.models.vita import Vita

NODES = 256  # of a tree, unless one reply has more; trees are rows of a batch


class Candidates:
    """Replies to choose from, as trees of tokens."""

    def __init__(self, engine: Engine, texts: list[str], state: str = "text_reply"):
        """Lays the trees out.

        Args:
          engine: the model that is asked.
          texts: replies without state token, all different.
          state: the state token that all begin with.

        Raises:
          ValueError: there are no texts, or one of them twice.
        """
        if not texts or len(set(texts)) < len(texts):
            raise ValueError(f"{len(texts)} replies, {len(set(texts))} of them different")
        self._engine = engine
        (self._end_id,) = engine.tokenizer.encode(END)
        ids = [tuple(engine.tokenizer.encode(STATES[state] + text)) for text in texts]
        self._order = sorted(range(len(ids)), key=ids.__getitem__)  # beginnings side by side
        trees = [_Tree()]
        for sequence in (ids[i] for i in self._order):
            if trees[-1].nodes and len(trees[-1].nodes) + trees[-1].new(sequence) > NODES:
                trees.append(_Tree())
            trees[-1].add(sequence)
        self._width = -(-max(len(tree.nodes) for tree in trees) // 32) * 32
        tokens, parents = np.zeros((2, len(trees), self._width), np.int32)
        sees = np.zeros((*tokens.shape, self._width), bool)
        for row, tree in enumerate(trees):
            for sequence, node in tree.nodes.items():
                tokens[row, node] = sequence[-1]
                parents[row, node] = parent = tree.nodes.get(sequence[:-1], 0)
                sees[row, node] = sees[row, parent]  # parents stand before their children
                sees[row, node, node] = True
        ends = [(row, node) for row, tree in enumerate(trees) for node in tree.ends]
        self._trees = jax.device_put((tokens, parents, sees, *np.array(ends, np.int32).T))

    def log_probabilities(self, turn: Turn) -> np.ndarray:
        """float32[n]: of each text as the whole reply to `turn`, its state token given.

        Raises:
          FileNotFoundError, ValueError: input that cannot be used (see `Processor.prompt`).
        """
        engine = self._engine
        example = engine.processor.prompt(turn.text, turn.images, turn.audio, turn.video)
        batch, length = collate([example]), np.array([len(example.tokens)], np.int32)
        num_slots = bucket(batch.tokens.shape[1], 128) + self._width
        embeddings = embed_prompt(engine.config, engine.params, batch)
        cache = _read(engine.config, num_slots, engine.params, embeddings, length)
        scores = _walk(engine.config, engine.params, cache, *self._trees, self._end_id)
        out = np.empty(len(self._order), np.float32)
        out[self._order] = np.asarray(scores)
        return out


class _Tree:
    """Nodes by the tokens on the way to them, and the nodes at which sequences end."""

    def __init__(self):
        self.nodes, self.ends = {}, []

    def new(self, sequence):
        """How many nodes `sequence` would add."""
        return sum(sequence[: i + 1] not in self.nodes for i in range(len(sequence)))

    def add(self, sequence):
        for i in range(len(sequence)):
            self.nodes.setdefault(sequence[: i + 1], len(self.nodes))
        self.ends.append(self.nodes[sequence])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(config, num_slots, params, embeddings, length):
    """A cache of one row with a prompt in it: dtype[1, T, D], int32[1] `length` of them real."""
    cache = init_llm_cache(config.llm, 1, num_slots)
    t = embeddings.shape[1]
    args = embeddings, jnp.arange(t)[None], cache.causal_mask(t), cache
    _, cache = Vita(config).apply({"params": params}, *args, method=lambda m, *a: m.llm(*a))
    return cache.replace(length=length)


@functools.partial(jax.jit, static_argnums=0)
def _walk(config, params, cache, tokens, parents, sees, tree, node, end_id):
    """float32[n] log-probability of each way down a tree and END behind it, from the root.

    Args:
      config: of the model.
      params: of the model.
      cache: of the prompt, one row, with N free slots.
      tokens: int32[G, N] nodes of G trees.
      parents: int32[G, N].
      sees: bool[G, N, N] the nodes on the way to a node, itself among them.
      tree: int32[n] of each reply.
      node: int32[n] at which it ends.
      end_id: id of END.
    """
    g, n = tokens.shape
    rows = jnp.arange(g)[:, None]
    slot = jnp.arange(cache.k.shape[2]) - cache.length  # whose node is in it; below 0: the prompt
    mask = sees[:, :, jnp.clip(slot, 0, n - 1)] & (slot < n) | (slot < 0)
    positions = cache.length + sees.sum(axis=-1) - 1
    k, v = (jnp.repeat(x, g, axis=1) for x in (cache.k, cache.v))
    cache = cache.replace(k=k, v=v, length=jnp.repeat(cache.length, g))

    def read(model, tokens):
        hidden, _ = model.llm(model.llm.embed(tokens), positions, mask[:, None], cache)
        return model.llm.logits(hidden)

    logits = Vita(config).apply({"params": params}, tokens, method=read)
    total = jax.nn.logsumexp(logits, axis=-1)
    here = logits[rows, parents, tokens] - total[rows, parents]
    here = here.at[:, 0].set(0.0)  # the root, a state token, is given
    ways = jnp.einsum("GNM,GM->GN", sees.astype(jnp.float32), here, precision="highest")
    return (ways + logits[..., end_id] - total)[tree, node]
