"""Speed, measured beside a peer or a limit in the same run.

Goes in: a `TrainConfig`. Comes out: figures of this machine, as {name: number}. Nothing here is
asserted: times belong to a machine and a day. Read next: `flops.py`, what is counted.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN, Batch
from vita_jax.config import LlmConfig, TrainConfig

WARM_UP = 3  # steps before the clock starts
SEGMENTS = 4  # conversations packed in a row


def train(config: TrainConfig, num_steps: int = 10) -> dict[str, float]:
    """The speed of a stage's step on full batches, made up in memory, beside this machine's
    measured rate of matrix products.

    Args:
      config: the stage; weights are random.
      num_steps: that are timed, each on its own.

    Returns:
      seconds a step (median), tokens a second, model_tflops a second, matmul_tflops a second (the
      limit), mfu (their ratio), memory_gb at the most (0 where the device does not say).
    """
    import jax

    from vita_jax.flops import matmul_flops_per_s

    limit = matmul_flops_per_s(config.dtype)
    step = OurStep(config)
    seconds = statistics.median(_timed(step, num_steps))
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "tokens_per_s": step.tokens / seconds,
        "model_tflops": step.flops / seconds / 1e12,
        "matmul_tflops": limit / 1e12,
        "mfu": step.flops / seconds / limit,
        "memory_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
    }


def train_beside_torch(
    config: TrainConfig, num_steps: int = 10, num_cores: int = 1
) -> dict[str, float]:
    """The step of a stage that trains an LLM on text, and the same in PyTorch: transformers' Qwen2
    of the same size with the same weights and batch, AdamW and clipping, in the same dtype.

    Both are processes pinned to the same cores; steps of the two take turns, so that whatever else
    the machine does meets both.

    Args:
      config: the stage.
      num_steps: of each that are timed.
      num_cores: cores (and threads) they may use.

    Returns:
      ours_s and torch_s a step (medians), ratio (theirs to ours: above 1 we are ahead), the two
      losses of the first step.

    Raises:
      ModuleNotFoundError: there is no PyTorch or no transformers.
      ValueError: the stage trains something else than the LLM.
    """
    if any(not path.startswith("llm/") for path in config.trainable):
        raise ValueError(f"{config.trainable}: the peer trains an LLM on text; take stage 0")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_cores)
    os.environ |= {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # idle threads do not spin
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    spawn, pipes, workers = multiprocessing.get_context("spawn"), [], []
    for kind in (OurStep, TorchStep):
        here, there = spawn.Pipe()
        given = kind, configs.to_json(config), cores, there
        workers.append(spawn.Process(target=_serve, args=given, daemon=True))
        workers[-1].start()
        there.close()
        pipes.append(here)
    first = [_ask(pipe) for pipe in pipes]
    times = [[_ask(pipe)[0] for pipe in pipes] for _ in range(WARM_UP + num_steps)][WARM_UP:]
    for pipe, worker in zip(pipes, workers):
        pipe.close()
        worker.join()
    ours_s, torch_s = map(statistics.median, zip(*times))
    return {
        "ours_s": ours_s,
        "torch_s": torch_s,
        "ratio": torch_s / ours_s,
        "our_loss": first[0][1],
        "torch_loss": first[1][1],
    }


def data(config: TrainConfig, num_batches: int = 8, step_s: float = 0.0) -> dict[str, float]:
    """The speed of a stage's loader, on its own and beside devices that take `step_s` a step.

    Returns:
      samples and tokens a second, seconds a batch, and data_wait, the share of time that devices
      would wait.
    """
    from vita_jax import feed

    config = configs.override(config, ["data.held_out=[]"])
    with tempfile.TemporaryDirectory() as folder:
        loader, _ = feed.make_loaders(config, feed.load_tokenizer(config), Path(folder))
        next(loader)  # starts the workers
        samples = tokens = 0
        waited_s, start_s = 0.0, time.perf_counter()
        for _ in range(num_batches):
            asked_s = time.perf_counter()
            batch = next(loader)
            waited_s += time.perf_counter() - asked_s
            time.sleep(step_s)  # the devices at work
            samples += int(batch.segment_ids.max(axis=1).sum())
            tokens += int((batch.segment_ids > 0).sum())
        seconds = time.perf_counter() - start_s
        loader.close()
    return {
        "samples_per_s": samples / seconds,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds / num_batches,
        "data_wait": waited_s / seconds,
    }


class OurStep:
    """Calls run a step to its end and give the loss.

    Attributes:
      tokens, flops: of a step.
    """

    def __init__(self, config: TrainConfig, segments: int = SEGMENTS):
        """Random weights on the mesh, one batch (as `full_batch`) used again and again."""
        import functools

        import jax

        from vita_jax import train_state
        from vita_jax.feed import used_parts, work_of
        from vita_jax.optim import make_optimizer
        from vita_jax.sharding import batch_sharding, make_mesh, rules
        from vita_jax.train import make_step

        mesh = make_mesh(config.mesh)
        rows = batch_sharding(mesh, config.data.batch_size // config.optim.accumulation)
        batch = full_batch(config, segments)
        trained, frozen = train_state.param_shapes(config, used_parts(config, batch), mesh)
        paths = list(trees.flatten(trained))
        optimizer = make_optimizer(config.optim, config.num_steps, paths)
        shapes = train_state.state_shapes(trained, optimizer, mesh)
        shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
        begin = functools.partial(train_state.start, optimizer=optimizer)
        self._state = jax.jit(begin, donate_argnums=0, out_shardings=shardings)(
            _weights(config, trained)
        )
        self._frozen = _weights(config, frozen)
        self._batch = jax.device_put(batch, rows)
        self.tokens, self.flops = work_of(config, paths, batch)
        step = jax.jit(
            make_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, None)
        )

        def run(*args):
            with jax.set_mesh(mesh), rules():
                return step(*args)

        self._step = run

    def __call__(self) -> float:
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        return float(metrics["loss"])


class TorchStep:
    """The same for transformers' Qwen2, from the same weights."""

    def __init__(self, config: TrainConfig, segments: int):
        import torch

        from vita_jax import tables
        from vita_jax.models.vita import param_shapes

        self._clip_norm = config.optim.clip_norm
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._model = qwen2(config.model.llm).train()
        flat = trees.flatten(_weights(config, {"llm": param_shapes(config.model)["llm"]})["llm"])
        flat = {path: np.asarray(value) for path, value in flat.items()}
        held = tables.to_published(flat, tables.assign(tables.LLM, flat))
        self._model.load_state_dict({name: torch.tensor(x.copy()) for name, x in held.items()})
        optim = config.optim
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=optim.learning_rate, betas=(optim.b1, optim.b2),
            eps=optim.eps, weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        batch = full_batch(config, segments)
        self._tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
        self._bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")

    def __call__(self) -> float:
        import torch

        self._optimizer.zero_grad(set_to_none=True)
        with self._bfloat16:
            loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        return loss.item()


