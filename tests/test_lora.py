"""vita_jax/lora.py: what adapters learn, what they leave alone, and the model they are merged
into.
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from parity import assert_close
from runs import SMALL, lines_of, run, saved, stage, weights

from vita_jax import checkpoint, feed, lora, train_state
from vita_jax import params as trees
from vita_jax.config import LoraConfig, override
from vita_jax.flops import model_flops
from vita_jax.models.vita import Vita, boxed_shapes
from vita_jax.objectives import make_loss
from vita_jax.optim import make_optimizer
from vita_jax.sharding import make_mesh, rules
from vita_jax.train import table

# One or two input axes, one or two output axes, in a stack and not.
TARGETS = ("llm/blocks/attn/(q|out)", "llm/blocks/mlp/.*", "llm/head")
RANK, SCALE = 4, 1.5
LORA = {"targets": TARGETS, "rank": RANK, "alpha": RANK * SCALE}
WORDS = ("trainable=[]", f"lora={json.dumps(LORA)}")


def lora_stage(*words, name="stage0_text"):
    return stage(name, *SMALL, *WORDS, *words)


def first_batch(config):
    return next(feed.make_loaders(config, feed.load_tokenizer(config), None)[0])


def placed(config, mesh=(1, 1, 1), b_std=0.0, parts=("llm",)):
    """What trains and what is frozen at the start of a run, B drawn with `b_std`."""
    origins = train_state.origins(config)
    for path in [path for path in origins if path.endswith("/b")]:
        box = origins[path].box.replace(std=b_std)
        origins[path] = dataclasses.replace(origins[path], box=box)
    shapes = train_state.param_shapes(config, parts, make_mesh(mesh))
    return [train_state.place(origins, tree) for tree in shapes]


def read(config, b_std=0.0):
    """The same as NumPy arrays: one kind of argument, so that a function is compiled once."""
    return jax.device_get(placed(config, b_std=b_std))


@functools.cache
def boxes_of(model):
    """{path: box} of a model."""
    return trees.flatten(boxed_shapes(model))


def targets_of(params):
    """Paths of the weights that have a pair."""
    return [path[5:-2] for path in trees.flatten(params) if path.endswith("/a")]


def merged(config, params, frozen):
    """The frozen parameters with the pairs of `params` merged."""
    flat, pairs = (trees.flatten(jax.device_get(tree)) for tree in (frozen, params))
    for path in targets_of(params):
        a, b = (pairs[f"lora/{path}/{x}"] for x in "ab")
        box = boxes_of(config.model)[path]
        layers, values = zip(*lora.merge(config.lora, box, flat[path], a, b))
        flat[path] = values[0] if layers == (None,) else np.stack(values)
    return trees.unflatten(flat)


class Setting:
    """A stage, its parameters and a batch.

    Attributes:
      pairs, whole: the loss and its gradients, of pairs and of whole weights: functions of (what
        trains, frozen, batch) to ((nats, sums), gradients).
    """

    def __init__(self):
        self.config = lora_stage("data.batch_size=8")
        self.batch = first_batch(self.config)
        plain = override(self.config, ["lora=null", "trainable=llm/.*"])
        self.pairs, self.whole = (
            jax.jit(jax.value_and_grad(make_loss(config), has_aux=True))
            for config in (self.config, plain)
        )

    def matrices(self, pairs, weights):
        """{path: (A, B, W) of each target} as float64[layers, inputs, outputs]."""
        pairs, weights = (trees.flatten(jax.device_get(x)) for x in (pairs, weights))
        found = {}
        for path in targets_of(trees.unflatten(pairs)):
            held = pairs[f"lora/{path}/a"], pairs[f"lora/{path}/b"], weights[path]
            if "layers" not in boxes_of(self.config.model)[path].names:
                held = [x[None] for x in held]
            a, b, w = (x.astype(np.float64) for x in held)
            a, b = a.reshape(len(a), -1, RANK), b.reshape(len(b), RANK, -1)
            found[path] = a, b, w.reshape(len(w), a.shape[1], b.shape[2])
        return found


@pytest.fixture(scope="module")
def setting():
    return Setting()


def test_the_start_is_the_model_itself(setting):
    params, frozen = read(setting.config)
    (nats, sums), _ = setting.pairs(params, frozen, setting.batch)
    (same, counts), _ = setting.whole(frozen, {}, setting.batch)
    assert nats == same and sums == counts


def test_gradients_are_those_of_the_weight_seen_through_its_pair(setting):
    """dA = s dW B^T and dB = s A^T dW; so a small plain step of A and B moves the weight by that of
    dW within what A and B span, - rate s^2 (A A^T dW + dW B^T B), but for terms in rate^2.
    """
    params, frozen = read(setting.config, b_std=0.1)
    (nats, _), grads = setting.pairs(params, frozen, setting.batch)
    (same, _), full = setting.whole(merged(setting.config, params, frozen), {}, setting.batch)
    assert_close(nats, same, 1e-6)
    pairs, grads = setting.matrices(params, full), setting.matrices(grads, full)
    assert set(pairs) == set(trees.match(TARGETS, trees.flatten(frozen)))
    for path, (a, b, dw) in pairs.items():
        da, db, _ = grads[path]
        a_t, b_t = a.swapaxes(1, 2), b.swapaxes(1, 2)
        assert_close(da, SCALE * dw @ b_t, 1e-5)
        assert_close(db, SCALE * a_t @ dw, 1e-5)
        rate = 1e-6 / np.abs(dw).max()
        moved = SCALE * ((a - rate * da) @ (b - rate * db) - a @ b)
        assert_close(moved, -rate * SCALE**2 * (a @ a_t @ dw + dw @ b_t @ b), 1e-5)


def test_steps_are_full_steps_restricted_to_a_subspace(setting):
    """With B from zero, and s A of orthonormal columns that is held: plain steps of B are the full
    steps of the weight with dW projected on those columns, W - rate P dW with P = s^2 A A^T.
    """
    config, rate = setting.config, 0.02 / 8
    params, frozen = read(config)
    pairs = trees.flatten(params)
    for path, (a, _, _) in setting.matrices(params, frozen).items():
        columns = np.linalg.qr(a)[0] / SCALE
        pairs[f"lora/{path}/a"] = columns.reshape(pairs[f"lora/{path}/a"].shape).astype(np.float32)
    full = frozen
    for _ in range(3):
        params = trees.unflatten(pairs)
        _, grads = setting.pairs(params, frozen, setting.batch)
        _, dw = setting.whole(full, {}, setting.batch)
        full = trees.flatten(full)
        for path, (a, _, d) in setting.matrices(params, dw).items():
            step = rate * SCALE**2 * a @ (a.swapaxes(1, 2) @ d)
            full[path] = full[path] - step.reshape(full[path].shape).astype(np.float32)
        full = trees.unflatten(full)
        grads = trees.flatten(jax.device_get(grads))
        pairs |= {p: x - rate * grads[p] for p, x in pairs.items() if p.endswith("/b")}
    ours = trees.flatten(merged(config, trees.unflatten(pairs), frozen))
    start, full = trees.flatten(frozen), trees.flatten(full)
    for path in trees.match(TARGETS, start):
        assert_close(ours[path] - start[path], full[path] - start[path], 1e-4)  # of float32 numbers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run from a checkpoint, its folder and the words it was started with."""
    folder = tmp_path_factory.mktemp("lora")
    checkpoint.initialize("vita_tiny", folder / "base", seed=3)
    words = (*WORDS, f"init_from={folder / 'base'}", 'optim.rates={"lora/.*/b": 2}')
    run(folder / "run", *words)
    return folder, words


def test_only_targets_change_and_the_model_is_what_trained(trained):
    folder, words = trained
    config = stage("stage0_text", *SMALL, *words)
    base, model = weights(folder / "base"), weights(folder / "run" / "model")
    assert base.keys() == model.keys()
    changed = {path for path in base if base[path].tobytes() != model[path].tobytes()}
    assert changed == set(trees.match(TARGETS, base))

    origins = train_state.origins(config)
    shapes, frozen = train_state.param_shapes(config, ("llm",), make_mesh((1, 1, 1)))
    optimizer = make_optimizer(config.optim, config.num_steps, trees.flatten(shapes))
    saves = train_state.Saves(folder / "run" / "saves", config.keep)
    state, _ = saves.restore(train_state.state_shapes(shapes, optimizer, make_mesh((1, 1, 1))))
    variables = lora.variables(config, state.params, train_state.place(origins, frozen))
    logits = jax.jit(Vita(config.model).apply)
    batch = first_batch(config)
    tuned = logits(variables, batch)
    assert_close(logits({"params": trees.unflatten(model)}, batch), tuned, 1e-5)
    before = np.asarray(logits({"params": trees.unflatten(base)}, batch))
    assert np.abs(before - tuned).max() > 1e-2
    said = table(config, shapes, frozen).splitlines()
    assert said[1].split()[:3] == ["lora/llm", *[f"{trees.count(shapes):,}"] * 2]


def test_going_on_is_the_same(trained, tmp_path):
    folder, words = trained
    shutil.copytree(folder / "run" / "saves" / "2", tmp_path / "half" / "saves" / "2")
    shutil.copy(folder / "run" / "config.json", tmp_path / "half")
    half = run(tmp_path / "half", *words)
    whole = lines_of(folder / "run")[2:]
    assert [(x["step"], x["loss"]) for x in half] == [(x["step"], x["loss"]) for x in whole]
    assert saved(tmp_path / "half", 4) == saved(folder / "run", 4)
    for file in (folder / "run" / "model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "half" / "model" / file.name).read_bytes()


def test_merged_in_the_dtype_that_the_weight_is_stored_in(tmp_path):
    checkpoint.initialize("vita_tiny", tmp_path / "base", dtype="bfloat16")
    config = lora_stage(f"init_from={tmp_path / 'base'}")
    params, frozen = placed(config, b_std=0.1)
    train_state.export(
        tmp_path / "model", config, train_state.origins(config), params, feed.load_tokenizer(config)
    )
    base, model = weights(tmp_path / "base"), weights(tmp_path / "model")
    sums = trees.flatten(merged(config, params, frozen))
    targets = trees.match(TARGETS, base)
    for path, value in model.items():
        expected = sums[path].astype(base[path].dtype) if path in targets else base[path]
        assert value.dtype == "bfloat16" and value.tobytes() == np.asarray(expected).tobytes()
    assert all(model[path].tobytes() != base[path].tobytes() for path in targets)


def test_the_loss_is_the_same_on_a_mesh(setting):
    config, shape = setting.config, (2, 2, 2)
    (nats, _), _ = setting.pairs(*read(config, b_std=0.1), setting.batch)
    params, frozen = placed(config, shape, b_std=0.1)
    with jax.set_mesh(make_mesh(shape)), rules():
        spread, _ = jax.jit(make_loss(config))(params, frozen, setting.batch)
    assert float(spread) == pytest.approx(float(nats), rel=1e-5)
    out = params["lora"]["llm"]["blocks"]["attn"]["out"]  # each lies as its side of the weight
    assert tuple(out["a"].sharding.spec) == (None, "tensor", None, None)
    assert tuple(out["b"].sharding.spec) == (None, None, "fsdp")


def scans(jaxpr):
    """All loops in a program, also those within others."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_products_of_pairs_are_not_kept(remat):
    """No loop over layers hands out as many numbers as its weights have, those of A B."""
    config = lora_stage(f"remat={remat}", 'lora={"targets": "llm/blocks/.*", "rank": 4}')
    params, frozen = placed(config)
    loss = jax.grad(lambda *x: make_loss(config)(*x)[0])
    program = jax.make_jaxpr(loss)(params, frozen, first_batch(config)).jaxpr
    shapes = {x.shape for x in jax.tree.leaves(frozen["llm"]["blocks"]) if x.ndim > 2}
    handed_out = {v.aval.shape for eqn in scans(program) for v in eqn.outvars}
    assert handed_out and not shapes & handed_out


def test_speech_decoders_take_adapters():
    words = 'lora={"targets": ["speech/(nar|ar)/.*", "speech/head"], "rank": 2}', "mesh=[1,1,1]"
    config = stage("finetune_voice", *words)
    batch = first_batch(config)
    params, frozen = placed(config, b_std=0.2, parts=feed.used_parts(config, batch))
    adapted = params["lora"]["speech"]
    assert set(adapted) == {"nar", "ar", "head"} and set(adapted["nar"]) == {"attn", "mlp"}
    with_pairs = lora.variables(config, params, frozen)
    sums = merged(config, params, frozen)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, lora.merged(config, params, frozen), sums)

    @jax.jit
    def logits(variables):
        model, says = Vita(config.model), lambda m: m.spoken_logits(m.spoken_states(batch))
        return model.apply(variables, method=says)

    tuned = logits(with_pairs)
    assert_close(logits({"params": sums}), tuned, 1e-5)
    assert np.abs(tuned - logits({"params": jax.device_get(frozen)})).max() > 1e-2


def test_beside_other_parts_that_train():
    words = ("data.max_tokens=768", "trainable=vision/projector/.*")
    config = lora_stage(*words, name="stage1_1_vision_alignment")
    batch = first_batch(config)
    trained, frozen = train_state.param_shapes(config, ("vision", "llm"), make_mesh((1, 1, 1)))
    assert set(trained) == {"vision", "lora"}
    grads, _ = jax.eval_shape(jax.grad(make_loss(config), has_aux=True), trained, frozen, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    paths = list(trees.flatten({"lora": trained["lora"]}))
    one_weight = model_flops(config.model, "next_token", ("llm/head",), batch)
    assert model_flops(config.model, "next_token", paths, batch) == one_weight


def test_on_the_command_line():
    config = stage("stage0_text", *WORDS, "lora.rank=2", "lora.targets=llm/head")
    assert config.lora == LoraConfig(targets=("llm/head",), rank=2, alpha=6.0)
    assert config.trains == ("lora/.*",)


@pytest.mark.parametrize(
    "words, message",
    [
        (['lora={"targets": "llm/layers/.*"}'], r"'llm/layers/\.\*' matches no parameter; there"),
        (['lora={"targets": ".*/attn/.*"}'], r"'\.\*/attn/\.\*' matches .*; only weights of the"),
        (['lora={"targets": "llm/norm/.*"}'], "matches no weight that .* only llm/norm/scale"),
        (['lora={"targets": "llm/embedding"}'], "matches no weight that"),
        (['lora={"targets": "llm/.*"}', "trainable=llm/.*"], "attn/k is in trainable, too"),
        (['lora={"targets": []}'], r"lora.targets=\(\)"),
        (['lora={"targets": "llm/.*", "rank": 0}'], "lora.rank=0 .* expected rank >= 1"),
        (['lora={"targets": "llm/.*", "alpha": 0}'], "positive alpha"),
        (['lora={"targets": "llm/.*", "size": 2}'], "unknown config key 'lora.size'; valid"),
        (["lora=null", "lora.rank=4"], "there is no 'lora' to change; give all of it"),
        (["lora=null"], r"trainable=\(\): nothing trains"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        train_state.origins(lora_stage(*words))
