import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import make_learning_rate, make_optimizer


def constant(value):
    return make_learning_rate(value, warmup_steps=0, decay="constant", num_steps=100)


def adamw64(params, grads, learning_rates, weight_decay, clip):
    """Kingma & Ba 2015, algorithm 1, with Loshchilov & Hutter's decay, after a clip of the norm over all arrays."""
    m = {name: 0.0 * x for name, x in params.items()}
    v = dict(m)
    for i, (grad, rate) in enumerate(zip(grads, learning_rates, strict=True), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for name, x in params.items():
            g = scale * grad[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            adam = m[name] / (1 - 0.9**i) / (np.sqrt(v[name] / (1 - 0.999**i)) + 1e-8)
            params = params | {name: x - rate * (adam + weight_decay * x)}
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_against_float64(clip, weight_decay):
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    # The norms go from 0.04 to 40, so that a clip at 1 bites on some steps and only there.
    grads = [
        {name: size * rng.normal(size=x.shape) for name, x in start.items()} for size in (0.01, 1, 0.1, 10, 1, 0.1)
    ]
    learning_rate = make_learning_rate(0.05, warmup_steps=3, decay="cosine", num_steps=6)
    optimizer = make_optimizer(learning_rate, weight_decay=weight_decay, grad_clip_norm=clip)
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grad), state, params)
        params = optax.apply_updates(params, updates)
    rates = [0.05 * (i / 3 if i < 3 else (1 + math.cos(math.pi * (i - 3) / 3)) / 2) for i in range(6)]
    expected = adamw64(start, grads, rates, weight_decay, clip)
    for name, x in expected.items():
        np.testing.assert_allclose(params[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 500, 5000])
def test_learning_rates(decay, warmup):
    peak, num_steps = 2e-4, 8000
    learning_rate = make_learning_rate(peak, warmup_steps=warmup, decay=decay, num_steps=num_steps)
    for step in (0, 1, 2, 250, 499, 500, 501, 2500, 4999, 5000, 6500, 7999, 8000, 9000):
        expected = peak * min(step / warmup, 1) if warmup else peak
        if decay == "cosine" and step >= warmup:
            expected = (
                peak * (1 + math.cos(math.pi * min(step - warmup, num_steps - warmup) / (num_steps - warmup))) / 2
            )
        np.testing.assert_allclose(learning_rate(jnp.int32(step)), expected, rtol=1e-4, atol=1e-10)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    learning_rate = make_learning_rate(1.0, warmup_steps=100, decay="cosine", num_steps=10)
    np.testing.assert_allclose([learning_rate(jnp.int32(i)) for i in (0, 5, 10)], [0, 0.05, 0.1], rtol=1e-5)


def test_the_structure_of_the_state_does_not_depend_on_the_numbers():  # so that a run resumes with others
    params = {"a": jnp.zeros(3)}
    options = [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.1, 1.0)]
    rates = [
        make_learning_rate(1.0, warmup_steps=w, decay=d, num_steps=9) for w in (0, 5) for d in ("constant", "cosine")
    ]
    states = [
        make_optimizer(rate, weight_decay=decay, grad_clip_norm=clip).init(params)
        for decay, clip in options
        for rate in rates
    ]
    assert len({jax.tree.structure(state) for state in states}) == 1


def test_without_decay_it_is_adam():
    params, grad = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([0.3, 0.1])}
    found = make_optimizer(constant(0.1), weight_decay=0.0, grad_clip_norm=0.0)
    one, _ = found.update(grad, found.init(params), params)
    two, _ = optax.adam(0.1).update(grad, optax.adam(0.1).init(params), params)
    np.testing.assert_array_equal(one["a"], two["a"])
