#!/bin/sh
# Everything that one GPU can show, in about three minutes: tests and recordings side by side, then the
# benchmark alone. Results go to the directory given.
set -u
out=$1
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE
mkdir -p /mnt/t /mnt/small "$out/evidence"
mountpoint -q /mnt/t || mount -t tmpfs -o size=100G,huge=within_size tmpfs /mnt/t
mountpoint -q /mnt/small || mount -t tmpfs -o size=20G,huge=never tmpfs /mnt/small
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c 'import torch' # the first import reads the disk
pytest="python3 -m pytest -q -rA --show-capture=no --timeout 150 -p no:cacheprovider --basetemp"
timeout 200 $pytest /tmp/pa tests/gpu/test_gpu_driver.py >"$out/driver.txt" 2>&1 &
a=$!
timeout 200 $pytest /tmp/pb tests/gpu/test_gpu_pool.py >"$out/pool.txt" 2>&1 &
b=$!
timeout 200 python3 tests/gpu/record_evidence.py "$out/evidence" plain pinned managed ipc forked nccl_one \
    cupy_plain jax_plain pooled >"$out/evidence.log" 2>&1 &
wait $a $b $!
tar -C "$out" -czf "$out/evidence.tgz" evidence && rm -rf "$out/evidence"
bench="timeout 150 python3 benchmarks/gpu/bench_pool.py"
$bench --directory /mnt/t --limits --tune 8 --disk /var/tmp/chrek-disk >"$out/limits.jsonl" 2>&1
# The quickest options of the tuning serve for the sizes.
best=$(python3 - "$out/limits.jsonl" <<'PY'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1]) if line.startswith('{"round_trip": 8')]
best = min(lines, key=lambda line: line["back_to_output_s"])
print(json.dumps({name: best[name] for name in ("threads", "chunk", "slots") if name in best}))
PY
)
for size in 2 8 30 60; do $bench --directory /mnt/t --sizes $size --options "$best"; done >"$out/sizes.jsonl" 2>&1
