"""vita_jax/infer/chunks.py: the recorded streams, and what must hold for any decoder."""

import jax
import numpy as np
import pytest
from test_codec import SMALL, random_codec, random_tokens, recorded_codec

from vita_jax.infer.chunks import ChunkedSynthesis, quiet_cut
from vita_jax.models.codec import Codec

RATE = 100


def segments_of(synthesis, tokens):
    """All segments but the empty ones."""
    segments = [synthesis.push(int(token)) for token in tokens] + [synthesis.flush()]
    return [segment for segment in segments if segment.size]


def hum(tokens):
    """A decoder without context: RATE samples a token, which is their loudness in percent."""
    loudness = np.repeat(np.asarray(tokens, np.float32), RATE) / 100
    return loudness * np.where(np.arange(loudness.size) % 2, 1, -1)


def codec_decoder(config, params, global_tokens):
    """A function from tokens to waveform, as the engine makes one."""
    decode = jax.jit(lambda *args: Codec(config).apply({"params": params}, *args, method="decode"))
    return lambda tokens: decode(np.asarray(tokens, np.int32)[None], global_tokens)[0]


@pytest.mark.golden
def test_recorded_streams(golden):
    tensors, meta, config, params = recorded_codec(golden, "decoder")
    decode = codec_decoder(config, params, tensors["in.global_tokens"][:1, 0].astype(np.int32))
    assert meta["streams"]
    for name, options in meta["streams"].items():
        synthesis = ChunkedSynthesis(
            decode,
            samples_per_token=config.samples_per_token,
            chunk_size=options["codec_chunk_size"],
            padding=options["codec_padding_size"],
            window=options["N"],
            threshold=options["seg_threshold"],
        )
        segments = segments_of(synthesis, tensors["in.stream_tokens"])
        lengths = tensors[f"out.stream_{name}.segment_lengths"].tolist()
        assert [len(segment) for segment in segments] == lengths, name
        expected = tensors[f"out.stream_{name}.waveform"]
        np.testing.assert_allclose(np.concatenate(segments), expected, rtol=0, atol=1e-4)


def test_seams_cannot_be_heard():
    """With the decoder's whole field of view as padding, chunks equal the whole."""
    decode = codec_decoder(SMALL, random_codec(SMALL), np.array([SMALL.global_tokens]))
    tokens = random_tokens(SMALL, (57,))
    whole = np.asarray(decode(tokens))
    for threshold in (0.0, 10.0):
        synthesis = ChunkedSynthesis(
            decode, samples_per_token=SMALL.samples_per_token, chunk_size=20, threshold=threshold
        )
        segments = segments_of(synthesis, tokens)
        assert (len(segments) > 1) == (threshold > 0)
        np.testing.assert_allclose(np.concatenate(segments), whole, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2, 8])  # 8 is more than a chunk
@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 12, 40])
def test_no_token_is_lost_or_heard_twice(padding, count):
    tokens = np.arange(1, count + 1)
    synthesis = ChunkedSynthesis(
        hum, samples_per_token=RATE, chunk_size=5, padding=padding, window=31, threshold=0.2
    )
    segments = segments_of(synthesis, tokens)
    np.testing.assert_array_equal(np.concatenate([hum([]), *segments]), hum(tokens))


def test_decodes_full_windows_only():
    calls = []
    synthesis = ChunkedSynthesis(
        lambda tokens: calls.append(len(tokens)) or hum(tokens),
        samples_per_token=RATE,
        chunk_size=6,
        padding=2,
        window=31,
    )
    segments_of(synthesis, [50] * 25)
    assert calls == [8, 10, 10, 9]


def test_cuts_where_it_is_quiet_and_keeps_the_rest():
    synthesis = ChunkedSynthesis(
        hum, samples_per_token=RATE, chunk_size=6, padding=0, window=51, threshold=0.05
    )
    tokens = [50, 50, 50, 50, 1, 50] + [50] * 6 + [50, 50, 50, 50, 0, 50]
    segments = segments_of(synthesis, tokens)
    assert [len(segment) for segment in segments] == [400, 1200, 200]


def test_first_half_of_a_chunk_is_not_cut():
    assert quiet_cut(hum([0, 50, 50, 50]), 51, 0.05) is None
    assert 200 <= quiet_cut(hum([50, 50, 0, 50]), 51, 0.05) <= 250


def test_chunk_shorter_than_the_window():
    assert quiet_cut(hum([1]), 2401, 0.05) == 0
    assert quiet_cut(hum([50]), 2401, 0.05) is None
