"""README.md: its commands are commands, its Python runs."""

import pathlib
import re
import shlex

import pytest

import vita_jax
from vita_jax import checkpoint, cli
from vita_jax.infer import engine, voice

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vita ")])
def test_every_vita_command_is_understood(command):
    assert cli.parse(shlex.split(command)[1:]).run


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash ")])
def test_every_script_is_there(command):
    assert (ROOT / shlex.split(command)[1]).is_file()


def test_first_steps_run(tmp_path, monkeypatch, capsys):
    checkpoint.initialize("vita_tiny", tmp_path / "tiny")
    monkeypatch.setattr(voice, "MAX_CODES", 20)
    load = engine.load
    monkeypatch.setattr(vita_jax, "load", lambda path: load(tmp_path / "tiny"), raising=False)
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {})
    assert "24000" in capsys.readouterr().out
