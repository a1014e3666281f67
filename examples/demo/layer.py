"""The demo's image: the server in ``image/``, on the packages it imports, on the containers' base."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from containers import base_root

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache/demo"
# The base's Python and C library (Debian 12), whatever Python runs this.
PYTHON = ("--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


def image_layers() -> list[Path]:
    """Return the layers above the base, the uppermost first; the packages are installed on first use."""
    return [HERE / "image", _packages()]


def _packages() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    inputs = [(HERE / name).read_bytes() for name in ("requirements.txt", "layer.py")]
    name = "layer-" + hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / name).exists():
            for old in CACHE.glob("*layer-*"):
                shutil.rmtree(old)
            print("demo: installing the server's packages (about 150 MB) into .cache", flush=True)
            staged = Path(tempfile.mkdtemp(prefix="new-layer-", dir=CACHE))
            _fill(staged)
            staged.rename(CACHE / name)
    return CACHE / name


def _fill(layer: Path) -> None:
    layer.chmod(0o755)
    site = layer / "opt/site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    requirements = ["--requirement", str(HERE / "requirements.txt")]
    subprocess.run([*pip, "--no-compile", *PYTHON, *platforms, "--target", str(site), *requirements], check=True)
    _compile(layer)


def _compile(layer: Path) -> None:
    """Compile the packages by the containers' own Python, as an image build would; it is run through its own loader."""
    usr = base_root() / "usr"
    lib = f"{usr}/lib/x86_64-linux-gnu"
    python = [f"{lib}/ld-linux-x86-64.so.2", "--library-path", lib, f"{usr}/bin/python3.11"]
    argv = [*python, "-s", "-m", "compileall", "-qq", "-s", str(layer), "-p", "/", str(layer)]
    # Some packages ship files that are no valid Python (templates); those stay uncompiled.
    subprocess.run(argv, check=False, env={"PYTHONHOME": str(usr)})
