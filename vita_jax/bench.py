"""Speed, measured beside a peer or a limit in the same run.

Goes in: a `TrainConfig`. Comes out: figures of this machine, as {name: number}. Nothing here is
asserted: times belong to a machine and a day. Read next: `flops.py`, what is counted, and
`bench_programs.py`, the same for what the engine runs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN, TEXT_TOKEN, Batch
from vita_jax.config import HEARING, TrainConfig

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
      limit), mfu (their ratio), memory_gb at the most (0 where the device does not say); of stages
      that train the voice also speech_s_per_s, seconds of speech a second.
    """
    import jax

    from vita_jax.flops import matmul_flops_per_s

    limit = matmul_flops_per_s(config.dtype)
    step = OurStep(config)
    seconds = statistics.median(_timed(step, num_steps))
    memory = jax.local_devices()[0].memory_stats() or {}
    of_speech = {"speech_s_per_s": step.speech_s / seconds} if step.speech_s else {}
    return of_speech | {
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
    """The step of a stage, and the same in PyTorch with the same weights and batch, AdamW and
    clipping, in the same dtype: an LLM on text beside transformers' Qwen2, the codec and its
    discriminators, and the speech decoders beside renderings of our own (`peer.py`).

    Both are processes pinned to the same cores; steps of the two take turns, so that whatever else
    the machine does meets both.

    Args:
      config: the stage.
      num_steps: of each that are timed.
      num_cores: cores (and threads) they may use.

    Returns:
      ours_s and torch_s a step (medians), ratio (theirs to ours: above 1 we are ahead), the two
      losses of the first step, and of stages that train the voice speech_s, seconds of speech in a
      step.

    Raises:
      ModuleNotFoundError: there is no PyTorch or no transformers.
      ValueError: no peer does what the stage does.
    """
    on_text = all(path.startswith("llm/") for path in config.trainable)
    without = config.objective in ("match", *HEARING)
    if config.lora or without or config.objective == "next_token" and not on_text:
        raise ValueError(
            f"objective={config.objective!r}, trainable={config.trainable}: no peer does that; "
            "take stage 0, 3.1 or 3.2"
        )
    torch_step = {"next_token": TorchText, "codec": TorchCodec, "speech": TorchSpeech}
    # One conversation a row: of several, transformers would see each as a part of one.
    makers = [
        functools.partial(_training, kind, config)
        for kind in (OurStep, torch_step[config.objective])
    ]
    runners = race(makers, num_steps, num_cores)
    for runner in runners:
        if isinstance(runner, Exception):
            raise runner
    (our_loss, ours), (torch_loss, theirs) = runners
    ours_s, torch_s = statistics.median(ours), statistics.median(theirs)
    speech = {"speech_s": of_speech} if (of_speech := speech_s(config, full_batch(config))) else {}
    return speech | {
        "ours_s": ours_s,
        "torch_s": torch_s,
        "ratio": torch_s / ours_s,
        "our_loss": our_loss,
        "torch_loss": torch_loss,
    }


def race(makers, num_calls: int, num_cores: int) -> list:
    """Calls of several things in turn, so that whatever else the machine does meets all of them.
    Each is a process of its own, on the CPU, pinned to the same cores.

    Args:
      makers: functions that can be pickled; each makes, in its process, a function to time and one
        that says, after its first call, what came of it.
      num_calls: that are timed, of each.
      num_cores: cores (and threads) they may use.

    Returns:
      for each maker what the second function said and the seconds of each call; or the exception
      that ended it.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_cores)
    os.environ |= {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # idle threads do not spin
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    spawn, runners = multiprocessing.get_context("spawn"), []
    for maker in makers:  # one after the other: what is measured at the start is undisturbed
        here, there = spawn.Pipe()
        worker = spawn.Process(target=_serve, args=(maker, cores, there), daemon=True)
        worker.start()
        there.close()
        try:
            first = here.recv()
        except EOFError:
            first = RuntimeError(f"{maker}: its process ended without a word")
        runners.append((here, worker, first, []))
    running = [runner for runner in runners if not isinstance(runner[2], Exception)]
    for _ in range(WARM_UP + num_calls):
        for pipe, _, _, seconds in running:
            pipe.send(None)
            seconds.append(answer := pipe.recv())
            if isinstance(answer, Exception):
                raise answer
    for pipe, worker, _, _ in runners:
        pipe.close()
        worker.join()
    return [
        first if isinstance(first, Exception) else (first, seconds[WARM_UP:])
        for _, _, first, seconds in runners
    ]


def machine() -> dict:
    """What the figures belong to: processor, cores that may be used, device and system."""
    import jax

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "system": platform.system(),
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
        config = feed.with_tokens(config, Path(folder))
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
      speech_s: seconds of speech in a step, of stages that train the voice.
    """

    def __init__(self, config: TrainConfig, segments: int = SEGMENTS):
        """Random weights on the mesh, one batch (as `full_batch`) used again and again."""
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
        optimizer = make_optimizer(config.optim, config.num_steps, paths, config.model)
        shapes = train_state.state_shapes(trained, optimizer, mesh)
        shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
        begin = functools.partial(train_state.start, optimizer=optimizer)
        boxes = trees.flatten(train_state.boxed_shapes(config))
        self._state = jax.jit(begin, donate_argnums=0, out_shardings=shardings)(
            weights(boxes, trained)
        )
        self._frozen = weights(boxes, frozen)
        self._batch = jax.device_put(batch, rows)
        self.tokens, self.flops = work_of(config, paths, batch)
        self.speech_s = speech_s(config, batch)
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


class TorchText:
    """The same for transformers' Qwen2, from the same weights."""

    def __init__(self, config: TrainConfig, segments: int):
        import torch

        from vita_jax import peer, tables

        self._clip_norm = config.optim.clip_norm
        self._model = peer.qwen2(config.model.llm).train()
        peer.load(self._model, _torch_weights(config, "llm"), tables.LLM)
        self._optimizer = peer.adamw(self._model, config.optim)
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


class TorchCodec:
    """The same for the codec and its discriminators."""

    def __init__(self, config: TrainConfig, segments: int):
        import torch

        from vita_jax import peer, tables

        codec, judges = peer.codec(config.model.codec).train(), None
        rules = tables.codec_rules(config.model.codec)
        peer.load(codec, _torch_weights(config, "codec"), rules)
        if config.discriminator_channels:
            judges = peer.discriminators(config.discriminator_channels)
            peer.load(judges, _torch_weights(config, "discriminators"), peer.discriminator_rules())
        optimizers = [peer.adamw(part, config.optim) for part in (codec, judges) if part]
        waveform = torch.tensor(full_batch(config, segments).waveform)
        rate_hz, clip_norm = config.model.codec.sample_rate_hz, config.optim.clip_norm
        given = waveform[:, 0], waveform[:, 1], rate_hz, clip_norm
        self._step = lambda: peer.codec_step(codec, judges, optimizers, *given)

    def __call__(self) -> float:
        return self._step()


class TorchSpeech:
    """The same for the speech decoders, an utterance a row."""

    def __init__(self, config: TrainConfig, segments: int):
        import torch

        from vita_jax import peer, tables

        c, batch = config.model.speech, full_batch(config, segments)
        model = peer.speech(c).train()
        peer.load(model, _torch_weights(config, "speech"), tables.SPEECH)
        optimizer = peer.adamw(model, config.optim)
        table = torch.tensor(_torch_weights(config, "llm/embedding")["embedding"])
        text = table[torch.tensor(batch.text, dtype=torch.long)]
        text = text.reshape(len(text), -1, c.embed_dim)
        codes = torch.tensor(batch.tokens[:, 2 + text.shape[1] : -1], dtype=torch.long)
        num_codes = torch.full((len(codes),), codes.shape[1])
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        given = text, mask, codes, num_codes, c, config.optim.clip_norm
        self._bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")
        self._step = lambda: peer.speech_step(model, optimizer, *given)

    def __call__(self) -> float:
        with self._bfloat16:
            return self._step()


def speech_s(config: TrainConfig, batch: Batch) -> float:
    """Seconds of speech in a batch; 0 of stages that do not train the voice."""
    if config.objective not in ("codec", "speech"):
        return 0.0
    codec = config.model.codec
    return float(batch.loss_mask.sum()) * codec.samples_per_token / codec.sample_rate_hz


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
    if config.objective == "codec":
        waveform = 0.1 * rng.standard_normal(shapes.waveform.shape, np.float32)
        return batch.replace(waveform=waveform)
    if config.objective == "speech":
        return _spoken(config, batch, size)
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


def _spoken(config, batch, size):
    """The batch as utterances of `size` tokens, a quarter of them of text."""
    c, n = config.model.speech, config.model.speech_frames_per_token
    length = batch.tokens.shape[1]
    words = max(size // (4 * n), 1)
    at, sos = batch.positions, words * n + 1
    tokens = np.where(at > sos, batch.tokens % c.num_codes, TEXT_TOKEN)
    tokens = np.where(at == 0, c.bos_id, np.where(at == sos, c.sos_id, tokens))
    ends = np.diff(batch.segment_ids, axis=1, append=0) != 0
    tokens = np.where(ends, c.eos_id, tokens)
    segments = -(-length // size)
    text = np.random.default_rng(1).integers(
        0, config.model.llm.vocab_size, (len(tokens), segments * words), np.int32
    )
    ids = np.tile(np.repeat(np.arange(1, segments + 1, dtype=np.int32), words), (len(tokens), 1))
    mask = (at > sos).astype(np.float32)
    tokens = tokens.astype(np.int32)
    return batch.replace(tokens=tokens, loss_mask=mask, text=text, text_segment_ids=ids)


def weights(boxes: dict, shapes):
    """Random parameters, drawn where they are to lie: a tree of arrays as `shapes` says, from the
    {path: box} of `boxed_shapes`.
    """
    import jax

    def draw():
        return trees.unflatten(
            {
                path: boxes[path].mean
                + boxes[path].std
                * jax.random.normal(
                    jax.random.key(zlib.crc32(path.encode()), impl="rbg"), s.shape, s.dtype
                )
                for path, s in trees.flatten(shapes).items()
            }
        )

    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(draw, out_shardings=shardings)()


def _torch_weights(config, path):
    """The weights at and below `path` as our step draws them, a tree of NumPy arrays; PyTorch is
    told how many threads it may use.
    """
    import jax
    import torch

    from vita_jax.train_state import boxed_shapes

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    boxes = trees.flatten(boxed_shapes(config, (path,)))
    shapes = {
        name: jax.ShapeDtypeStruct(box.value.shape, np.float32, sharding=here)
        for name, box in boxes.items()
    }
    tree = jax.tree.map(np.asarray, weights(boxes, trees.unflatten(shapes)))
    return tree[path.split("/")[0]]


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


def _training(kind, config):
    """A step of training, to be called, and the loss of the first."""
    step, losses = kind(config, segments=1), []
    return lambda: losses.append(step()), lambda: losses[0]


def _serve(maker, cores, pipe):
    """A process that calls what `maker` makes whenever it is asked."""
    import jax

    os.sched_setaffinity(0, cores)
    jax.config.update("jax_platforms", "cpu")
    try:
        call, answer = maker()
        call()
        pipe.send(answer())
        while True:
            pipe.recv()
            start_s = time.perf_counter()
            call()
            pipe.send(time.perf_counter() - start_s)
    except EOFError:
        return
    except Exception as error:
        plain = isinstance(error, (ValueError, OSError, ModuleNotFoundError))
        pipe.send(error if plain else RuntimeError(f"{type(error).__name__}: {error}"))
