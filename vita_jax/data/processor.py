"""Raw conversations to arrays: a turn to answer or a training sample to an `Example`.

Goes in: texts and files. Comes out: token ids with a placeholder for each embedding of each picture
and clip, the tiles and filter banks for these, and where the targets are.
Read next: `collate.py`.
Source: the release's data loader, conversation template and command-line demo.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.config import VitaConfig
from vita_jax.data.audio import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ, fbank, read_audio
from vita_jax.data.augment import Augment
from vita_jax.data.image import fit_frame, normalize, read_image, tile_image
from vita_jax.data.prompts import (
    ASSISTANT,
    AUDIO,
    END,
    IMAGE,
    STATES,
    SYSTEM,
    SYSTEM_PROMPTS,
    USER,
    VIDEO,
)
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import read_video

UNTILED_SETS = ("khair", "jester")  # whose pictures, if a sample has several, are one tile each


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a user gave in one turn and, once it is over, what the reply was.

    Attributes:
      text: the words, or None. `<image>`, `<video>` and `<audio>` in it say where things go; else
        pictures and video come first, on a line of their own, and sound last.
      images: a picture or several, each a file or anything else `image.read_image` takes.
      audio: a file or anything else `audio.read_audio` takes, or None.
      video: a file, or its frames as anything `image.read_image` takes, or None.
      reply: the reply with its state token, or None.
    """

    text: str | None = None
    images: Sequence = ()
    audio: object = None
    video: object = None
    reply: str | None = None

    def __post_init__(self):
        several = isinstance(self.images, (list, tuple))
        object.__setattr__(self, "images", tuple(self.images if several else _listed(self.images)))


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation as arrays.

    Attributes:
      tokens: int32[T] text ids and placeholder ids, one for each embedding.
      loss_mask: float32[T] 1 on replies, from the state token to `<|im_end|>`, these included.
      tiles: float32[I, px, px, 3] normalised pixels in the order of their placeholders, or None.
      audio: float32[A, M] filter banks, one for each clip, in the order of their placeholders.
      text: int32[X] the words to be spoken (see `Batch`), or None.
      waveform: float32[2, W] two pieces of a clip, or None.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    tiles: np.ndarray | None
    audio: tuple[np.ndarray, ...]
    text: np.ndarray | None = None
    waveform: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation as it stands in a prompt, with its reply if it has one.

    Attributes:
      text: of the question, with one IMAGE for each tile and an AUDIO for each clip.
      reply: with state token and END, or None if there is none yet.
      tiles: RGB images of the tiles.
      clips: float32[A, M] filter banks of the clips.
      has_video: whether the tiles are frames of a video.
    """

    text: str
    reply: str | None = None
    tiles: tuple = ()
    clips: tuple[np.ndarray, ...] = ()
    has_video: bool = False


class Processor:
    """Makes an `Example` of a raw conversation: `prompt` to answer it, `sample` to train on it."""

    def __init__(
        self,
        config: VitaConfig,
        tokenizer: Tokenizer,
        max_tokens: int | None = None,
        video_rate: float = 1.0,
        augment: Augment | None = None,
    ):
        """Joins a model's sizes and a vocabulary.

        Args:
          config: of the model that the examples are for.
          tokenizer: one whose ids the model knows.
          max_tokens: longest conversation, at most `llm.max_positions`; None is the config's.
          video_rate: frames a second to look at; the release answers with 1 and trains with 3.
          augment: what is done to clips where a generator is given; None leaves them.

        Raises:
          ValueError: the tokenizer has more ids than the model, or `max_tokens` is out of range.
        """
        if tokenizer.vocab_size > config.llm.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but {config.name} has "
                f"llm.vocab_size={config.llm.vocab_size}; give the tokenizer of this model"
            )
        max_tokens = config.max_tokens if max_tokens is None else max_tokens
        if not 0 < max_tokens <= config.llm.max_positions:
            limit = f"llm.max_positions={config.llm.max_positions}"
            raise ValueError(f"max_tokens={max_tokens}: expected 1 to {limit}")
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.video_rate = video_rate
        self.augment = augment

    def prompt(
        self,
        text: str | None = None,
        images: Sequence = (),
        audio=None,
        video=None,
        history: Iterable[Turn] = (),
        rng: np.random.Generator | None = None,
    ) -> Example:
        """The conversation up to where the reply starts.

        Args:
          text: words of the turn to answer; this and the next three are as in `Turn`.
          images: its pictures.
          audio: its sound.
          video: its video.
          history: the turns before, oldest first, each with its reply.
          rng: source of the noise `audio.dither` and of `augment`; None adds none.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: a file cannot be used, a turn is empty or has other things than its text says,
            a clip is longer than the encoder takes, or the whole is longer than `max_tokens`.
        """
        turns = [*history, Turn(text, images, audio, video)]
        messages = []
        for number, turn in enumerate(turns, 1):
            where = "prompt" if number == len(turns) else f"history, turn {number}"
            if turn.reply is None and number < len(turns):
                raise ValueError(f"{where}: no reply; give it or leave the turn out")
            messages.append(self.message(turn, where, rng))
        return self._example("prompt", messages)

    def message(
        self, turn: Turn, where: str = "turn", rng: np.random.Generator | None = None
    ) -> Message:
        """One turn as it stands in a prompt. Arguments and errors as for `prompt`; `where` names
        the turn in errors.
        """
        text = place(turn, where)
        pictures = [self.tiles(source) for source in turn.images]
        text, shown = expand(text, pictures, self.frames(turn.video))
        clips = () if turn.audio is None else (self.clip(turn.audio, rng),)
        reply = None if turn.reply is None else turn.reply + END
        return Message(text, reply, tuple(shown), clips, turn.video is not None)

    def sample(
        self,
        sample: Mapping,
        root: str | Path = ".",
        folders: Mapping[str, str | Path] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Example:
        """A training conversation in the release's sample format.

        Args:
          sample: `conversations`, a list of {"from": "human" or "gpt", "value": text} by turns.
            Each `<image>` and `<audio>` of the human texts stands for the next file of `image` and
            `audio` (a file or a list), `<video>` for the file `video`; sources already read will
            do. Optional: `id`, for errors; `set`, one or a list of one for each picture;
            `inserted_id`, index of the message that answers noise; `end_tag`, False where the last
            reply breaks off.
          root: folder of the files; sound lies in its folder `audio`.
          folders: folder of pictures and videos by `set`, for the sets that are not in `root`.
          rng: as in `prompt`.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: as in `prompt`, or the sample has another format.
        """
        where = f"sample {sample.get('id', 'without id')}"
        texts = _conversation(sample, where)
        inserted = sample.get("inserted_id")
        if inserted is not None and inserted not in range(1, len(texts), 2):
            raise ValueError(f"{where}: inserted_id={inserted!r} is not the index of a gpt message")
        images, film = _listed(sample.get("image")), sample.get("video")
        sounds = _listed(sample.get("audio"))
        has_video = film is not None
        _check_counts("\n".join(texts[::2]), len(images), has_video, len(sounds), where)

        sets = _sets(sample.get("set"), len(images) + has_video, where)
        homes = [(folders or {}).get(name, root) for name in sets]
        pictures = [
            self.tiles(_locate(home, source), len(images) == 1 or name not in UNTILED_SETS)
            for home, source, name in zip(homes, images, sets)
        ]
        frames = self.frames(_locate(homes[-1], film) if has_video else None)
        clips = [self.clip(_locate(Path(root, "audio"), source), rng) for source in sounds]

        messages = []
        for index in range(0, len(texts), 2):
            question, reply = texts[index : index + 2]
            message, shown = expand(_blocks_first(question), pictures, frames, after="\n")
            heard = [clips.pop(0) for _ in range(question.count(AUDIO))]
            spoken = "audio_reply" if AUDIO in question else "text_reply"
            state = STATES["noise" if inserted == index + 1 else spoken]
            broken_off = index + 2 == len(texts) and not sample.get("end_tag", True)
            reply = state + _tidy(reply) + ("" if broken_off else END)
            messages.append(Message(_tidy(message), reply, tuple(shown), tuple(heard), has_video))
        return self._example(where, messages)

    def join(self, messages: Sequence[Message], clip_sizes: Iterable[int]):
        """Messages, oldest first, as one conversation: the template, filled.

        Text between placeholders and each reply are tokenised apart, so what is a target is known.
        (The release tokenises the whole and measures the parts anew. The ids are the same: a reply
        starts with its state token, which no token spans.)

        Args:
          messages: to join.
          clip_sizes: embeddings of each clip.

        Returns:
          int32[T] ids and placeholders, float32[T] 1 on replies, and int[] where the last message
          begins.
        """
        sizes = iter(clip_sizes)
        shown = "video" if any(message.has_video for message in messages) else "text"
        if shown == "text" and any(IMAGE in message.text for message in messages):
            shown = "image"
        ids, is_target, start = [], [], 0

        def add(new, target=False):
            ids.extend(new)
            is_target.extend([target] * len(new))

        add(self.tokenizer.encode(SYSTEM.format(SYSTEM_PROMPTS[shown])))
        for number, message in enumerate(messages):
            start = len(ids)
            text = ("\n" if number else "") + USER.format(message.text) + ASSISTANT
            for piece in re.split(f"({IMAGE}|{AUDIO})", text):
                if piece == IMAGE:
                    add([IMAGE_TOKEN] * self.config.vision.embeddings_per_tile)
                elif piece == AUDIO:
                    add([AUDIO_TOKEN] * next(sizes))
                else:
                    add(self.tokenizer.encode(piece))
            if message.reply is not None:
                add(self.tokenizer.encode(message.reply), target=True)
        return np.asarray(ids, np.int32), np.asarray(is_target, np.float32), start

    def check_length(self, num_tokens: int, where: str) -> None:
        """Refuses a conversation of more than `max_tokens`, with a ValueError."""
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"{where}: {num_tokens} tokens, {num_tokens - self.max_tokens} over the limit of "
                f"{self.max_tokens}; give less text, fewer pictures or a shorter history, or "
                f"raise max_tokens (up to {self.config.llm.max_positions})"
            )

    def _example(self, where, messages) -> Example:
        tiles = [tile for message in messages for tile in message.tiles]
        clips = tuple(clip for message in messages for clip in message.clips)
        sizes = [self.config.audio.num_embeddings(len(clip)) for clip in clips]
        tokens, loss_mask, _ = self.join(messages, sizes)
        self.check_length(len(tokens), where)
        return Example(
            tokens=tokens,
            loss_mask=loss_mask,
            tiles=normalize(tiles) if tiles else None,
            audio=clips,
        )

    def tiles(self, source, tiled=True):
        """The tiles of one picture, RGB images."""
        rgb, px = read_image(source), self.config.vision.tile_px
        if tiled:
            return tile_image(rgb, px, self.config.max_tiles)
        return [fit_frame(rgb, px)]

    def frames(self, source):
        """The frames of a video, one tile each; none for None."""
        if isinstance(source, (str, Path)):
            source = read_video(source, self.video_rate)
        return [tile for frame in source or () for tile in self.tiles(frame, tiled=False)]

    def clip(self, source, rng):
        """float32[A, M] filter bank of one clip."""
        c = self.config.audio
        waveform = read_audio(source)
        augment = None if rng is None else self.augment
        if augment is not None:
            waveform = augment.waveform(waveform, rng)
        name = source if isinstance(source, (str, Path)) else "clip"
        seconds = f"{len(waveform) / SAMPLE_RATE_HZ:.2f} s of sound"
        frames = 1 + (len(waveform) - FRAME_SAMPLES) // HOP_SAMPLES
        if frames > c.max_frames:
            limit_s = c.max_frames * HOP_SAMPLES / SAMPLE_RATE_HZ
            raise ValueError(f"{name}: {seconds}, the limit is {limit_s:.2f} s; cut it in pieces")
        if c.adapter_frames(frames) < 1:
            raise ValueError(f"{name}: {seconds}, too short to hear; give at least 0.1 s")
        banks = fbank(waveform, c.num_mel_bins, dither=0.0 if rng is None else c.dither, rng=rng)
        return banks if augment is None else augment.gaps(augment.speaker(banks, rng), rng)


def place(turn, where):
    """The turn's text with placeholders: where the user wrote them, else where the release does."""
    text, has_audio, has_video = turn.text or "", turn.audio is not None, turn.video is not None
    if not (text or turn.images or has_audio or has_video):
        raise ValueError(f"{where}: nothing in it; give text, sound, a picture or a video")
    front = "" if IMAGE in text else IMAGE * len(turn.images)
    front += "" if VIDEO in text else VIDEO * has_video
    back = "" if AUDIO in text else AUDIO * has_audio
    text = (front and front + "\n") + text + back
    _check_counts(text, len(turn.images), has_video, has_audio, where)
    return text


def _check_counts(text, num_images, num_videos, num_clips, where):
    """Refuses a text whose placeholders do not match the things given."""
    given = (
        (IMAGE, num_images, "images"),
        (VIDEO, num_videos, "videos"),
        (AUDIO, num_clips, "clips"),
    )
    for token, number, what in given:
        if text.count(token) != number:
            raise ValueError(
                f"{where}: {text.count(token)} {token} in the text but {number:d} {what} given; "
                "make the two equal"
            )


def expand(text, pictures, frames, after=""):
    """`text` with one `<image>` a tile, and those tiles.

    Takes the pictures it needs off the front of `pictures`, a list of lists of tiles, and puts
    `after` behind each picture and video. (The release gives all pictures of a message one count.)
    """
    tiles = []

    def block(found):
        new = pictures.pop(0) if found[0] == IMAGE else frames
        tiles.extend(new)
        return IMAGE * len(new) + after

    return re.sub(f"{IMAGE}|{VIDEO}", block, text), tiles


def _blocks_first(text):
    """A training question with no line break beside `<image>` and no placeholders at its end.

    Pictures or video that stand at the end move to the front.
    """
    text = text.replace(IMAGE + "\n", IMAGE).replace("\n" + IMAGE, IMAGE)
    for token in (IMAGE, VIDEO):
        block = token * text.count(token)
        if block and text.endswith(block):
            text = (block + text.removesuffix(block).strip()).strip()
    return text


def _tidy(text):
    """A training text without the line break behind `<audio>` and without empty lines."""
    return text.replace(AUDIO + "\n", AUDIO).replace("\n\n", "\n")


def _conversation(sample, where):
    """The texts of a sample, human and gpt by turns."""
    messages = sample.get("conversations")
    if not isinstance(messages, Sequence) or not messages or len(messages) % 2:
        raise ValueError(
            f"{where}: conversations must be a list of human and gpt by turns, gpt last"
        )
    for index, message in enumerate(messages):
        role = ("human", "gpt")[index % 2]
        good = isinstance(message, Mapping) and message.get("from") == role
        if not (good and isinstance(message.get("value"), str)):
            expected = f"{{'from': '{role}', 'value': text}}"
            raise ValueError(f"{where}: message {index} is {message!r}, expected {expected}")
    return [message["value"] for message in messages]


def _sets(name, num_files, where):
    """The set of each picture and of the video, from one name for all or a list."""
    names = _listed(name) or [None]
    if len(set(names)) == 1:
        names = names[:1] * num_files
    if num_files and len(names) != num_files:
        raise ValueError(
            f"{where}: {len(names)} names in set but {num_files} pictures and videos; "
            "give one name, or one for each"
        )
    return names


def _listed(value):
    """`value` if it is a list, else a list of it, empty for None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _locate(folder, source):
    """A file in `folder`; a source that is read already stays as it is."""
    return Path(folder, source) if isinstance(source, (str, Path)) else source
