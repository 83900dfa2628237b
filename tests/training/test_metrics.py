import json
import math
import struct

import numpy as np
import pytest

from ddpm_jax.training.metrics import MetricsWriter, summarize

# metrics.jsonl


def strict(text: str) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_fresh_run_writes_one_line_a_step_at_once(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run", first_step=0) as writer:
        path = tmp_path / "new" / "run" / "metrics.jsonl"
        for step in (10, 20):
            writer.write(step, {"loss": 0.5, "skipped_steps": 0})
            assert strict(path.read_text())[-1] == {"step": step, "loss": 0.5, "skipped_steps": 0}
    assert [line["step"] for line in strict(path.read_text())] == [10, 20]


def test_what_is_not_finite_becomes_null(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5}]


LINES = '{"step": 10, "loss": 3.0}\n{"step": 20, "loss": null}\n{"step": 30, "loss": 1.0}\n'


@pytest.mark.parametrize(
    ("before", "first_step", "kept"),
    [
        pytest.param(LINES, 30, LINES, id="whole"),
        pytest.param(LINES, 25, LINES[:53], id="later lines"),
        pytest.param(LINES, 0, "", id="fresh run in an old folder"),
        pytest.param(LINES + '{"step": 30, "lo', 40, LINES, id="torn"),
        pytest.param(LINES + '{"step": 30, "lo\n', 40, LINES, id="torn, with a newline"),
        pytest.param(LINES + '{"step": 40, "loss": 1.0}', 40, LINES, id="without its newline"),
        pytest.param(LINES + '{"step": 4', 20, LINES[:53], id="torn and later lines"),
        pytest.param('{"step": 10, "loss": 9.0}\n' + LINES, 30, LINES, id="a step twice"),
        pytest.param(LINES + "\x00\x00\n\n[1]\n{}\n", 40, LINES, id="lines that are none"),
        pytest.param("", 40, "", id="empty"),
    ],
)
def test_a_resumed_run_keeps_each_step_up_to_its_own_once(tmp_path, before, first_step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    with MetricsWriter(tmp_path, first_step) as writer:
        assert path.read_text() == kept
        writer.write(50, {"loss": 0.0})
    assert path.read_text() == kept + '{"step": 50, "loss": 0.0}\n'
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_bytes_that_are_no_text_go_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES.encode() + b"\xff\xfe\n")
    MetricsWriter(tmp_path, first_step=30).close()
    assert path.read_text() == LINES


def test_other_processes_touch_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", first_step=0, enabled=False) as writer:
        writer.write(1, {"loss": 0.5})
        writer.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


# TensorBoard


def read_events(folder) -> list:
    """All events of a folder, by the TFRecord framing: length (8 bytes), its CRC (4), the event, its CRC (4)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_tensorboard_gets_the_finite_scalars_and_the_pictures(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.write(10, {"loss": 0.5, "loss_q1": math.nan})
        writer.image(10, "gray", np.zeros((4, 6, 1), np.uint8))
        writer.image(10, "colour", np.zeros((4, 6, 3), np.uint8))
    values = [(event.step, value) for event in read_events(tmp_path / "tensorboard") for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(10, "loss"), (10, "gray"), (10, "colour")]
    assert values[0][1].simple_value == 0.5
    assert all((value.image.height, value.image.width) == (4, 6) for _, value in values[1:])
    assert all(value.image.encoded_image_string.startswith(b"\x89PNG") for _, value in values[1:])


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for first_step in (0, 10):  # within one second: no file overwrites the other
        with MetricsWriter(tmp_path, first_step) as writer:
            writer.write(first_step + 10, {"loss": 0.5})
    events = read_events(tmp_path / "tensorboard")
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 11]  # "purge this step and all after it"
    assert sorted(event.step for event in events if event.summary.value) == [10, 20]


def test_closing_twice_does_no_harm(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.write(1, {"loss": 0.5})
        writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


# The line of an interval


def step_metrics(**changes):
    step = {
        "loss": np.float32(2.0),
        "loss_sums": np.array([1.0, 2.0, 3.0, 0.0], np.float32),
        "loss_counts": np.array([1, 1, 2, 0], np.int32),
        "grad_norm": np.float32(4.0),
        "learning_rate": np.float32(0.5),
        "skipped": np.int32(0),
        "skipped_steps": np.int32(3),
    }
    return {**step, **changes}


def test_an_interval_in_numbers_worked_out_by_hand():
    second = step_metrics(
        loss=np.float32(4.0),
        loss_sums=np.array([5.0, 0.0, 1.0, 0.0], np.float32),
        loss_counts=np.array([2, 0, 2, 0], np.int32),
        grad_norm=np.float32(1.0),
        learning_rate=np.float32(0.25),
    )
    line = summarize([step_metrics(), second], images_per_second=100.0)
    assert math.isnan(line.pop("loss_q4"))  # no example fell into that quarter
    assert line == {
        "loss": 3.0,
        "loss_q1": 2.0,  # (1 + 5) / (1 + 2): by examples; the mean of the two means is 1.75
        "loss_q2": 2.0,
        "loss_q3": 1.0,
        "grad_norm": 2.5,
        "learning_rate": 0.25,
        "images_per_second": 100.0,
        "skipped_steps": 3,
    }


def test_a_skipped_step_counts_and_leaves_the_means_alone():
    skipped = step_metrics(
        loss=np.float32(np.nan),
        loss_sums=np.full(4, np.nan, np.float32),
        loss_counts=np.ones(4, np.int32),
        grad_norm=np.float32(np.inf),
        skipped=np.int32(1),
        skipped_steps=np.int32(4),
    )
    line = summarize([step_metrics(), skipped], images_per_second=1.0)
    alone = summarize([step_metrics()], images_per_second=1.0)
    np.testing.assert_equal(line, {**alone, "skipped_steps": 4})
    assert all(math.isnan(summarize([skipped], 1.0)[name]) for name in ("loss", "loss_q1", "grad_norm"))


def test_the_line_has_the_keys_of_metrics_jsonl_in_their_order():
    keys = "loss loss_q1 loss_q2 loss_q3 loss_q4 grad_norm learning_rate images_per_second skipped_steps"
    assert list(summarize([step_metrics()], 1.0)) == keys.split()


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="no step"):
        summarize([], images_per_second=1.0)
