import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ddpm_jax import training
from ddpm_jax.training import checkpoint

MESH = training.make_mesh(1)
OPTIMIZER = training.make_optimizer(
    training.make_learning_rate(0.1, warmup_steps=0, decay="constant", num_steps=9),
    weight_decay=0.0,
    grad_clip_norm=1.0,
)


def init_fn(key):
    return {"kernel": jax.random.normal(key, (64, 32)), "block": {"bias": jnp.zeros(5)}}


ABSTRACT = training.abstract_state(init_fn, OPTIMIZER, MESH)


def state_of(step):
    """Another one for each step, and nothing in it that is zero."""
    rng = np.random.default_rng(step)

    def fill(x):
        values = rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.integers(1, 100, x.shape)
        return jax.device_put(np.asarray(values, x.dtype), x.sharding)

    return jax.tree.map(fill, ABSTRACT)._replace(step=jnp.int32(step))


def write(workdir, *steps, **options):
    with training.open_checkpoints(str(workdir), **options) as checkpoints:
        for step in steps:
            training.save(checkpoints, state_of(step))
        checkpoints.wait_until_finished()
        return sorted(checkpoints.all_steps())


def assert_same(one, two):
    assert type(one) is type(two) is training.TrainState
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def truncate(folder):
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_data(folder):
    for path in list(folder.rglob("d")):
        shutil.rmtree(path)


def lose_metadata(folder):
    (folder / "state" / "_METADATA").unlink()


def lose_item(folder):
    shutil.rmtree(folder / "state")


def lose_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate, lose_data, lose_metadata, lose_item, lose_all]


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    write(tmp_path, 3, 7)
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(7))
        assert_same(training.restore(checkpoints, 3, ABSTRACT), state_of(3))


def test_without_a_checkpoint_there_is_none(tmp_path):
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        assert training.restore_latest(checkpoints, ABSTRACT) is None


def test_a_relative_workdir_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write("run", 1) == [1]
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_bare_checkpoint_manager_reads_it(tmp_path):
    write(tmp_path, 4)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as bare:
        assert bare.latest_step() == 4
        found = bare.restore(4)["state"]
    np.testing.assert_array_equal(found["params"]["kernel"], state_of(4).params["kernel"])
    np.testing.assert_array_equal(found["ema_params"]["block"]["bias"], state_of(4).ema_params["block"]["bias"])
    assert int(found["step"]) == 4


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, [50, 60]),
        ({"keep_last": 1, "keep_every": 30}, [30, 60]),
        ({"keep_last": 2, "keep_every": 20}, [20, 40, 50, 60]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_which_ones_are_kept(tmp_path, options, kept):
    assert write(tmp_path, *range(10, 70, 10), **options) == kept
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_step_that_is_there_is_kept(tmp_path):
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        training.save(checkpoints, state_of(5))
        training.save(checkpoints, state_of(6)._replace(step=jnp.int32(5)))  # while the first is being written
        checkpoints.wait_until_finished()
        training.save(checkpoints, state_of(7)._replace(step=jnp.int32(5)))
        checkpoints.wait_until_finished()
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(5))


def test_a_state_that_is_donated_after_save_was_saved_as_it_was(tmp_path):
    state = state_of(5)
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        training.save(checkpoints, state)
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
        checkpoints.wait_until_finished()
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(5))


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_passed_over_and_can_be_saved_again(tmp_path, damage):
    write(tmp_path, 3, 5, 7)
    damage(tmp_path / "checkpoints" / "7")
    remains = files(tmp_path / "checkpoints" / "7")
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        with pytest.warns(UserWarning, match=r"checkpoint 7 is damaged .*; moved to .*using the one before it"):
            assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(5))
        assert sorted(checkpoints.all_steps()) == [3, 5]
        (aside,) = (tmp_path / "damaged_checkpoints").iterdir()
        assert aside.name.startswith("7_")
        assert files(aside) == remains
        training.save(checkpoints, state_of(7))
        checkpoints.wait_until_finished()
    with training.open_checkpoints(str(tmp_path)) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(7))


def test_two_damaged_ones_in_a_row(tmp_path):
    write(tmp_path, 3, 5, 7)
    truncate(tmp_path / "checkpoints" / "7")
    lose_all(tmp_path / "checkpoints" / "5")
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        with pytest.warns(UserWarning, match="is damaged") as caught:
            assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(3))
        assert len([w for w in caught if "is damaged" in str(w.message)]) == 2
        assert list(checkpoints.all_steps()) == [3]


@pytest.mark.parametrize("damage", [truncate, lose_all])
def test_where_none_can_be_read_one_line_says_so_and_nothing_moves(tmp_path, damage):
    write(tmp_path, 3, 5)
    for step in ("3", "5"):
        damage(tmp_path / "checkpoints" / step)
    before = files(tmp_path)
    message = r"none of its 2 checkpoints can be read: checkpoint 5 is damaged \(.+\); "
    with (
        training.open_checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(ValueError, match=message) as caught,
    ):
        training.restore_latest(checkpoints, ABSTRACT)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert files(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5"]


def test_a_reader_moves_nothing(tmp_path):
    write(tmp_path, 3, 5)
    truncate(tmp_path / "checkpoints" / "5")
    before = files(tmp_path)
    with (
        training.open_checkpoints(str(tmp_path), read_only=True) as checkpoints,
        pytest.warns(UserWarning, match="checkpoint 5 is damaged") as caught,
    ):
        assert_same(training.restore_latest(checkpoints, ABSTRACT, move_damaged=False), state_of(3))
    assert not any("moved" in str(w.message) for w in caught)
    assert files(tmp_path) == before
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_a_reader_of_nothing_makes_nothing(tmp_path):
    with training.open_checkpoints(str(tmp_path / "run"), read_only=True) as checkpoints:
        assert list(checkpoints.all_steps()) == []
    assert not (tmp_path / "run").exists()


def test_what_was_left_half_written_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 3)
    whole = tmp_path / "checkpoints" / "3"
    shutil.copytree(whole, tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp")
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(3))
        training.save(checkpoints, state_of(5))
        checkpoints.wait_until_finished()
        assert_same(training.restore_latest(checkpoints, ABSTRACT), state_of(5))


def test_one_that_another_process_cannot_read_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path, 3, 7)
    answers = iter([False, True])
    monkeypatch.setattr(checkpoint, "_all", lambda here: here and next(answers))
    with training.open_checkpoints(str(tmp_path)) as checkpoints:
        with pytest.warns(UserWarning, match="checkpoint 7 is damaged .another process cannot read it"):
            found = training.restore_latest(checkpoints, ABSTRACT)
        assert_same(found, state_of(3))
        assert checkpoints.all_steps() == [3]


def test_a_peer_s_silence_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, 3, 7)
    with training.open_checkpoints(str(tmp_path)) as checkpoints:

        def wait(*_, **__):
            raise TimeoutError("barrier")

        monkeypatch.setattr(checkpoints, "restore", wait)
        with pytest.raises(TimeoutError):
            training.restore_latest(checkpoints, ABSTRACT)
        assert sorted(checkpoints.all_steps()) == [3, 7]
    assert not (tmp_path / "damaged_checkpoints").exists()