def qwen2(config: LlmConfig):
    """transformers' Qwen2 of these sizes, its weights random.

    Raises:
      ModuleNotFoundError: there is no PyTorch or no transformers.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
        )
    )


def full_batch(config: TrainConfig, segments: int = SEGMENTS) -> Batch:
    """A batch without padding in NumPy arrays: random words behind as many tiles and clips as a row
    may have, every word a target, `segments` conversations a row.
    """
    from vita_jax.aot import batch_shapes

    shapes, rng = batch_shapes(config, None), np.random.default_rng(0)
    b, t = shapes.tokens.shape
    tokens = rng.integers(0, config.model.llm.vocab_size, (b, t), np.int32)
    at = np.arange(t)
    size = -(-t // segments)
    batch = Batch(
        tokens=tokens,
        positions=np.tile((at % size).astype(np.int32), (b, 1)),
        segment_ids=np.tile((1 + at // size).astype(np.int32), (b, 1)),
        loss_mask=np.ones((b, t), np.float32),
    )
    used = 0
    for name, mask, token, length in (
        ("tiles", "tile_mask", IMAGE_TOKEN, config.model.vision.embeddings_per_tile),
        ("audio", "audio_mask", AUDIO_TOKEN,
         config.model.audio.num_embeddings(config.data.max_audio_frames)),
    ):  # fmt: skip
        if (shape := getattr(shapes, name)) is None:
            continue
        arrays = {
            name: rng.standard_normal(shape.shape, np.float32),
            mask: np.ones(getattr(shapes, mask).shape, bool),
        }
        batch = batch.replace(**arrays)
        if config.objective == "next_token":
            end = used + shape.shape[1] * length
            if end > t // 2:
                raise ValueError(
                    f"data.max_tokens={t}: {shape.shape[1]} {name} of a row take {end - used} "
                    f"tokens; lower data.max_tiles={config.data.max_tiles} or "
                    f"data.max_clips={config.data.max_clips}"
                )
            batch.tokens[:, used:end], batch.loss_mask[:, used:end] = token, 0
            used = end
    return batch


def _weights(config, shapes):
    """Random parameters, drawn where they are to lie: a tree of arrays as `shapes` says."""
    import jax

    from vita_jax.models.vita import boxed_shapes

    boxes = trees.flatten(boxed_shapes(config.model))

    def draw():
        return trees.unflatten(
            {
                path: boxes[path].mean
                + boxes[path].std
                * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), s.shape, s.dtype)
                for path, s in trees.flatten(shapes).items()
            }
        )

    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(draw, out_shardings=shardings)()


def _timed(step, number):
    """Seconds of each of `number` calls, after some that do not count."""
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(number):
        start_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start_s)
    return seconds


def _serve(kind, config, cores, pipe):
    """A process that runs a step whenever it is asked: (seconds, loss), or what went wrong."""
    os.sched_setaffinity(0, cores)
    try:
        # One conversation a row: of several, transformers would see each as a part of one.
        step = kind(configs.from_json(TrainConfig, config), segments=1)
        while True:
            pipe.recv()
            start_s = time.perf_counter()
            loss = step()
            pipe.send((time.perf_counter() - start_s, loss))
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)


def _ask(pipe):
    pipe.send(None)
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer
