"""What a run costs on a slice: the arithmetic on this machine's devices, and real compilations where libtpu is."""

import importlib.util
import json
import math
from types import SimpleNamespace

import jax
import pytest

from ddpm_jax import plan, planning
from ddpm_jax.config import ConfigError

KEYS = "topology devices device_kind batch_size params argument_bytes temp_bytes hbm_bytes fits flops bytes collectives"
KEYS += " compute_s memory_s collective_s bound mfu_limit"


@pytest.fixture
def here(monkeypatch):
    """This machine's CPU stands in for a slice."""
    monkeypatch.setattr(plan, "_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(plan, "_coordinates", lambda mesh: [(0, 0, 0)])


@pytest.fixture(scope="module")
def config(make_config):
    return make_config({"model.dropout": 0.0, "train.batch_size": 16, "dtype": "float32"})


def test_the_numbers_of_a_train_step(here, config, compilation_cache):
    found = plan.plan(config, "v5e:2x4")
    assert list(found) == KEYS.split()
    assert json.loads(json.dumps(found)) == found
    # Parameters, their average and Adam's two moments, in float32; images and labels; a few counters and a key.
    state, batch = 4 * 4 * found["params"], 16 * (8 * 8 + 4)
    assert state + batch <= found["argument_bytes"] <= state + batch + 64
    assert found["fits"]
    assert found["collectives"] == []
    # A multiplication and an addition for each weight at each pixel, and backward twice that again: a convolution of
    # C x C' x 9 weights at 8x8 or 4x4. Between the first level's convolutions alone and all weights at all pixels.
    assert 6 * 16 * 64 * 9 * 8 * 8 * 4 < found["flops"] < 6 * 16 * 64 * found["params"]
    assert found["compute_s"] == found["flops"] / 197e12
    assert found["memory_s"] == found["bytes"] / 819e9
    longest = max(found["compute_s"], found["memory_s"], found["collective_s"])
    assert found["mfu_limit"] == found["compute_s"] / longest


def test_weak_scaling_is_added_and_told(here, config, compilation_cache):
    found = plan.plan(config, "v5e:2x4", weak_scaling=4)
    assert list(found) == [*KEYS.split(), "weak_scaling"]
    assert [scale["chips"] for scale in found["weak_scaling"]] == [1, 2, 4]
    assert found["weak_scaling"][0]["collective_s"] == found["collective_s"]
    assert "on    4 chips" in plan.describe(found)


def test_micro_batches_cost_about_what_the_undivided_batch_does(here, config, make_config, compilation_cache):
    whole = plan.plan(config, "v5e:2x4")
    fields = {"model.dropout": 0.0, "train.batch_size": 16, "dtype": "float32", "train.accumulate": 4}
    parts = plan.plan(make_config(fields), "v5e:2x4")
    # Unrolled, as on a CPU; the rest is what it takes to add them up, which weighs something in so small a network.
    assert parts["flops"] == pytest.approx(whole["flops"], rel=0.15)


def test_micro_batches_are_a_loop_but_on_a_cpu(make_config):
    config = make_config({"train.batch_size": 16, "train.accumulate": 4})
    found = [plan._trips(config, what, platform) for what in ("train", "sample") for platform in ("tpu", "cpu")]
    assert found == [4, 1, 1, 1]


def test_the_numbers_of_a_denoising_step(here, make_config, compilation_cache):
    fields = {"train.num_samples": 16, "dtype": "float32"}
    short = plan.plan(make_config(fields | {"sampling.num_steps": 5}), "v5e:2x4", "sample")
    long = plan.plan(make_config(fields | {"sampling.num_steps": 10}), "v5e:2x4", "sample")
    assert short["batch_size"] == 16
    assert list(short) == KEYS.split()
    assert long["flops"] == pytest.approx(short["flops"], rel=0.05)  # of a step, not of the chain
    assert 2 * 16 * 64 * 9 * 8 * 8 * 4 < short["flops"] < 2 * 16 * 64 * short["params"]
    assert 4 * short["params"] <= short["argument_bytes"] < 5 * short["params"]


def test_the_compute_dtype_is_the_targets(here, make_config, monkeypatch):
    dtypes = []
    monkeypatch.setattr(plan, "Setup", lambda config, mesh: dtypes.append(config.dtype) or 1 / 0)
    for dtype, expected in (("auto", "bfloat16"), ("float32", "float32")):
        config = make_config({"dtype": dtype})
        with pytest.raises(ZeroDivisionError):
            plan.plan(config, "v5e:2x4")
        assert dtypes.pop() == expected
        assert config.dtype == dtype  # the caller's own is left alone


def too_large(message):
    def compile():
        raise jax.errors.JaxRuntimeError(message)

    return lambda setup: ((), SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile)))


