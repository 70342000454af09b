"""notebooks/: stored without outputs, and every cell runs, in order, in one namespace."""

import json
import pathlib
import sys
import types

import matplotlib
import numpy as np
import pytest

from vita_jax import checkpoint, cli
from vita_jax.infer import voice

NOTEBOOK = pathlib.Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def run(monkeypatch):
    """The namespace that the cells leave behind and what `Audio` was given; a cell that fails is
    named by the traceback.
    """
    heard = []
    display = types.ModuleType("IPython.display")  # no dependency of the package
    display.Audio = lambda samples, rate: heard.append((samples, rate))
    package = types.ModuleType("IPython")
    package.get_ipython, package.version_info = lambda: None, (9, 0)  # for matplotlib
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    matplotlib.use("agg")
    space = {}
    for number, cell in enumerate(CELLS, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    return space, heard


def check(space, heard):
    (samples, rate_hz) = heard[0]
    assert rate_hz == 24000 and np.isfinite(samples).all()  # random weights may say nothing
    seen = space["seen"]
    assert seen.pieces and len(seen.weights) == len(seen.pieces)
    np.testing.assert_allclose(seen.weights.sum(axis=-1), 1, atol=1e-4)
    llms, eyes = (
        {
            space[name].params[part][leaf][last].unsafe_buffer_pointer()
            for name in ("engine", "blind")
        }
        for part, leaf, last in (("llm", "norm", "scale"), ("vision", "projector", "up"))
    )
    assert len(llms) == 1 and len(eyes) == 2  # in memory: one language model, two pairs of eyes
    assert np.mean(space["losses"][-3:]) < space["losses"][0]
    assert len(space["plt"].get_fignums()) == 3
    space["plt"].close("all")


def test_stored_without_outputs():
    assert len(CELLS) > 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


def test_every_cell_runs_small(monkeypatch, tmp_path):
    """With the smallest model, and a voice that stops soon."""
    initialize = checkpoint.initialize

    def tiny(preset, *args, **options):
        return initialize("vita_tiny" if preset == "vita_nano" else preset, *args, **options)

    monkeypatch.setattr(checkpoint, "initialize", tiny)
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(voice, "MAX_CODES", 20)
    check(*run(monkeypatch))


@pytest.mark.slow
def test_every_cell_runs_as_it_is(monkeypatch):
    check(*run(monkeypatch))
