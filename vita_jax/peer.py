"""The same in PyTorch: what tests compare with, and what `vita bench` races against.

Goes in: sizes, and our parameters. Comes out: torch modules that say the same, written from the
papers and the specification and not from our modules. Layouts are PyTorch's: channels before time.
PyTorch is of the extra `convert`; nothing but tests and `bench.py` comes here.
"""

from __future__ import annotations

import functools

import numpy as np

from vita_jax import params as trees
from vita_jax import tables
from vita_jax.config import CodecConfig, LlmConfig, OptimConfig, SpeechConfig
from vita_jax.models.discriminators import FFT_SIZES, PERIODS, SCALES
from vita_jax.tables import Rule, below


def load(model, params: dict, rules) -> None:
    """Gives a torch module our weights.

    Args:
      model: one of this file's modules.
      params: our tree of arrays of this part.
      rules: the part's table: `tables.LLM`, `tables.SPEECH`, `tables.codec_rules(config)` or
        `discriminator_rules()`.
    """
    import torch

    flat = {path: np.asarray(value) for path, value in trees.flatten(params).items()}
    held = tables.to_published(flat, tables.assign(rules, flat))
    model.load_state_dict({name: torch.tensor(x.copy()) for name, x in held.items()})


def adamw(model, config: OptimConfig):
    """AdamW for all of a module, in one pass over the weights."""
    import torch

    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


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