def test_a_step_that_does_not_fit_is_an_answer(here, config, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm."
    monkeypatch.setattr(plan, "_train_step", too_large(message))
    found = plan.plan(config, "v5e:2x4")
    assert list(found) == KEYS.split()
    assert not found["fits"]
    assert found["argument_bytes"] + found["temp_bytes"] == 21.5 * 2**30
    assert found["flops"] is None
    assert "DOES NOT FIT" in plan.describe(found)
    monkeypatch.setattr(plan, "_train_step", too_large("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan.plan(config, "v5e:2x4")


def test_a_sweep_doubles_the_batch_until_it_does_not_fit(make_config, monkeypatch):
    monkeypatch.setattr(
        plan, "plan", lambda config, *_: {"fits": config.train.batch_size < 64, "batch": config.train.batch_size}
    )
    config = make_config({"train.batch_size": 16})
    assert [found["batch"] for found in plan.sweep(config, "v5e:2x4")] == [16, 32, 64]
    assert config.train.batch_size == 16


def test_what_cannot_be_planned(make_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"libtpu is missing.*ddpm_jax\[tpu\]"):
        plan.plan(make_config(), "v5e:2x4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"--topology=v2:2x2: v2: choose one of v3, .*chip:shape, such as v5e:2x4"):
        plan.plan(make_config(), "v2:2x2")
    monkeypatch.setattr(plan, "_devices", lambda topology: jax.devices()[:1] * 3)
    with pytest.raises(ConfigError, match=r"--batch_size=4: must be divisible by the 3 devices"):
        plan.plan(make_config(), "v5e:2x4", "sample")


def test_from_the_command_line_a_mistake_is_one_line(run_program, write_config_file, make_config, tmp_path):
    file = write_config_file(tmp_path / "tiny.py", make_config())
    lines = {
        "no topology": [f"--config={file}"],
        "dtype": [f"--config={file}", "--topology=v5e:2x4", "--dtype=float8"],
        "program": [f"--config={file}", "--topology=v5e:2x4", "--program=evaluate"],
        "fsdp": [f"--config={file}", "--topology=v5e:2x4", "--program=sample", "--fsdp=2"],
        "sweep": [f"--config={file}", "--topology=v5e:2x4", "--sweep", "--weak_scaling=64"],
        "json": [f"--config={file}", "--topology=v5e:2x4", f"--json={file}/plan.json"],
    }
    results = run_program("ddpm_jax.plan", lines, tmp_path)
    assert "--topology is missing" in results["no topology"].error
    assert "config.dtype='float8'" in results["dtype"].error
    assert "evaluate" in results["program"].error
    assert "--fsdp=2: a sampler has the whole network" in results["fsdp"].error
    assert "--weak_scaling=64: is of one plan" in results["sweep"].error
    assert f"--json={file}/plan.json: " in results["json"].error


# With the TPU compiler

with_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")


@pytest.fixture(scope="module")
def planned(run_program, write_config_file, make_config, tmp_path_factory):
    """The plans of a tiny network on v5e:2x4 and v3:2x2, and what their programs printed."""
    folder = tmp_path_factory.mktemp("plans")
    file = write_config_file(folder / "tiny.py", make_config({"model.base_channels": 32, "train.batch_size": 64}))
    common = [f"--config={file}", "--topology=v5e:2x4"]
    lines = {
        "plain": [*common, "--json=plain.json"],
        "fsdp": [*common, "--json=fsdp.json", "--fsdp=4"],
        "v3": [f"--config={file}", "--topology=v3:2x2", "--program=sample", "--batch_size=16", "--json=v3.json"],
        "indivisible": [*common, "--batch_size=12"],
        "unknown": [f"--config={file}", "--topology=v5e:3x3"],
    }
    results = run_program("ddpm_jax.plan", lines, folder, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    return results, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
@with_libtpu
def test_a_slice_of_eight_reduces_each_gradient_once(planned):
    results, plans = planned
    assert results["plain"].code == 0, results["plain"].stderr
    found = plans["plain"]
    assert (found["devices"], found["device_kind"], found["batch_size"]) == (8, "TPU v5 lite", 64)
    [reduced] = found["collectives"]
    assert reduced["op"] == "all-reduce"
    # dtype "auto" is bfloat16 on a TPU, and XLA sends the gradient of a bfloat16 weight before it widens it.
    assert 2 * found["params"] <= reduced["bytes"] < 2.01 * found["params"] + 1000
    # A 2x4 mesh is open: two links of 50 GB/s from every chip; a ring of eight sends 2 * 7/8 of what it reduces.
    assert found["collective_s"] == pytest.approx(reduced["bytes"] * 2 * 7 / 8 / 100e9)
    assert found["fits"]
    assert f"{found['params']:,}" in results["plain"].stdout


@pytest.mark.slow
@with_libtpu
def test_fsdp_holds_less_and_gathers(planned):
    _, plans = planned
    assert plans["fsdp"]["argument_bytes"] < plans["plain"]["argument_bytes"]
    assert {x["op"] for x in plans["fsdp"]["collectives"]} > {"all-reduce"}
    assert math.isclose(plans["fsdp"]["flops"], plans["plain"]["flops"], rel_tol=0.1)


@pytest.mark.slow
@with_libtpu
def test_a_v3_has_a_device_a_core_and_sampling_sends_nothing(planned):
    results, plans = planned
    assert results["v3"].code == 0, results["v3"].stderr
    found = plans["v3"]
    assert (found["devices"], found["device_kind"], found["batch_size"]) == (8, "TPU v3", 16)
    assert found["hbm_bytes"] == planning.CHIPS["v3"].hbm_bytes / 2
    assert found["collectives"] == []


@pytest.mark.slow
@with_libtpu
def test_mistakes_about_the_slice(planned):
    results, _ = planned
    assert "config.train.batch_size=12: must be divisible by the 8 devices" in results["indivisible"].error
    assert "--topology=v5e:3x3" in results["unknown"].error
