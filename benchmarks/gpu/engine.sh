#!/usr/bin/env bash
# The engine on a GPU machine without a network, in under ten minutes: its tests, then the comparison with stock CRIU.
#   engine.sh OUT [tests|bench|all] [arguments of engine.py]
# Needs .cache/gpu-carry (tools/gpu-pack).
set -u
out=$1 what=${2:-all}
shift $(($# > 2 ? 2 : $#))
eval "$(tools/gpu-carry)"
mkdir -p /mnt/t
mountpoint -q /mnt/t || mount -t tmpfs -o size=110G,huge=within_size tmpfs /mnt/t
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c 'import torch' # the first import reads the disk
if [ "$what" != bench ]; then
    timeout 175 python3 -m pytest -q -n 4 -rA -p no:cacheprovider -p no:benchmark --durations 15 --basetemp /mnt/t/tests ${TESTS:-} \
        tests/gpu/test_gpu_engine.py tests/gpu/test_gpu_containers.py >"$out/tests.txt" 2>&1
    grep -E '^(PASSED|FAILED|ERROR|SKIPPED|capture|restore|E  )|passed|failed' "$out/tests.txt"
    rm -rf /mnt/t/tests
fi
if [ "$what" != tests ]; then
    timeout 340 python3 benchmarks/gpu/engine.py --directory /mnt/t --out "$out/engine.json" "$@" 2>&1 | tee "$out/engine.log"
fi