def speech(config: SpeechConfig):
    """NAR and AR decoders, by teacher forcing: LLaMA blocks.

    Returns:
      torch.nn.Module of (text float[B, T, D], text_mask bool[B, T], codes int64[B, S] padded with
      `pad_id`) to logits float[B, 1 + S, V]; names are the release's. `run`, with caches, is what
      `peer_programs.py` goes on step by step with.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    dim, heads, half = config.embed_dim, config.num_heads, config.head_dim // 2
    rates = config.rope_theta ** (-torch.arange(half) / half)

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    def turned(x, cos, sin):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                linear(dim, dim) for _ in range(4)
            )

        def forward(self, x, cos, sin, mask, cache=None, at=None):
            q, k, v = (
                project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            if cache is not None:
                k, v = cache[0].index_copy_(2, at, k), cache[1].index_copy_(2, at, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(y.transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = linear(dim, config.mlp_dim), linear(dim, config.mlp_dim)
            self.down_proj = linear(config.mlp_dim, dim)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm = nn.RMSNorm(dim, config.norm_eps)
            self.self_attn = Attention()
            self.post_attention_layernorm = nn.RMSNorm(dim, config.norm_eps)
            self.mlp = Mlp()

        def forward(self, x, *where):
            x = x + self.self_attn(self.input_layernorm(x), *where)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Decoders(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, dim)
            self.layers_pre_nn = nn.ModuleList(Block() for _ in range(config.num_nar_layers))
            self.layers = nn.ModuleList(Block() for _ in range(config.num_layers))
            self.norm = nn.RMSNorm(dim, config.norm_eps)
            self.out_fnn = nn.Linear(dim, config.vocab_size)

        def run(self, blocks, x, mask, caches=None, at=None):
            """`caches`: of each block keys and values float[B, heads, S, H], to be written at the
            positions `at` int64[T]; None: there is nothing before `x`, and nothing is kept.
            """
            at = torch.arange(x.shape[1], device=x.device) if at is None else at
            angles = at[:, None] * rates.to(x.device)
            angles = torch.cat([angles, angles], dim=-1)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            for block, cache in zip(blocks, caches or [None] * len(blocks)):
                x = block(x, cos, sin, mask, cache, at)
            return x

        def forward(self, text, text_mask, codes):
            rows, end = len(text), text.shape[1] + 1  # of the prefix
            read = self.run(self.layers_pre_nn, text, text_mask[:, None, None])
            bos, sos = (codes.new_full((rows, 1), i) for i in (config.bos_id, config.sos_id))
            said = self.embedding(torch.cat([sos, codes], dim=1))
            x = torch.cat([self.embedding(bos), read, said], dim=1)
            size = x.shape[1]
            mask = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
            mask[:, :end] = True
            mask = mask.expand(rows, 1, size, size).clone()
            mask[..., 1:end] &= text_mask[:, None, None]
            return self.out_fnn(self.norm(self.run(self.layers, x, mask)[:, end:]))

    return Decoders()


def speech_loss(logits, codes, num_codes, config: SpeechConfig):
    """Cross-entropy of the codes and of what ends them, summed (nats).

    Args:
      logits: float[B, 1 + S, V].
      codes: int64[B, S] padded with `pad_id`.
      num_codes: int64[B] codes that are real.
      config: names the special ids.
    """
    import torch.nn.functional as F

    targets = F.pad(codes, (0, 1), value=config.pad_id)
    targets[range(len(codes)), num_codes] = config.eos_id
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=config.pad_id, reduction="sum"
    )


def codec(config: CodecConfig):
    """Encoder, quantizers and decoder. Batch norm has the batch's statistics in `train()`, the
    checkpoint's in `eval()`.

    Returns:
      torch.nn.Module of waveform float[B, W] to its reconstruction float[B, W'], its timbre
      float[B, E] and the quantizers' loss float[B]; `.timbre(waveform)` is the second alone. Names
      are the release's.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    count = len(config.resblock_kernels)

    class ResBlock(nn.Module):
        def __init__(self, channels, width, dilations):
            super().__init__()

            def convs(dilations):
                return nn.ModuleList(
                    weight_norm(
                        nn.Conv1d(
                            channels, channels, width, dilation=d, padding=(width - 1) * d // 2
                        )
                    )
                    for d in dilations
                )

            self.convs1, self.convs2 = convs(dilations), convs([1] * len(dilations))

        def forward(self, x):
            for dilated, plain in zip(self.convs1, self.convs2):
                x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
            return x

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            wide = config.channels
            self.conv_pre = weight_norm(nn.Conv1d(config.code_dim, wide, 7, padding=3))
            self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
            for rate, width in zip(config.upsample_rates, config.upsample_kernels):
                up = nn.ConvTranspose1d(wide, wide // 2, width, rate, padding=(width - rate) // 2)
                self.ups.append(weight_norm(up, dim=0))
                wide //= 2
                for kind in zip(config.resblock_kernels, config.resblock_dilations):
                    self.resblocks.append(ResBlock(wide, *kind))
            self.conv_post = weight_norm(nn.Conv1d(wide, 1, 7, padding=3))

        def forward(self, words, timbre):
            x = self.conv_pre(words)
            for i, up in enumerate(self.ups):
                x = up(F.leaky_relu(x, 0.1))
                x = sum(block(x) for block in self.resblocks[i * count : (i + 1) * count]) / count
                if x.shape[1] == config.global_dim:
                    x = x + timbre[..., None]
            return self.conv_post(F.leaky_relu(x, 0.1)).tanh()[:, 0]

    class GlobalTokenEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            inputs, hidden, outputs = config.global_conv

            def conv(inputs, outputs):
                return nn.Conv1d(inputs, outputs, 3, padding=1, bias=False), nn.LeakyReLU(0.1)

            self.conv = nn.Sequential(
                *conv(inputs, hidden), *conv(hidden, hidden), *conv(hidden, outputs)
            )
            size = config.global_dim
            self.fn = nn.Sequential(
                nn.Linear(outputs, size), nn.LeakyReLU(0.1), nn.BatchNorm1d(size)
            )

        def forward(self, x):
            return self.fn(self.conv(x).mean(dim=2))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            wide = config.encoder_channels
            self.conv_pre = weight_norm(nn.Conv1d(1, wide, 7, padding=3))
            self.ups, self.resblocks, self.normalize = (nn.ModuleList() for _ in range(3))
            for rate, width in zip(config.upsample_rates[::-1], config.upsample_kernels[::-1]):
                down = nn.Conv1d(wide, 2 * wide, width, rate, padding=(width - rate) // 2)
                self.ups.append(weight_norm(down))
                wide *= 2
                kinds = zip(config.resblock_kernels[::-1], config.resblock_dilations[::-1])
                for kind in kinds:
                    self.resblocks.append(ResBlock(wide, *kind))
                    self.normalize.append(nn.GroupNorm(max(1, wide // 16), wide, eps=1e-6))
            self.conv_post = nn.Conv1d(wide, config.code_dim, 3, padding=1)
            self.GlobalTokenEncoder = GlobalTokenEncoder()
            # In the release's checkpoint, and never called.
            self.linear = nn.Sequential(nn.Linear(config.global_dim, config.global_dim))

        def stages(self, x, first, last):
            for i in range(first, last):
                x = self.ups[i](F.leaky_relu(x, 0.1))
                total = 0
                for j in range(i * count, (i + 1) * count):
                    total = self.normalize[j](total + self.resblocks[j](x))
                x = total / count
            return x

        def half(self, waveform):
            return self.stages(self.conv_pre(waveform[:, None]), 0, len(self.ups) // 2)

        def forward(self, waveform):
            x = self.half(waveform)
            timbre = self.GlobalTokenEncoder(x)
            x = self.stages(x, len(self.ups) // 2, len(self.ups))
            return self.conv_post(F.leaky_relu(x, 0.01)), timbre

    class Words(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.embedding = nn.Embedding(config.num_codes, dim)

        def forward(self, x):
            """float[B, ..., D] codewords with the gradient of `x`, and float[B] loss."""
            with torch.no_grad():
                distances = self.embedding.weight.square().sum(1) - 2 * x @ self.embedding.weight.T
            nearest = self.embedding(distances.argmin(dim=-1))
            to_words = (nearest - x.detach()).square().flatten(1).mean(dim=1)
            to_encoder = (nearest.detach() - x).square().flatten(1).mean(dim=1)
            loss = config.codebook_loss_weight * to_words
            return x + (nearest - x).detach(), loss + config.commitment_loss_weight * to_encoder

    class Quantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer_modules = nn.ModuleList([Words(config.code_dim)])
            self.quantizer_modules_globaltokens = nn.ModuleList(
                Words(config.global_code_dim) for _ in range(config.num_global_tokens)
            )

        def forward(self, encoded, timbre):
            words, loss = self.quantizer_modules[0](encoded.transpose(1, 2))
            pieces = timbre.chunk(config.num_global_tokens, dim=1)
            found = [f(x) for f, x in zip(self.quantizer_modules_globaltokens, pieces)]
            loss = loss + sum(piece_loss for _, piece_loss in found) / len(found)
            return words.transpose(1, 2), torch.cat([x for x, _ in found], dim=1), loss

    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.encoder, self.quantizer = Generator(), Encoder(), Quantizer()

        def timbre(self, waveform):
            return self.encoder.GlobalTokenEncoder(self.encoder.half(waveform))

        def forward(self, waveform):
            encoded, timbre = self.encoder(waveform)
            words, quantized_timbre, loss = self.quantizer(encoded, timbre)
            return self.generator(words, quantized_timbre), timbre, loss

    return Codec()


def discriminators(channels: int):
    """The discriminators of `models/discriminators.py`, in their order.

    Returns:
      torch.nn.Module of waveform float[B, W] to a list of (scores, features): float[B, 1, T,
      period] and [B, C, T, period], [B, 1, T] and [B, C, T], [B, 1, T, F] and [B, C, T, F].
    """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    def judged(convs, x, slope):
        features = []
        for conv in list(convs.values())[:-1]:
            x = F.leaky_relu(conv(x), slope)
            features.append(x)
        return convs["post"](x), features

    def stack(convs):
        names = [f"conv_{i}" for i in range(len(convs) - 1)] + ["post"]
        return nn.ModuleDict({name: weight_norm(conv) for name, conv in zip(names, convs)})

    class Period(nn.Module):
        def __init__(self, period):
            super().__init__()
            self.period = period
            widths = [channels * factor for factor in (1, 4, 16, 32)]
            self.convs = stack(
                [
                    nn.Conv2d(inputs, outputs, (5, 1), (3, 1), padding=(2, 0))
                    for inputs, outputs in zip([1] + widths, widths)
                ]
                + [
                    nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)),
                    nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)),
                ]
            )

        def forward(self, waveform):
            extra = -waveform.shape[1] % self.period
            x = F.pad(waveform[:, None], (0, extra), "reflect").unflatten(2, (-1, self.period))
            score, features = judged(self.convs, x, 0.1)
            return score, features + [score]

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            c = channels
            self.convs = stack(
                [
                    nn.Conv1d(1, 4 * c, 15, padding=7),
                    nn.Conv1d(4 * c, 4 * c, 41, 2, groups=4, padding=20),
                    nn.Conv1d(4 * c, 8 * c, 41, 2, groups=16, padding=20),
                    nn.Conv1d(8 * c, 16 * c, 41, 4, groups=16, padding=20),
                    nn.Conv1d(16 * c, 32 * c, 41, 4, groups=16, padding=20),
                    nn.Conv1d(32 * c, 32 * c, 41, groups=16, padding=20),
                    nn.Conv1d(32 * c, 32 * c, 5, padding=2),
                    nn.Conv1d(32 * c, 1, 3, padding=1),
                ]
            )

        def forward(self, x):
            score, features = judged(self.convs, x, 0.1)
            return score, features + [score]

    class Stft(nn.Module):
        def __init__(self, n_fft):
            super().__init__()
            self.n_fft, c = n_fft, channels
            self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
            self.convs = stack(
                [nn.Conv2d(2, c, (3, 9), padding=(1, 4))]
                + [
                    nn.Conv2d(c, c, (3, 9), (1, 2), dilation=(d, 1), padding=(d, 4))
                    for d in (1, 2, 4)
                ]
                + [nn.Conv2d(c, outputs, (3, 3), padding=(1, 1)) for outputs in (c, 1)]
            )

        def forward(self, waveform):
            spectrum = torch.stft(
                waveform, self.n_fft, self.n_fft // 4, window=self.window, center=False,
                return_complex=True,
            ).transpose(1, 2)  # fmt: skip
            x = torch.stack([spectrum.real, spectrum.imag], dim=1) / self.window.norm()
            return judged(self.convs, x, 0.2)

    class Discriminators(nn.Module):
        def __init__(self):
            super().__init__()
            self.period = nn.ModuleDict({str(p): Period(p) for p in PERIODS})
            self.scale = nn.ModuleDict({str(s): Scale() for s in SCALES})
            self.stft = nn.ModuleDict({str(n): Stft(n) for n in FFT_SIZES})
            self.halve = nn.AvgPool1d(4, 2, padding=2)

        def forward(self, waveform):
            found = [judge(waveform) for judge in self.period.values()]
            x = waveform[:, None]
            for scale, judge in self.scale.items():
                x = x if scale == "1" else self.halve(x)
                found.append(judge(x))
            return found + [judge(waveform) for judge in self.stft.values()]

    return Discriminators()


def discriminator_rules() -> tuple[Rule, ...]:
    """The table of `discriminators`."""
    rules = ()
    for kind, numbers, num_convs, kernel in (
        ("period", PERIODS, 5, "o i k 1 -> k i o"),
        ("scale", SCALES, 7, "o i k -> k i o"),
        ("stft", FFT_SIZES, 5, "o i t f -> t f i o"),
    ):
        conv = (
            Rule("weight_g", "g", "o 1 1 -> o" if kind == "scale" else "o 1 1 1 -> o"),
            Rule("weight_v", "v", kernel),
            Rule("bias", "bias", "o -> o"),
        )
        for name in [f"conv_{i}" for i in range(num_convs)] + ["post"]:
            for number in numbers:
                rules += below(conv, f"{kind}.{number}.convs.{name}.", f"{kind}_{number}/{name}/")
    return rules


def generator_losses(
    real, fake, judged_real, judged_fake, latents_loss, timbre, other_timbre, rate_hz: int
) -> dict:
    """As `codec_losses.generator_losses`, of tensors and of what `discriminators` gives."""
    import torch.nn.functional as F

    parts = {
        "mel": sum(
            weight * _rows((log_mel(real, *how, rate_hz) - log_mel(fake, *how, rate_hz)).abs())
            for *how, weight in ((1024, 240, 80, 45), (512, 120, 80, 1), (256, 60, 64, 1))
        ),
        "quantizer": 10 * latents_loss,
        "timbre": 5 * (1 - F.cosine_similarity(timbre, other_timbre.detach())),
    }
    if judged_fake:
        parts["adversarial"] = sum(_rows((1 - score).square()) for score, _ in judged_fake)
        parts["features"] = 2 * sum(
            _rows(F.l1_loss(b, a, reduction="none"))
            for (_, of_real), (_, of_fake) in zip(judged_real, judged_fake)
            for a, b in zip(of_real, of_fake)
        )
    return parts


def discriminator_losses(judged_real, judged_fake) -> dict:
    """As `codec_losses.discriminator_losses`, of what `discriminators` gives."""
    if not judged_real:
        return {}
    return {
        "real": sum(_rows((1 - score).square()) for score, _ in judged_real),
        "fake": sum(_rows(score.square()) for score, _ in judged_fake),
    }


def codec_step(
    codec, discriminators, optimizers, waveform, other, rate_hz: int, clip_norm: float
) -> float:
    """One step of codec and discriminators; each of them runs once for recorded and made waveforms.

    Args:
      codec: of `codec`, in `train()`.
      discriminators: of `discriminators`, or None to go without.
      optimizers: of the codec and of the discriminators.
      waveform: float[B, W].
      other: float[B, W] another segment of each utterance.
      rate_hz: samples a second.
      clip_norm: longest gradient of each of the two.

    Returns:
      the mean mel loss of a row before the step.
    """
    import torch

    fake, timbre, loss = codec(waveform)
    judged = ((), ()) if discriminators is None else map(discriminators, (waveform, fake))
    judged_real, judged_fake = judged
    with torch.no_grad():
        other_timbre = codec.timbre(other)
    parts = generator_losses(
        waveform, fake, judged_real, judged_fake, loss, timbre, other_timbre, rate_hz
    )
    judgement = sum(discriminator_losses(judged_real, judged_fake).values())
    wholes = [(codec, sum(parts.values()).mean())]
    wholes += [] if discriminators is None else [(discriminators, judgement.mean())]
    for number, (module, whole) in enumerate(wholes, 1):
        weights, more = list(module.parameters()), number < len(wholes)
        gradients = torch.autograd.grad(whole, weights, retain_graph=more, allow_unused=True)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
    for (module, _), optimizer in zip(wholes, optimizers):
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        optimizer.step()
    return parts["mel"].mean().item()


def speech_step(
    model, optimizer, text, text_mask, codes, num_codes, config, clip_norm: float
) -> float:
    """One step of the speech decoder: the loss (nats a code) before it. Arguments as those of
    `speech` and `speech_loss`, and the longest gradient.
    """
    import torch

    logits = model(text, text_mask, codes)
    loss = speech_loss(logits, codes, num_codes, config) / (num_codes + 1).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def log_mel(waveform, n_fft: int, hop: int, num_mels: int, rate_hz: int):
    """float[B, num_mels, T] from float[B, W], as `codec_losses.log_mel`; librosa's filters."""
    import torch
    import torch.nn.functional as F

    margin = (n_fft - hop) // 2
    spectrum = torch.stft(
        F.pad(waveform[:, None], (margin, margin), "reflect")[:, 0], n_fft, hop,
        window=torch.hann_window(n_fft, device=waveform.device), center=False, return_complex=True,
    )  # fmt: skip
    magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
    filters = torch.from_numpy(_librosa_filters(n_fft, num_mels, rate_hz)).to(waveform.device)
    return torch.log((filters @ magnitude).clamp(min=1e-5))


@functools.cache
def _librosa_filters(n_fft, num_mels, rate_hz):
    import librosa

    return librosa.filters.mel(sr=rate_hz, n_fft=n_fft, n_mels=num_mels)


def _rows(x):
    """The mean of each row."""
    return x.flatten(1).mean(dim=1)
