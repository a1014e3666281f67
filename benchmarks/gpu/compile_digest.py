"""Compile the digest kernel (`digest.cu`) to PTX and write it as a Python module.

Needs NVIDIA's run-time compiler: ``pip install nvidia-cuda-nvrtc-cu12==12.8.93`` or any CUDA 12.8
toolkit (PTX of a newer one would not load in the oldest driver that can checkpoint, 570).

    python benchmarks/gpu/compile_digest.py path/to/libnvrtc.so.12
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

POOL = Path(__file__).parents[2] / "src/chrek/workload/pool"

HEADER = '''"""The digest kernel as PTX: made from `digest.cu` by ``benchmarks/gpu/compile_digest.py``, not by hand."""

PTX = rb"""'''


def compile_ptx(library: str, source: bytes) -> bytes:
    """PTX of `source` for compute capability 7.0 and later; `SystemExit` with the compiler's words."""
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"digest.cu", 0, None, None)
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=compute_70")
    if nvrtc.nvrtcCompileProgram(program, 1, options):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise SystemExit(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    return text.value


def main() -> None:
    """Write `kernel.py` beside `digest.cu`."""
    ptx = compile_ptx(sys.argv[1], (POOL / "digest.cu").read_bytes())
    lines = [line.rstrip() for line in ptx.decode().splitlines() if line.strip() and not line.startswith("//")]
    (POOL / "kernel.py").write_text(HEADER + "\n".join(lines).replace("\t", " ") + '\n"""\n')


if __name__ == "__main__":
    main()
