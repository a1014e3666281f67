"""The pool on a real GPU: same bits, same addresses, graphs and compiled code still valid."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from chrek.cuda.driver import Driver
from chrek.cuda.inventory import Nvml
from chrek.cuda.sequence import GpuState
from chrek.system.ids import HostPid
from chrek.workload.pool import PoolCorrupt, TensorPool
from chrek.workload.pool.digest import reference
from chrek.workload.pool.layout import BLOBS, from_json
from chrek.workload.pool.places import home
from gpu import harness

Start = Callable[[str], Popen[str]]

# Other people's libraries warn.
pytestmark = pytest.mark.filterwarnings("default")

MIB = 1 << 20
Torch = Any
"""The module, which has no types here."""


@pytest.fixture
def torch() -> Torch:
    """PyTorch with its context made."""
    module = pytest.importorskip("torch")
    module.zeros(1, device="cuda")
    return module


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory."""
    path = Path("/dev/shm") / f"chrek-test-{os.getpid()}"
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


def used_by_this_process() -> int:
    """Bytes that NVML says this process has on GPUs."""
    return sum(use.bytes or 0 for use in Nvml().read().of([HostPid(os.getpid())]))


def test_a_model_with_a_graph(torch: Torch, shm: Path) -> None:
    """GPU memory is given back while the pool is away; outputs are bit-identical afterwards."""
    pool = TensorPool()
    with pool:
        weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16).div_(64) for _ in range(16)]
        state = torch.optim.AdamW([weights[0].float().requires_grad_()])
    view = weights[3][7:9]
    x = torch.ones(16, 4096, device="cuda", dtype=torch.bfloat16)

    def forward(y: Torch) -> Torch:
        for weight in weights:
            y = torch.nn.functional.rms_norm(y @ weight, (4096,))
        return y

    forward(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(x)
    graph.replay()
    reference_result, reference_view = result.clone(), view.clone()
    addresses = [weight.data_ptr() for weight in weights]
    before = used_by_this_process()
    sys.stderr.write(f"offload: {pool.offload(str(shm))}\n")
    assert used_by_this_process() <= before - pool.size + 64 * MIB
    sys.stderr.write(f"onload: {pool.onload()}\n")
    result.zero_()
    graph.replay()
    assert torch.equal(result, reference_result)
    assert torch.equal(view, reference_view)
    assert [weight.data_ptr() for weight in weights] == addresses
    assert state.param_groups[0]["params"][0].sum().isfinite()
    assert not pool.failures


def test_the_kernel_computes_the_definition(torch: Torch, shm: Path) -> None:
    """The digests of the GPU are those of the definition in Python."""
    pool = TensorPool()
    data = os.urandom(MIB // 4)
    address = pool.allocate(2 * MIB)
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemsetD8_v2(ctypes.c_uint64(address), 0, ctypes.c_size_t(2 * MIB))
    driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))
    torch.cuda.synchronize()
    pool.offload(str(shm))
    index = from_json((shm / home("weights") / "index.json").read_text())
    assert index.digest == "lanes128"
    assert index.blobs[0].blocks[0].digest == reference(data + bytes(2 * MIB - len(data)))
    blob = next((shm / home("weights") / BLOBS).iterdir())
    assert blob.read_bytes()[: len(data)] == data


def test_a_damaged_file(torch: Torch, shm: Path) -> None:
    """One flipped bit is found on the GPU after the copy."""
    pool = TensorPool()
    with pool:
        tensor = torch.randn(64 * MIB, device="cuda")
    reference_tensor = tensor.clone()
    pool.offload(str(shm))
    blob = next((shm / home("weights") / BLOBS).iterdir())
    for attempt in range(2):
        with blob.open("r+b") as file:
            file.seek(12345)
            byte = file.read(1)[0]
            file.seek(12345)
            file.write(bytes([byte ^ 4]))
        if attempt == 0:
            with pytest.raises(PoolCorrupt, match=blob.name):
                pool.onload()
    pool.onload()
    assert torch.equal(tensor, reference_tensor)


def test_caches_and_later_allocations(torch: Torch, shm: Path) -> None:
    """A pool without contents keeps addresses; memory can be allocated in a pool after it is back."""
    weights, cache = TensorPool("weights"), TensorPool("cache", contents=False)
    with weights:
        model = torch.randn(32 * MIB, device="cuda")
    with cache:
        kv = torch.ones(64 * MIB, device="cuda")
    total, where = model.sum().item(), kv.data_ptr()
    for _ in range(2):
        for pool in (weights, cache):
            pool.offload(str(shm))
        for pool in (weights, cache):
            pool.onload()
        kv.fill_(2)
        assert (kv.data_ptr(), kv.sum().item(), model.sum().item()) == (where, 128.0 * MIB, total)
        with weights:
            extra = torch.full((MIB,), 3.0, device="cuda")
        assert extra.sum().item() == 3.0 * MIB
    assert not (shm / home("cache")).exists()


def test_twenty_round_trips(torch: Torch, shm: Path) -> None:
    """Neither GPU memory nor host memory grows."""
    pool = TensorPool()
    with pool:
        tensor = torch.randn(64 * MIB, device="cuda")
    total, used = tensor.sum().item(), []
    for _ in range(20):
        pool.offload(str(shm))
        pool.onload()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        used.append((used_by_this_process(), resident))
    assert tensor.sum().item() == total
    assert used[-1][0] == used[2][0]
    assert used[-1][1] < used[2][1] + 16 * MIB


def test_compiled_code(torch: Torch, shm: Path) -> None:
    """What torch.compile made of a model works on after the round trip."""
    pool = TensorPool()
    with pool:
        layer = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024)).cuda()
    compiled = torch.compile(layer)
    x = torch.ones(4, 1024, device="cuda")
    with torch.no_grad():
        before = compiled(x).clone()
        pool.offload(str(shm))
        pool.onload()
        assert torch.equal(compiled(x), before)


def test_cupy_through_the_pool(shm: Path) -> None:
    """CuPy allocates from a pool through its own hook."""
    cupy = pytest.importorskip("cupy")
    pool = TensorPool("cupy")
    allocator = cupy.cuda.PythonFunctionAllocator(pool.allocate, lambda address, _device: pool.free(address))
    with cupy.cuda.using_allocator(allocator.malloc):
        array = cupy.arange(4 * MIB, dtype=cupy.float32)
    total = float(array.sum())
    pool.offload(str(shm))
    pool.onload()
    assert float(array.sum()) == total
    del array
    assert pool.size == 0


def test_pool_and_driver_checkpoint(driver: Driver, start: Start, shm: Path) -> None:
    """Emptied, checkpointed by the driver, restored, filled: the graph gives the same bits; it ends well."""
    os.environ["CHREK_POOL_DIRECTORY"] = str(shm)
    process = start("pooled")
    sys.stderr.write(f"offload: {harness.ask(process)}\n")
    state = GpuState(driver)
    held = state.capture([HostPid(process.pid)])
    size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
    sys.stderr.write(f"held {dict(held.seconds)} resident {size / 1e9:.2f} GB resume {state.resume(held)}\n")
    answer = harness.ask(process)
    sys.stderr.write(f"onload: {answer}\n")
    assert answer.startswith("True")
    harness.ask(process)
    harness.ask(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


def test_closing(torch: Torch) -> None:
    """A closed pool gives back what tensors no longer use, and only that."""
    pool = TensorPool()
    with pool:
        kept, dropped = torch.ones(32 * MIB, device="cuda"), torch.ones(128 * MIB, device="cuda")
    del dropped
    pool.close()
    torch.cuda.synchronize()
    assert pool.size < 300 * MIB
    assert kept.sum().item() == 32.0 * MIB
    assert not pool.failures


def test_two_devices(torch: Torch, shm: Path) -> None:
    """One pool over two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool = TensorPool(devices=(0, 1))
    with pool:
        tensors = [torch.randn(64 * MIB, device=f"cuda:{device}") for device in (0, 1)]
    sums = [tensor.double().sum().item() for tensor in tensors]
    sys.stderr.write(f"offload: {pool.offload(str(shm))}\nonload: {pool.onload()}\n")
    assert [tensor.double().sum().item() for tensor in tensors] == sums


def test_import_of_torch_is_the_applications() -> None:
    """Importing the pool does not import PyTorch."""
    code = "import sys, chrek.workload.pool; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.util.find_spec("chrek.workload.pool") is not None
