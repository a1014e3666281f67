"""How many captures run at a time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from chrek.agent.slots import Slots, gpus_of

NONE: frozenset[str] = frozenset()


def test_node_limit_queue_and_release() -> None:
    """So many at a time and no more; who comes later is in the queue until a slot is free."""
    slots = Slots(node=2, gpu=1)
    with slots.take("a", NONE, who="1") as first, ExitStack() as stack:
        assert first
        assert stack.enter_context(slots.take("b", NONE, who="2"))
        assert not stack.enter_context(slots.take("c", NONE, who="3"))
        assert slots.queued() == 1
    with slots.take("c", NONE, who="3") as third:
        assert third
        assert slots.queued() == 0


def test_one_at_a_time_for_an_id_and_for_a_gpu() -> None:
    """Two captures of one id, or on one GPU, never run together."""
    slots = Slots(node=9, gpu=1)
    with slots.take("a", frozenset({"0", "1"}), who="1") as first:
        assert first
        with slots.take("a", NONE, who="2") as same_id:
            assert not same_id
        with slots.take("b", frozenset({"1"}), who="3") as same_gpu:
            assert not same_gpu
        with slots.take("b", frozenset({"2"}), who="3") as other_gpu:
            assert other_gpu


def test_slot_is_given_back_by_a_capture_that_raises() -> None:
    """A failure frees the slot; a pod that is gone leaves the queue."""
    slots = Slots(node=1, gpu=1)
    with pytest.raises(ZeroDivisionError), slots.take("a", NONE, who="1"):
        _ = 1 // 0
    with slots.take("b", NONE, who="2") as free, slots.take("c", NONE, who="3") as waits:
        assert free
        assert not waits
        slots.forget("3")
        assert slots.queued() == 0


def test_gpus_of_a_runtime_spec() -> None:
    """GPUs are known by their device nodes, or by the variable the GPU runtime reads."""
    devices = [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidiactl"}, {"path": "/dev/fuse"}]
    assert gpus_of({"linux": {"devices": devices}}) == {"/dev/nvidia0"}
    assert gpus_of({"process": {"env": ["NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2"]}}) == {"GPU-1", "GPU-2"}
    assert gpus_of({"process": {"env": ["NVIDIA_VISIBLE_DEVICES=void"]}}) == NONE
    assert gpus_of({}) == NONE
