"""vita_jax/infer/chunks.py: the recorded streams, and what must hold for any decoder."""

import jax
import numpy as np
import pytest
from test_codec import SMALL, random_codec, random_tokens, recorded_codec

from vita_jax.infer.chunks import Windows
from vita_jax.models.codec import Codec


def windows_of(windows, tokens):
    """All windows of a piece of text."""
    found = [windows.push(int(token)) for token in tokens] + [windows.flush()]
    return [window for window in found if window is not None]


def heard(windows, decode, rate):
    """What is given out of the windows, decoded one by one."""
    return np.concatenate(
        [
            np.asarray(decode(window.codes))[window.first * rate : window.last * rate]
            for window in windows
        ]
    )


def codec_decoder(config, params, global_tokens):
    """A function from tokens to waveform."""
    decode = jax.jit(lambda *args: Codec(config).apply({"params": params}, *args, method="decode"))
    return lambda tokens: decode(np.asarray(tokens, np.int32)[None], global_tokens)[0]


@pytest.mark.golden
def test_recorded_streams(golden):
    """The release holds sound back up to a quiet place; all of it together is the same."""
    tensors, meta, config, params = recorded_codec(golden, "decoder")
    decode = codec_decoder(config, params, tensors["in.global_tokens"][:1, 0].astype(np.int32))
    assert meta["streams"]
    for name, options in meta["streams"].items():
        size = options["codec_chunk_size"]
        windows = Windows(size, size, options["codec_padding_size"])
        waveform = heard(
            windows_of(windows, tensors["in.stream_tokens"]), decode, config.samples_per_token
        )
        expected = tensors[f"out.stream_{name}.waveform"]
        np.testing.assert_allclose(waveform, expected, rtol=0, atol=1e-4)


def test_seams_cannot_be_heard():
    """With the decoder's whole field of view as padding, chunks equal the whole."""
    decode = codec_decoder(SMALL, random_codec(SMALL), np.array([SMALL.global_tokens]))
    tokens = random_tokens(SMALL, (57,))
    windows = windows_of(Windows(10, 20), tokens)
    assert len(windows) == 3
    waveform = heard(windows, decode, SMALL.samples_per_token)
    np.testing.assert_allclose(waveform, np.asarray(decode(tokens)), atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2, 8])  # 8 is more than a chunk
@pytest.mark.parametrize("count", [0, 1, 3, 5, 6, 7, 12, 40])
def test_no_token_is_lost_or_heard_twice(padding, count):
    tokens = list(range(count))
    windows = windows_of(Windows(3, 5, padding), tokens)
    assert sum([window.codes[window.first : window.last] for window in windows], []) == tokens
    for window in windows[:-1]:  # all but the end is decoded with what comes before and behind
        assert len(window.codes) - window.last == padding
    for before, window in zip(windows, windows[1:]):
        assert window.first >= min(padding, before.last)


def test_decodes_full_windows_only():
    windows = windows_of(Windows(3, 6, 2), range(25))
    assert [len(window.codes) for window in windows] == [5, 10, 10, 10, 6]
