"""Whether a checkpoint of a GPU application is one of this pod's application, too: by model and driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.artifact import Gpu, Manifest
from chrek.engine import gpu
from chrek.engine.container import Container as Looked
from containers import needs
from gpu import cudastandin
from sample_store import make_manifest
from system.cycle import Make

pytestmark = [
    needs("containers"),
    pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver"),
]

H100, DRIVER = "NVIDIA H100 80GB HBM3", "580.159.04"


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[cudastandin.StandIn]:
    """A machine with two GPUs."""
    with cudastandin.machine(tmp_path, gpus=2) as made:
        yield made


def _manifest(*models: str, driver: str = DRIVER) -> Manifest:
    found = make_manifest("x", {})
    gpus = tuple(
        Gpu(uuid=f"GPU-{i:08x}-0000-0000-0000-000000000000", model=m, driver=driver) for i, m in enumerate(models)
    )
    return dataclasses.replace(found, facts=dataclasses.replace(found.facts, gpus=gpus or None))


def test_models_and_driver(container: Make, standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """Another model, another driver, no GPU, and no driver at all are told; the same model counts whatever their number."""
    standin.set_gpu(1, name="NVIDIA L4")
    with_one = container(["sh", "-c", "touch /dev/nvidia0; sleep 1000"])
    with_one.until((with_one.root / "dev/nvidia0").exists, what="the device node")
    here, without = Looked(with_one.pid1), Looked(container(["sleep", "1000"]).pid1)
    library = str(standin.library)
    assert gpu.differing(_manifest(), here, library=library) == []
    assert gpu.differing(_manifest(H100), here, library=library) == []
    assert gpu.differing(_manifest(H100, H100), here, library=library) == []
    assert gpu.differing(_manifest("NVIDIA L4"), here, library=library) == [
        f"its GPUs are NVIDIA L4, this pod's {H100}"
    ]
    assert gpu.differing(_manifest(H100, driver="570.1"), here, library=library) == [
        f"its driver is 570.1, this node's {DRIVER}"
    ]
    assert gpu.differing(_manifest(H100), without, library=library) == [f"its GPUs are {H100}, this pod's none"]
    (told,) = gpu.differing(_manifest(H100), here, library=str(tmp_path / "none.so"))
    assert "none.so" in told
