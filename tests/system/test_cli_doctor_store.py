"""`chrek doctor` on a store: which of its checkpoints this machine can restore, and what keeps it from the others."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import pytest

from chrek.artifact import Facts, Gpu
from chrek.engine import facts, gpu
from chrek.errors import Reason
from chrek.store import Staging, Store
from chrekcli import chrek, chrek_json
from containers import needs
from gpu import cudastandin
from sample_store import CONTENTS, fill, make_manifest

pytestmark = needs("root", "criu")

HERE: dict[str, Any] = {
    "architecture": platform.machine(),
    "cpu_features": facts.cpu_features(),
    "memory_bytes": 1,
}
H100 = Gpu(uuid="GPU-00000001-0000-0000-0000-000000000000", model="NVIDIA H100 80GB HBM3", driver="580.159.04")


def _publish(store: Store, checkpoint_id: str, **other: Any) -> None:
    with Staging.create(store, checkpoint_id) as staging:
        made = make_manifest(checkpoint_id, fill(staging, CONTENTS))
        staging.publish(dataclasses.replace(made, facts=Facts(**{**HERE, **other})))


def test_what_cannot_be_restored_here_is_named(tmp_path: Path) -> None:
    """Each such checkpoint is a warning with its code and cure, a broken one too; the others are counted; nothing is missing."""
    with Store.open(tmp_path, create=True) as store:
        for name in ("good", "better"):
            _publish(store, name)
        _publish(store, "machine", architecture="riscv64")
        _publish(store, "processor", cpu_features=(*HERE["cpu_features"], "zz_quantum"))
        _publish(store, "gpus", gpus=(dataclasses.replace(H100, driver="1.2.3"),))
        _publish(store, "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    found = {each["name"]: each for each in chrek_json("doctor", store=tmp_path)["findings"]}
    assert "ARCH_MISMATCH: The checkpoint was taken on riscv64" in found["checkpoint machine"]["text"]
    assert "CPU_MISMATCH: This machine's processor lacks zz_quantum." in found["checkpoint processor"]["text"]
    assert "1.2.3" in found["checkpoint gpus"]["text"] or "H100" in found["checkpoint gpus"]["text"]
    assert found["checkpoint broken"]["text"].startswith("CORRUPT: ")
    warned = [each for name, each in found.items() if name.startswith("checkpoint ")]
    assert {each["level"] for each in warned} == {"warning"}
    assert all(each["cure"] for each in warned)
    assert found["checkpoints"] == {
        "name": "checkpoints",
        "level": "ok",
        "text": "2 can be restored on this machine",
        "cure": "",
    }
    assert "checkpoint good" not in chrek("doctor", store=tmp_path).stdout


@pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")
def test_gpus_of_the_machine(tmp_path: Path) -> None:
    """As many GPUs of each model, and the very driver, are needed; a machine without either says what the checkpoint needs."""
    manifest = make_manifest("x", {})

    def of(*gpus: Gpu) -> Any:  # noqa: ANN401 - a manifest
        return dataclasses.replace(manifest, facts=Facts(**HERE, gpus=gpus or None))

    with cudastandin.machine(tmp_path, gpus=2) as standin:
        standin.set_gpu(1, name="NVIDIA L4")
        library = str(standin.library)
        assert gpu.machine_lacks(of(), library=library) is None
        assert gpu.machine_lacks(of(H100), library=library) is None
        found = gpu.machine_lacks(of(H100, H100), library=library)
        assert found == (Reason.GPU_MISMATCH, "This machine lacks 1 x NVIDIA H100 80GB HBM3.")
        found = gpu.machine_lacks(of(dataclasses.replace(H100, driver="1.2.3")), library=library)
        assert found is not None
        assert found[0] is Reason.DRIVER_MISMATCH
    found = gpu.machine_lacks(of(H100), library=str(tmp_path / "none.so"))
    assert found is not None
    assert found[0] is Reason.GPU_DRIVER_MISSING
    assert "1 x NVIDIA H100" in found[1]
