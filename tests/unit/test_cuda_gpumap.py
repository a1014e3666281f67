"""Which GPU takes the place of which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.cuda.driver import GpuUuid
from chrek.cuda.gpumap import GIB, Gpu, check_driver, plan_map
from chrek.errors import Reason, Refused


def gpu(number: int, model: str = "H100", *, used: int = 0, free: int | None = None, memory: int = 80 * GIB) -> Gpu:
    """A GPU whose UUID is made from a number."""
    return Gpu(GpuUuid(bytes([number]) * 16), model, memory, minor=number, used=used, free=free)


def uuid(number: int) -> GpuUuid:
    """The UUID made from a number."""
    return GpuUuid(bytes([number]) * 16)


def test_the_same_gpus_need_no_map() -> None:
    """If every GPU is there again the map is empty, whatever the order."""
    assert plan_map([gpu(1), gpu(2)], [gpu(2), gpu(1), gpu(3)]) == {}


def test_identity_first_then_the_same_model() -> None:
    """A GPU that is there stays itself; the map then names it too."""
    assert plan_map([gpu(1), gpu(2)], [gpu(3), gpu(2)]) == {uuid(1): uuid(3), uuid(2): uuid(2)}


def test_another_gpu_of_the_same_model() -> None:
    """GPUs that are gone are replaced in the order of both lists."""
    assert plan_map([gpu(1), gpu(2)], [gpu(8), gpu(9)]) == {uuid(1): uuid(8), uuid(2): uuid(9)}


def test_models_are_kept_apart() -> None:
    """Each GPU goes to one of its own model."""
    planned = plan_map([gpu(1), gpu(2, "A100")], [gpu(7, "A100"), gpu(8)])
    assert planned == {uuid(1): uuid(8), uuid(2): uuid(7)}


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        ([gpu(1)], [], "here is no GPU"),
        ([gpu(1), gpu(2)], [gpu(3)], "needs 2 x H100; here is 1 x H100"),
        ([gpu(1)], [gpu(3, "A100")], "here is 1 x A100"),
        ([gpu(1)], [gpu(3, memory=40 * GIB)], "needs 1 x H100"),
        ([gpu(1, used=60 * GIB)], [gpu(1, free=20 * GIB)], "20.0 GiB free; the checkpoint needs 60.0 GiB"),
    ],
)
def test_refusals(saved: list[Gpu], here: list[Gpu], words: str) -> None:
    """Too few GPUs, another model or too little memory are refused, and the message says what is there."""
    with pytest.raises(Refused, match=words) as caught:
        plan_map(saved, here)
    assert caught.value.reason is Reason.GPU_MISMATCH


@given(st.sets(st.integers(1, 30), min_size=1), st.sets(st.integers(1, 30), min_size=1))
def test_a_map_is_complete_and_one_to_one(saved: set[int], here: set[int]) -> None:
    """A map names every saved GPU once and gives each a GPU of its own."""
    if len(here) < len(saved):
        with pytest.raises(Refused):
            plan_map([gpu(n) for n in saved], [gpu(n) for n in here])
        return
    planned = plan_map([gpu(n) for n in saved], [gpu(n) for n in here])
    if saved <= here:
        assert planned == {}
    else:
        assert set(planned) == {uuid(n) for n in saved}
        assert len(set(planned.values())) == len(saved)


def test_another_driver_is_refused() -> None:
    """The message names both versions."""
    check_driver("580.1", "580.1")
    with pytest.raises(Refused, match=r"needs driver 580.1; here is 570.2") as caught:
        check_driver("580.1", "570.2")
    assert caught.value.reason is Reason.DRIVER_MISMATCH


@pytest.mark.parametrize("text", ["", "GPU-12", "MIG-01010101-0101-0101-0101-010101010101", "GPU-zz"])
def test_uuids_that_are_none(text: str) -> None:
    """Only the UUID of a whole GPU is read as one."""
    with pytest.raises(ValueError, match=r"UUID|hexadecimal"):
        GpuUuid.parse(text)


def test_uuid_round_trip() -> None:
    """A UUID is written as nvidia-smi writes it."""
    text = "GPU-01020304-0506-0708-090a-0b0c0d0e0f10"
    assert str(GpuUuid.parse(text)) == text
