"""VITA-1.5 in JAX: pictures, video, speech and text go in, text and speech come out.

    engine = vita_jax.load("build/demo/nano")
    reply = engine.chat(images=["picture.jpg"], audio="question.wav")

Public names are imported on first use, so `import vita_jax` is quick and loads no JAX.
Read next: `batch.py`.
"""

import importlib

__version__ = "0.1.0"

_MODULE_OF = {
    "load": "vita_jax.infer.engine",
    "Engine": "vita_jax.infer.engine",
    "Reply": "vita_jax.infer.engine",
    "TextDelta": "vita_jax.infer.engine",
    "AudioChunk": "vita_jax.infer.engine",
    "Done": "vita_jax.infer.engine",
    "Sampler": "vita_jax.infer.sampling",
    "Vita": "vita_jax.models.vita",
    "VitaConfig": "vita_jax.config",
    "vita_7b": "vita_jax.config",
    "vita_nano": "vita_jax.config",
    "vita_tiny": "vita_jax.config",
    "Processor": "vita_jax.data.processor",
    "Turn": "vita_jax.data.processor",
    "Batch": "vita_jax.batch",
    "convert": "vita_jax.release",
}
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"vita_jax has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__():
    return [*__all__, "__version__"]
