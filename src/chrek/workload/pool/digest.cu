// The digest of a block of GPU memory, as docs/format-gpu.md defines it. benchmarks/gpu/compile_digest.py
// compiles it into kernel.py; the driver turns that text into machine code when it is loaded.
//
// grid.y = block, grid.x = parts of it; each thread walks 16-byte steps with the grid's stride. The sum
// is the same in any order, so parts are added by atomics.
typedef unsigned long long u64;
__device__ __forceinline__ u64 mix(u64 x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; return x ^ (x >> 33);
}
extern "C" __global__ void __launch_bounds__(256) chrek_digest(const u64 *table, u64 *out) {
    unsigned b = blockIdx.y;
    const ulonglong2 *words = (const ulonglong2 *)table[2 * b];
    u64 pairs = table[2 * b + 1] / 16, x = 0, y = 0, any = 0;
    u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += stride) {
        ulonglong2 w = words[i];
        u64 k = (2 * i + 1) * 0x9e3779b97f4a7c15ull, l = k + 0x9e3779b97f4a7c15ull;
        x += mix(w.x + k) + mix(w.y + l);
        y += mix(w.x ^ ~k) + mix(w.y ^ ~l);
        any |= w.x | w.y;
    }
    for (int s = 16; s; s >>= 1) {
        x += __shfl_down_sync(~0u, x, s);
        y += __shfl_down_sync(~0u, y, s);
        any |= __shfl_down_sync(~0u, any, s);
    }
    if (threadIdx.x % 32 == 0) {
        atomicAdd(out + 3 * b, x);
        atomicAdd(out + 3 * b + 1, y);
        if (any) atomicOr(out + 3 * b + 2, any);
    }
}
