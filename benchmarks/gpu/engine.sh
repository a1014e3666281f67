#!/usr/bin/env bash
# The engine on a GPU machine without a network, in under ten minutes: its tests, then the comparison with stock CRIU.
#   engine.sh OUT [tests|bench|all] [arguments of engine.py]
# Needs .cache/gpu-carry (tools/gpu-pack).
set -um # -m: what runs in the background can be interrupted, and then says how far it came
out=$1 what=${2:-all}
shift $(($# > 2 ? 2 : $#))
eval "$(tools/gpu-carry)"
mkdir -p /mnt/t
mountpoint -q /mnt/t || mount -t tmpfs -o size=110G,huge=within_size tmpfs /mnt/t
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c 'import torch' # the first import reads the disk
if [ "$what" != bench ]; then
    # Each test in a process of its own, all at once: most of their time is spent on starting PyTorch.
    tests="test_transparent two_at_once test_pooled inside damaged killed twenty managed ipc forked peer nccl test_server"
    mkdir -p /mnt/t/tests
    for name in ${TESTS:-$tests}; do
        timeout -s INT "${TEST_SECONDS:-240}" python3 -m pytest -q -s -rA -p no:cacheprovider -p no:benchmark -k "$name" \
            --basetemp "/mnt/t/tests/$name" tests/gpu/test_gpu_engine.py tests/gpu/test_gpu_containers.py \
            >"$out/test-$name.txt" 2>&1 &
    done
    wait
    grep -hE '^(FAILED|ERROR|SKIPPED|E  )|passed|failed|KeyboardInterrupt' "$out"/test-*.txt
    cat "$out"/test-*.txt >"$out/tests.txt" && rm "$out"/test-*.txt
    rm -rf /mnt/t/tests
fi
if [ "$what" != tests ]; then
    timeout 340 python3 benchmarks/gpu/engine.py --directory /mnt/t --out "$out/engine.json" "$@" 2>&1 | tee "$out/engine.log"
fi
