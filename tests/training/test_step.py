import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import training

RATE, DECAY, BATCH = 0.05, 0.9, 8


def init_fn(key):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}


def loss_fn(params, batch, keys):
    """Least squares with drawn targets; a batch may ask for a loss that is NaN or a gradient that is infinite."""
    drawn = jax.vmap(jax.random.normal)(keys)
    losses = (batch["x"] @ params["w"] + params["b"] - drawn) ** 2
    inside = jnp.where(batch["steep"], params["w"][0] - jax.lax.stop_gradient(params["w"][0]), 1.0)
    loss = losses.mean() + jnp.sqrt(inside).mean() + jnp.where(batch["nan"], jnp.nan, 0.0).sum()
    return loss, {"drawn": jnp.zeros(BATCH).at[batch["place"]].add(drawn), "count": jnp.float32(len(keys))}


def make_batch(seed=0, nan=False, steep=False):
    return {
        "x": np.random.default_rng(seed).normal(size=(BATCH, 3)).astype(np.float32),
        "place": np.arange(BATCH, dtype=np.int32),
        "nan": np.array([nan] + [False] * (BATCH - 1)),
        "steep": np.array([False] * (BATCH - 1) + [steep]),
    }


def make(learning_rate=RATE, loss_fn=loss_fn, clip=0.0, accumulate=1, prepare=lambda batch: batch, warmup=0, **options):
    rate = training.make_learning_rate(learning_rate, warmup_steps=warmup, decay="constant", num_steps=100)
    optimizer = training.make_optimizer(rate, weight_decay=0.0, grad_clip_norm=clip)
    mesh = training.make_mesh(1)
    abstract = training.abstract_state(init_fn, optimizer, mesh)
    step = training.make_train_step(
        mesh,
        jax.tree.map(lambda x: x.sharding, abstract),
        dict.fromkeys(make_batch(), training.batch_sharding(mesh)),
        accumulate=accumulate,
        loss_fn=loss_fn,
        optimizer=optimizer,
        learning_rate=rate,
        prepare=prepare,
        **{"ema_decay": DECAY} | options,
    )
    return step, lambda: training.init_state(init_fn, optimizer, mesh, jax.random.key(7))


@functools.cache
def default():
    return make()


