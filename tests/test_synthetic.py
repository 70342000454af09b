"""vita_jax/data/synthetic.py: samples to validate with."""

import dataclasses

import jax
import numpy as np
import pytest

from vita_jax.config import DataConfig, vita_tiny
from vita_jax.data import synthetic
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import byte_tokenizer

PROCESSOR = Processor(vita_tiny(), byte_tokenizer())


def settings(*kinds):
    return DataConfig(
        mixture={f"synthetic:{kind}": 1.0 for kind in kinds},
        batch_size=4,
        max_tokens=512,
        max_tiles=1,
        max_clips=1,
        max_audio_frames=128,
    )


@pytest.mark.parametrize("objective", ["next_token", "ctc"])
def test_held_out_is_one_pass_over_others(objective):
    data = settings("speech")
    share = {"objective": objective, "num_samples": 10}
    whole = list(synthetic.held_out(data, PROCESSOR, **share))
    assert len(whole) == 3
    used = np.concatenate([batch.segment_ids.any(axis=1) for batch in whole])
    assert used.tolist() == [True] * 10 + [False] * 2
    last = whole[-1]
    assert not any(x[2:].any() for x in vars(last).values() if x is not None)
    # Sounds differ by their noise, so equal ones would be one sample.
    heard = {batch.audio[row].tobytes() for batch in whole for row in range(4)}
    trained = synthetic.Loader(data, PROCESSOR, objective=objective)
    seen = {row.tobytes() for _ in range(16) for row in next(trained).audio}
    assert len(heard) == 11 and not heard & seen
    for count in (2, 4):
        parts = [list(synthetic.held_out(data, PROCESSOR, p, count, **share)) for p in range(count)]
        for at, batch in enumerate(whole):
            joined = np.concatenate([part[at].audio for part in parts])
            np.testing.assert_array_equal(joined, batch.audio)


def test_held_out_has_every_kind_and_the_arrays_of_training():
    data = dataclasses.replace(settings("text", "captions", "spoken_qa"), max_tokens=768)
    whole = list(synthetic.held_out(data, PROCESSOR))
    assert len(whole) == 8 and all(batch.segment_ids.any(axis=1).all() for batch in whole)
    assert sum(int(batch.tile_mask.sum()) for batch in whole) in (21, 22)
    first = next(synthetic.Loader(data, PROCESSOR))
    assert jax.tree.map(np.shape, whole[0]) == jax.tree.map(np.shape, first)
