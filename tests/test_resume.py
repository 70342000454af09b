"""Runs that are killed and started again: nothing in them may differ from one that was not."""

import json
import os
import random
import signal
import socket
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import ROOT, SMALL, STAGES, assert_same, run, start, wait_for

MORE = ("num_steps=30", "save_every=4")


@pytest.fixture(autouse=True)
def compiled_once(tmp_path, monkeypatch):
    """What a run compiles, this process and others find again: a run is the same three times."""
    folder = str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def kill(workdir, step, *overrides, **more):
    """Starts the run in a process of its own and kills it when `step` is done."""
    process = start(workdir, *overrides, **more)
    wait_for(process, workdir, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_resumed_without_a_trace(tmp_path):
    run(tmp_path / "whole", *MORE)
    broken = tmp_path / "broken"
    kill(broken, random.randint(5, 10), *MORE)
    process = start(broken, *MORE)
    wait_for(process, broken, random.randint(13, 18))
    process.send_signal(signal.SIGTERM)
    assert "stopped and saved at step" in process.communicate()[1] and process.returncode == 0
    assert not (broken / "model").exists()
    run(broken, *MORE)
    assert_same(tmp_path / "whole", broken, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_killed_and_resumed(name, tmp_path):
    kind = {
        "stage0_text": "text",
        "stage2_2_audio_sft": "spoken_qa",
        "stage3_2_speech_decoder": "codec_tokens",
    }.get(name, "captions")
    if name.startswith(("stage2_1", "stage3_1")):
        kind = "speech"
    size = 4 if name == "stage3_1_codec" else 768
    more = (f"data.max_tokens={size}", "num_steps=14", "save_every=4", "validate_every=5",
            f"data.held_out=synthetic:{kind}")  # fmt: skip
    run(tmp_path / "whole", *more, name=name)
    kill(tmp_path / "broken", random.randint(5, 10), *more, name=name)
    run(tmp_path / "broken", *more, name=name)
    assert_same(tmp_path / "whole", tmp_path / "broken", 14)


@pytest.mark.slow
def test_killed_while_workers_read_files(tmp_path):
    (tmp_path / "data").mkdir()
    rng = random.Random(3)
    with open(tmp_path / "data" / "sums.jsonl", "w") as file:
        for i in range(300):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            turns = [("human", f"{a} + {b} = ?"), ("gpt", str(a + b))]
            sample = {"id": i, "conversations": [{"from": f, "value": v} for f, v in turns]}
            file.write(json.dumps(sample if i % 50 else {"id": i}) + "\n")  # some are bad
    source = json.dumps({str(tmp_path / "data"): 1.0})
    more = (*MORE, f"data.mixture={source}", "data.num_shards=8", "data.num_workers=2")
    run(tmp_path / "whole", *more)
    kill(tmp_path / "broken", random.randint(5, 20), *more)
    run(tmp_path / "broken", *more)
    assert_same(tmp_path / "whole", tmp_path / "broken", 30)
    rejects = [(tmp_path / x / "rejects.jsonl").read_text() for x in ("whole", "broken")]
    assert sorted(rejects[0].splitlines()) == sorted(rejects[1].splitlines()) and rejects[0]


def start_two(workdir):
    """Two processes of four devices, each started again by launch/restart.sh when it falls over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "RESTART_S": "1",
    }
    words = [*SMALL, *MORE, "mesh=[2,2,2]", "data.batch_size=8"]
    train = [sys.executable, "-m", "vita_jax", "train", "configs/stage0_text.py", "--tiny"]
    train += ["--workdir", str(workdir), *words, "--distributed"]
    until_done = 'source launch/restart.sh; until_done "$@"'
    return [
        subprocess.Popen(
            ["bash", "-c", until_done, "restart", *train, f"{address},2,{index}"],
            cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_killed_and_restarted(killed, tmp_path):
    said = [loop.communicate()[1] for loop in start_two(tmp_path / "whole")]
    loops = start_two(tmp_path / "broken")
    wait_for(loops[0], tmp_path / "broken", random.randint(6, 18))
    pattern = rf"{tmp_path}/broken .*,2,{killed}$"
    pids = subprocess.check_output(["pgrep", "-f", f"^{sys.executable} .*{pattern}"], text=True)
    os.kill(int(pids), signal.SIGKILL)
    said += [loop.communicate()[1] for loop in loops]
    assert "exit 137" in said[2 + killed] and "exit" not in said[0] + said[1]
    assert "from step 0" in said[2] and said[2].count("from step") == 2
    assert [loop.returncode for loop in loops] == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "broken", 30)
