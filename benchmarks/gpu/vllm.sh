#!/bin/sh
# A real vLLM 0.25.1 on a bare GPU machine, in two calls because of the size of what is carried:
#   vllm.sh one DIRECTORY_OF_ARCHIVES         (b.tar.xz: unpack, make the models meanwhile)
#   vllm.sh two DIRECTORY_OF_ARCHIVES OUT     (a.tar.xz, d.tar.xz: unpack, run)
# The archives hold vLLM's wheels without what a dense model does not need.
set -u
unpack() { tar xf "$1" -C /tmp/site 2>/dev/null || python3 -m tarfile -e "$1" /tmp/site; }
mkdir -p /tmp/site /mnt/t
mountpoint -q /mnt/t || mount -t tmpfs -o size=100G,huge=within_size tmpfs /mnt/t
if [ "$1" = one ]; then
    (setsid nohup sh -c 'python3 benchmarks/gpu/make_model.py /mnt/t/1b 1b; python3 benchmarks/gpu/make_model.py /mnt/t/7b 7b' \
        >/tmp/models.log 2>&1 &)
    unpack "$2/b.tar.xz"
    exit
fi
out=$3
for part in a d; do unpack "$2/$part.tar.xz" & done
wait
export PYTHONPATH=/tmp/site:$PWD/src:$PWD/tests PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton
export VLLM_CACHE_ROOT=/tmp/vcache VLLM_USE_FLASHINFER_SAMPLER=0 UV_USE_IO_URING=0
unset PYTHONDONTWRITEBYTECODE
mkdir -p /tmp/site/chrek-0.dist-info
printf 'Metadata-Version: 2.1\nName: chrek\nVersion: 0\n' >/tmp/site/chrek-0.dist-info/METADATA
printf '[vllm.general_plugins]\nchrek = chrek.integrations.vllm.plugin:register\n' >/tmp/site/chrek-0.dist-info/entry_points.txt
python3 -m compileall -q -j 16 /tmp/site >/dev/null 2>&1
until grep -q '7b model' /tmp/models.log; do sleep 0.2; done
run="timeout 200 python3 benchmarks/gpu/vllm_in_place.py"
$run /mnt/t/1b /mnt/t/run1 --evidence "$out/vllm-1b.txt" --gpu-memory-utilization 0.12 --enforce-eager 2>&1 | tee "$out/vllm-1b.jsonl"
$run /mnt/t/7b /mnt/t/run7 --evidence "$out/vllm-7b.txt" --gpu-memory-utilization 0.9 2>&1 | tee "$out/vllm-7b.jsonl"
cp /mnt/t/run*/log "$out/" 2>/dev/null
