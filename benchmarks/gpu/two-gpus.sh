#!/bin/sh
# What needs two GPUs, in about two minutes. Results go to the directory given.
set -u
out=$1
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE
mkdir -p /mnt/t "$out/evidence"
mountpoint -q /mnt/t || mount -t tmpfs -o size=100G,huge=within_size tmpfs /mnt/t
nvidia-smi topo -m | head -4
python3 -c 'import torch' # the first import reads the disk
pytest="python3 -m pytest -q -rA --timeout 150 -p no:cacheprovider --basetemp"
timeout 150 $pytest /tmp/pa tests/gpu/test_gpu_driver.py >"$out/driver.txt" 2>&1 &
a=$!
timeout 150 $pytest /tmp/pb tests/gpu/test_gpu_pool.py -k 'two_devices or graph' >"$out/pool.txt" 2>&1 &
b=$!
off=NCCL_P2P_DISABLE=1,NCCL_SHM_DISABLE=1,NCCL_NVLS_ENABLE=0
timeout 200 python3 tests/gpu/record_evidence.py "$out/evidence" two peer nccl NCCL_P2P_DISABLE=1,nccl $off,nccl \
    CUDA_VISIBLE_DEVICES=1,plain ipc forked >"$out/evidence.log" 2>&1 &
wait $a $b $!
tar -C "$out" -czf "$out/evidence.tgz" evidence && rm -rf "$out/evidence"
timeout 150 python3 benchmarks/gpu/bench_pool.py --directory /mnt/t --tune 8 >"$out/tune.jsonl" 2>&1
