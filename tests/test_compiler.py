"""What XLA is told beside the program."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax import diffusion
from ddpm_jax.compiler import compiler_options


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_only_a_cpu_is_told_anything(monkeypatch):
    assert compiler_options("cpu")
    assert compiler_options("gpu") == compiler_options("tpu") == {}
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))  # whose XLA may not know the option
    assert compiler_options("cpu") == {}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option for CPUs")
def test_a_convolution_stays_with_xla_and_its_numbers_stay():
    x, kernel = (
        jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 64)), jnp.float32),
        jnp.ones((3, 3, 64, 64)),
    )
    plain = jax.jit(convolve).lower(x, kernel).compile()
    told = jax.jit(convolve, compiler_options=compiler_options("cpu")).lower(x, kernel).compile()
    np.testing.assert_allclose(told(x, kernel), plain(x, kernel), rtol=1e-4, atol=1e-3)
    assert "ynn_fusion" in plain.as_text()  # else the option has become idle
    assert "ynn_fusion" not in told.as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option for CPUs")
def test_a_convolution_beside_a_shortcut_stays_with_xla():
    def block(x, kernel, shortcut):
        return convolve(x, kernel) + x @ shortcut

    x, kernel, shortcut = jnp.ones((8, 32, 32, 64)), jnp.ones((3, 3, 64, 64)), jnp.ones((64, 64))
    compiled = jax.jit(block, compiler_options=compiler_options("cpu")).lower(x, kernel, shortcut).compile().as_text()
    main = compiled[compiled.index("\nENTRY") :]
    assert "ynn_fusion" in main  # the product
    assert " convolution(" in main


def gaussian(x_t, t):
    return 0.1 * x_t


LOOPS = {
    "sample": lambda x, **options: diffusion.sample(gaussian, SCHEDULE, x, KEY, num_steps=2, **options),
    "invert": lambda x, **options: diffusion.invert(gaussian, SCHEDULE, x, num_steps=2, **options),
    "bound": lambda x, **options: diffusion.variational_bound(gaussian, SCHEDULE, x, KEY, **options).prior,
}
SCHEDULE, KEY = diffusion.make_schedule("cosine", num_timesteps=4), jax.random.key(0)


@pytest.mark.filterwarnings("ignore::ddpm_jax.diffusion.ScheduleWarning")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_loops_pass_the_options_on(loop):
    x = jnp.zeros((1, 4, 4, 1))
    options = compiler_options(jax.default_backend())
    np.testing.assert_allclose(LOOPS[loop](x, compiler_options=options), LOOPS[loop](x), rtol=1e-5)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_nonsense"):
        LOOPS[loop](x, compiler_options={"xla_nonsense": "1"})


DEVICES = """
import sys
from ddpm_jax import compiler
compiler.num_cores = lambda: int(sys.argv[1])
even = sys.argv[2] == "even"
for num_images in map(int, sys.argv[3:]):
    compiler.use_cores(num_images, even=even)
    import jax
    print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("said", "arguments", "found"),
    [
        ({}, ["2", "even", "64"], ["2"]),
        ({}, ["6", "even", "64"], ["4"]),
        ({}, ["6", "even", "7"], ["1"]),
        ({}, ["6", "any", "7"], ["6"]),
        ({}, ["6", "any", "1"], ["1"]),
        ({}, ["64", "any", "64"], ["8"]),
        ({}, ["2", "even", "7", "64"], ["1", "1"]),  # the devices are there already
        ({"JAX_NUM_CPU_DEVICES": "3"}, ["2", "even", "64"], ["3"]),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, ["2", "even", "64"], ["5"]),
    ],
)
def test_every_core_is_a_device_unless_the_user_said_otherwise(said, arguments, found):
    unsaid = os.environ.keys() - {"XLA_FLAGS", "JAX_NUM_CPU_DEVICES"}
    environment = {name: os.environ[name] for name in unsaid} | {"JAX_PLATFORMS": "cpu"} | said
    command = [sys.executable, "-c", DEVICES, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == found
