"""What all tests share: eight virtual CPU devices, exact float32, the golden recordings."""

import functools
import json
import os
import pathlib

import pytest

# JAX reads these once, when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the user's is left alone
# PyTorch's idle threads spin: several of them on a busy machine make a peer 10 times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN_DIR = pathlib.Path(
    os.environ.get("VITA_GOLDEN_DIR", pathlib.Path(__file__).parent / "data" / "golden")
)


@functools.cache
def _recording(name):
    from safetensors import safe_open

    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["config"])


@pytest.fixture(scope="session")
def golden():
    """`golden(name)`: ({tensor name with its prefix: array}, config) of one recording."""
    return _recording


@pytest.fixture(scope="session")
def golden_dir():
    """The folder of the recordings."""
    return GOLDEN_DIR
