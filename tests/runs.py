"""What the tests of training share: tiny runs, in this process or another, and what they leave."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

import vita_jax
from vita_jax import checkpoint
from vita_jax.config import load_config
from vita_jax.train import train

ROOT = pathlib.Path(vita_jax.__file__).parents[1]
STAGES = sorted(path.stem for path in (ROOT / "configs").glob("stage*.py"))
SMALL = (
    "mesh=[1,1,1]", "data.batch_size=2", "data.max_tokens=480", "data.held_out=[]", "num_steps=4",
    "save_every=2",
)  # fmt: skip


def stage(name, *overrides):
    return load_config(ROOT / "configs" / f"{name}.py", overrides, tiny=True)


def run(workdir, *overrides, name="stage0_text"):
    """Trains; the lines of metrics."""
    train(stage(name, *SMALL, *overrides), workdir)
    return lines_of(workdir)


def lines_of(workdir, held_out=False):
    file = workdir / "metrics.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if ("loss" in line) != held_out]


def weights(folder):
    """{path: array} of a checkpoint folder."""
    _, files = checkpoint.open_folder(folder)
    return {
        f"{part}/{name}": checkpoint.read(file, name)
        for part, file in files.items()
        for name in checkpoint.header(file)
    }


def saved(workdir, step):
    """State and notes of a save, arrays as bytes, from whatever devices wrote it."""
    import orbax.checkpoint as ocp

    handlers = {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager((workdir / "saves").absolute(), item_handlers=handlers)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        manager.item_metadata(step).state,
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), notes=ocp.args.JsonRestore())
    held = manager.restore(step, args=args)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(held.state)], held.notes


def start(workdir, *overrides, name="stage0_text"):
    """The stage in a process of its own."""
    command = [sys.executable, "-m", "vita_jax", "train", f"configs/{name}.py", "--tiny"]
    command += ["--workdir", str(workdir), *SMALL, *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for(process, workdir, step):
    """Waits until a line of `step` is written."""
    while not any(line["step"] >= step for line in lines_of(workdir)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def assert_same(run, other, step):
    """The same bytes in the saves of `step`, the models and the lines, but for times."""
    assert saved(run, step) == saved(other, step)
    for file in (run / "model").glob("*.safetensors"):
        assert file.read_bytes() == (other / "model" / file.name).read_bytes()
    names = ("step", "loss", "error", "total", "perplexity", "grad_norm", "targets")
    timeless = [[[line.get(k) for k in names] for line in lines_of(x)] for x in (run, other)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == step