def drawn_targets(key, step):
    """One key an example: fold_in(fold_in(key, step), i)."""
    step_key = jax.random.fold_in(key, step)
    return np.array([jax.random.normal(jax.random.fold_in(step_key, i)) for i in range(BATCH)], np.float64)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_steps_against_float64():
    step, born = default()
    state, key = born(), jax.random.key(1)
    w, b = np.asarray(state.params["w"], np.float64), 0.0
    theta = np.append(w, b)
    ema, m, v = theta.copy(), np.zeros(4), np.zeros(4)
    for n in range(12):
        batch = make_batch(n)
        state, metrics = step(state, batch, key)
        design = np.hstack([batch["x"].astype(np.float64), np.ones((BATCH, 1))])
        residual = design @ theta - drawn_targets(key, n)
        grad = 2 * design.T @ residual / BATCH
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        theta = theta - RATE * (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        decay = min(DECAY, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * theta
        np.testing.assert_allclose(metrics["loss"], (residual**2).mean() + 1, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-4)
        np.testing.assert_allclose(np.append(state.params["w"], state.params["b"]), theta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.append(state.ema_params["w"], state.ema_params["b"]), ema, rtol=1e-4, atol=1e-5)
        assert (int(state.step), int(state.skipped_steps)) == (n + 1, 0)
        assert (int(metrics["skipped"]), int(metrics["skipped_steps"])) == (0, 0)
        np.testing.assert_allclose(metrics["learning_rate"], RATE, rtol=1e-6)


def test_grad_norm_is_measured_before_the_clip():
    plain, born = default()
    clipped, _ = make(clip=1e-3)
    key = jax.random.key(1)
    norms = [step(born(), make_batch(), key)[1]["grad_norm"] for step in (plain, clipped)]
    assert norms[0] == norms[1] > 0.1


# The average


def test_the_average_is_that_of_the_formula_over_many_steps():
    step, born = make(ema_decay=0.95)
    state, key, trail = born(), jax.random.key(1), []
    ema = np.asarray(state.params["w"], np.float64)
    for n in range(200):  # (1 + n) / (10 + n) = .95 at n = 170
        state, _ = step(state, make_batch(n % 5), key)
        decay = min(0.95, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["w"], np.float64)
        trail.append(np.abs(np.asarray(state.ema_params["w"]) - ema).max())
    assert max(trail) < 1e-6
    assert np.abs(np.asarray(state.params["w"]) - ema).max() > 1e-3


def test_before_ema_start_the_average_is_a_copy():
    step, born = make(ema_start=3)
    state, key = born(), jax.random.key(1)
    for n in range(5):
        before = bits(state.ema_params)
        state, _ = step(state, make_batch(n), key)
        assert (bits(state.ema_params) == bits(state.params)) == (n < 3)
        assert bits(state.ema_params) != before


def test_the_average_of_a_constant_does_not_drift():
    """Exact where the compiler fuses multiply and add, as on CPU and GPU; elsewhere one unit in the last place."""
    constant = {"w": jax.random.normal(jax.random.key(0), (10_000,))}
    optimizer = optax.sgd(0.0)

    @jax.jit
    def step(state, n):
        return training.train_step(
            state._replace(step=n),
            {"x": jnp.zeros(2)},
            jax.random.key(1),
            loss_fn=lambda params, batch, keys: (params["w"].sum(), {}),
            optimizer=optimizer,
            learning_rate=lambda count: count,
            ema_decay=0.9999,
        )[0]

    state = training.new_state(constant, optimizer)
    for n in [*range(100), 500, 5_000, 50_000, 500_000, *range(1_000_000, 1_001_000)]:
        state = step(state, jnp.int32(n))
    np.testing.assert_array_equal(state.params["w"], constant["w"])
    np.testing.assert_array_max_ulp(np.asarray(state.ema_params["w"]), np.asarray(constant["w"]), maxulp=1)


# The guard


@pytest.fixture(params=["branch", "selection"])
def guard(request, monkeypatch):
    """What a CPU does where a step is not finite, and what accelerators do."""
    if request.param == "selection":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    elif jax.default_backend() != "cpu":
        pytest.skip("only a CPU branches")


@pytest.mark.parametrize("bad", ["nan", "steep"])
def test_a_step_that_is_not_finite_changes_nothing(bad, guard):
    step, born = make()
    state, key = born(), jax.random.key(1)
    skipped = 0
    for n in range(6):
        before = bits(state._replace(step=0, skipped_steps=0))
        counts = [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]  # of Adam and of the rate
        is_bad = n in (0, 2, 3)
        state, metrics = step(state, make_batch(n, **({bad: True} if is_bad else {})), key)
        skipped += is_bad
        assert (bits(state._replace(step=0, skipped_steps=0)) == before) == is_bad
        assert (int(state.step), int(state.skipped_steps)) == (n + 1, skipped)
        assert (int(metrics["skipped"]), int(metrics["skipped_steps"])) == (int(is_bad), skipped)
        assert bool(np.isfinite(metrics["loss"])) == (not (is_bad and bad == "nan"))
        assert bool(np.isfinite(metrics["grad_norm"])) == (not (is_bad and bad == "steep"))
        assert counts == [n + is_bad - skipped] * 2
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_only_a_cpu_branches(guard, request):
    step, born = make()
    compiled = step.lower(born(), make_batch(0), jax.random.key(1)).compile().as_text()
    assert (" conditional(" in compiled) == (request.node.callspec.params["guard"] == "branch")


def test_the_learning_rate_stands_still_while_steps_are_skipped():
    step, born = make(warmup=4)
    state, key, rates = born(), jax.random.key(1), []
    for n in range(6):
        state, metrics = step(state, make_batch(n, nan=n in (1, 2)), key)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, RATE * np.array([0, 1, 1, 1, 2, 3]) / 4, rtol=1e-6)


def test_after_a_skipped_step_come_another_batch_and_other_noise():
    step, born = default()
    key, batch = jax.random.key(1), make_batch(nan=True)
    state, first = step(born(), batch, key)
    _, second = step(state, batch, key)
    assert (first["drawn"] != second["drawn"]).all()


# Accumulation


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_whole(accumulate):
    whole, born = default()
    parts, _ = make(accumulate=accumulate)
    one, two, key = born(), born(), jax.random.key(1)
    for n in range(3):
        one, metrics = whole(one, make_batch(n), key)
        two, part_metrics = parts(two, make_batch(n), key)
        np.testing.assert_array_equal(part_metrics["drawn"], metrics["drawn"])  # each example kept its key
        assert part_metrics["count"] == metrics["count"] == BATCH
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


def test_micro_batches_split_the_batch_evenly():
    seen = []

    def spy(params, batch, keys):
        seen.append((batch["x"].shape, keys.shape))
        return loss_fn(params, batch, keys)

    step, born = make(accumulate=4, loss_fn=spy)
    step(born(), make_batch(), jax.random.key(1))
    assert set(seen) == {((2, 3), (2,))}


def test_a_cpu_alone_unrolls_the_loop_over_micro_batches():
    """Within loops XLA for a CPU does not bring the gradients of convolutions into the order that is fast."""

    def loops(accumulate):
        step, born = make(accumulate=accumulate)
        traced = step.trace(born(), make_batch(), jax.random.key(1))
        programs = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda"))
        return np.array([program.count("stablehlo.while") for program in programs])

    np.testing.assert_array_equal(loops(4) - loops(1), [0, 1, 1])  # a CPU has others, for its random numbers


def test_one_bad_micro_batch_skips_the_whole_step():
    step, born = make(accumulate=4)
    state = born()
    before = bits(state.params)
    state, metrics = step(state, make_batch(nan=True), jax.random.key(1))
    assert (int(metrics["skipped"]), bits(state.params)) == (1, before)


# Randomness


def test_a_step_is_a_function_of_state_batch_and_key():
    step, born = default()
    key = jax.random.key(1)
    once, twice = (step(born(), make_batch(), key) for _ in range(2))
    assert bits(once) == bits(twice)
    other = step(born(), make_batch(), jax.random.key(2))
    assert (other[1]["drawn"] != once[1]["drawn"]).all()


def test_each_example_of_each_step_draws_its_own():
    step, born = default()
    state, key, drawn = born(), jax.random.key(1), []
    for n in range(4):
        state, metrics = step(state, make_batch(n), key)
        np.testing.assert_allclose(metrics["drawn"], drawn_targets(key, n), rtol=1e-5)
        drawn += metrics["drawn"].tolist()
    assert len(set(drawn)) == 4 * BATCH


# The jitted step


def test_the_state_is_donated_and_the_step_compiles_once():
    traces = []

    def counted(params, batch, keys):
        traces.append(1)
        return loss_fn(params, batch, keys)

    step, born = make(loss_fn=counted)
    state, key = born(), jax.random.key(1)
    for n in range(4):
        old = state
        state, metrics = step(state, make_batch(n), key)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        jax.block_until_ready(metrics)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_prepare_runs_inside_the_program():
    traced = []

    def double(batch):
        traced.append(isinstance(batch["x"], jax.core.Tracer))
        return batch | {"x": 2 * batch["x"]}

    step, born = make(prepare=double)
    plain, _ = default()
    batch, key = make_batch(), jax.random.key(1)
    _, found = step(born(), batch, key)
    _, expected = plain(born(), batch | {"x": 2 * batch["x"]}, key)
    assert traced == [True]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
