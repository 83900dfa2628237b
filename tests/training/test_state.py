import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import training


def init_fn(key):
    one, two = jax.random.split(key)
    return {"kernel": jax.random.normal(one, (4, 6)), "bias": jnp.zeros(6), "scale": jax.random.normal(two, (6,))}


@pytest.fixture
def optimizer():
    rate = training.make_learning_rate(0.1, warmup_steps=0, decay="constant", num_steps=10)
    return training.make_optimizer(rate, weight_decay=0.0, grad_clip_norm=1.0)


def test_a_run_is_born_at_step_0_with_a_copy_for_an_average(optimizer):
    state = training.init_state(init_fn, optimizer, training.make_mesh(), jax.random.key(3))
    assert (int(state.step), int(state.skipped_steps)) == (0, 0)
    assert state.step.dtype == state.skipped_steps.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, init_fn(jax.random.key(3)))
    other = training.init_state(init_fn, optimizer, training.make_mesh(), jax.random.key(4))
    assert (other.params["kernel"] != state.params["kernel"]).all()


def test_the_average_is_float32_whatever_the_parameters_are(optimizer):
    state = training.new_state({"a": jnp.array([1.2], jnp.bfloat16)}, optimizer)
    assert state.ema_params["a"].dtype == jnp.float32
    assert state.ema_params["a"] == jnp.bfloat16(1.2)


@pytest.mark.parametrize("born", ["new_state", "init_state"])
def test_no_two_arrays_share_a_buffer(optimizer, born):  # or it could not be donated
    params = init_fn(jax.random.key(0))
    expected = 2 * np.asarray(params["kernel"])
    if born == "new_state":
        state = training.new_state(params, optimizer)
    else:
        state = training.init_state(init_fn, optimizer, training.make_mesh(), jax.random.key(0))
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    np.testing.assert_array_equal(double(state).ema_params["kernel"], expected)


def test_the_abstract_state_describes_the_state_and_computes_nothing(optimizer):
    calls = []

    def counted(key):
        calls.append(isinstance(key, jax.core.Tracer))
        return init_fn(key)

    mesh = training.make_mesh()
    abstract = training.abstract_state(counted, optimizer, mesh)
    assert calls == [True]
    state = training.init_state(init_fn, optimizer, mesh, jax.random.key(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for described, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(described, jax.ShapeDtypeStruct)
        assert (described.shape, described.dtype, described.sharding) == (x.shape, x.dtype, x.sharding)


def test_it_holds_no_key_and_nothing_that_is_not_an_array(optimizer):
    state = training.new_state(init_fn(jax.random.key(0)), optimizer)
    assert state._fields == ("step", "params", "ema_params", "opt_state", "skipped_steps")
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
    adam = optax.tree.get(state, "mu")
    assert jax.tree.structure(adam) == jax.tree.structure(state.params)
