/* A small stand-in of NVIDIA's driver library for machines without a GPU.
 *
 * It has the calls that ChReK uses, with the driver's own rules where a caller can see them: the state
 * machine of the checkpoint calls, virtual memory whose address outlives its contents, copies that need
 * both sides mapped. Device memory is a memfd, so a wrong address is a crash here too. What each call
 * shall fail or hang on is read from a file shared with the test ($CHREK_STANDIN), which also holds the
 * state of each process. tests/gpu runs the same sequences against this and against the real library.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>
#include <signal.h>
#include <sys/mman.h>

enum { PROCS = 64, RULES = 32, CALLS = 8, GPUS = 8, NAME = 48 };
struct process { int32_t pid, state, tracked, bytes, calls[CALLS]; int32_t map_pairs, timeout_ms; };
struct rule { char call[NAME]; int32_t pid, skip, code, hang_ms, times, hits; };
struct gpu { uint8_t uuid[16]; char name[NAME]; uint64_t total, free_; int32_t minor, mig; };
struct shared {
    int32_t version, gpus, release, live;       /* live: physical allocations not yet released */
    struct process process[PROCS];
    struct rule rule[RULES];
    struct gpu gpu[GPUS];
};
static struct shared *S;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

/* At load, by the thread that loads: a first call may come on another thread while the test's own changes the
 * environment, and getenv(3) then reads memory that setenv(3) has freed. Without a file it has a machine of its own. */
__attribute__((constructor)) static void find_shared(void) {
    const char *path = getenv("CHREK_STANDIN");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    S = mmap(NULL, sizeof *S, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (S == MAP_FAILED) abort();
    if (fd >= 0) close(fd);
}

static struct shared *shared(void) { return S; }

/* The code that a test asked this call to give; -1 if none. A rule may first let `skip` calls pass. */
static int injected(const char *call, int pid) {
    struct shared *s = shared();
    int code = -1, hang = 0;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < RULES; i++) {
        struct rule *r = &s->rule[i];
        if (strcmp(r->call, call) || (r->pid && r->pid != pid)) continue;
        if (r->skip > 0) { r->skip--; continue; }
        if (r->times && r->hits >= r->times) continue;
        r->hits++; code = r->code; hang = r->hang_ms; break;
    }
    pthread_mutex_unlock(&guard);
    for (int t = 0; t < hang && !__atomic_load_n(&s->release, __ATOMIC_ACQUIRE); t++) usleep(1000);
    return code;
}
#define INJECT(call, pid) do { int c_ = injected(call, pid); if (c_ >= 0) return c_; } while (0)

static struct process *find(int pid) {
    struct shared *s = shared();
    for (int i = 0; i < PROCS; i++) if (s->process[i].pid == pid && s->process[i].tracked) return &s->process[i];
    return NULL;
}

int cuInit(unsigned f) { (void)f; INJECT("cuInit", 0); return 0; }
int cuDriverGetVersion(int *v) { *v = shared()->version; return 0; }
int cuGetErrorName(int c, const char **n) { *n = c == 998 ? "CUDA_ERROR_STANDIN" : NULL; return *n ? 0 : 1; }

/* --- checkpoint calls: codes as the real driver gave them (580.159) --- */
#define CHECKPOINT_CALL(name, index) \
    INJECT(name, pid); \
    if (kill(pid, 0)) return 304; \
    struct process *p = find(pid); \
    if (!p) return 3; \
    __atomic_add_fetch(&p->calls[index], 1, __ATOMIC_SEQ_CST)
int cuCheckpointProcessGetState(int pid, int *state) {
    CHECKPOINT_CALL("cuCheckpointProcessGetState", 0);
    *state = p->state; return 0;
}
int cuCheckpointProcessLock(int pid, uint32_t *args) {
    CHECKPOINT_CALL("cuCheckpointProcessLock", 1);
    if (args) p->timeout_ms = args[0];
    if (p->state != 0) return 401;
    p->state = 1; return 0;
}
int cuCheckpointProcessCheckpoint(int pid, void *args) {
    (void)args; CHECKPOINT_CALL("cuCheckpointProcessCheckpoint", 2);
    if (p->state != 1) return 401;
    p->state = 2; return 0;
}
struct restore_args { uint8_t (*pairs)[32]; uint32_t count; char reserved[52]; uint64_t reserved1; };
int cuCheckpointProcessRestore(int pid, struct restore_args *args) {
    CHECKPOINT_CALL("cuCheckpointProcessRestore", 3);
    if (p->state != 2) return 401;
    if (args) {
        for (int i = 0; i < 52; i++) if (args->reserved[i]) return 1;
        if (args->count && (int)args->count < S->gpus) return 1;    /* a map has to name every GPU */
        for (uint32_t i = 0; i < args->count; i++) {
            int known = 0;
            for (int g = 0; g < S->gpus; g++) known |= !memcmp(args->pairs[i] + 16, S->gpu[g].uuid, 16);
            if (!known) return 1;
        }
        p->map_pairs = args->count;
    }
    p->state = 1; return 0;
}
int cuCheckpointProcessUnlock(int pid, void *args) {
    (void)args; CHECKPOINT_CALL("cuCheckpointProcessUnlock", 4);
    if (p->state != 1) return 401;
    p->state = 0; return 0;
}
#ifndef OLD_DRIVER
int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
    CHECKPOINT_CALL("cuCheckpointProcessGetRestoreThreadId", 5);
    *tid = pid; return 0;
}
#endif

/* --- devices and contexts --- */
static __thread void *context;
int cuDeviceGetCount(int *n) { *n = shared()->gpus; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return i < shared()->gpus ? 0 : 101; }
int cuDeviceGetUuid_v2(uint8_t *u, int d) { memcpy(u, shared()->gpu[d].uuid, 16); return 0; }
int cuDeviceGetName(char *n, int len, int d) { snprintf(n, len, "%s", shared()->gpu[d].name); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = shared()->gpu[d].total; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { INJECT("cuDevicePrimaryCtxRetain", 0); *c = (void *)(intptr_t)(d + 1); return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return 0; }
int cuCtxGetCurrent(void **c) { *c = context; return 0; }
int cuCtxSetCurrent(void *c) { INJECT("cuCtxSetCurrent", 0); context = c; return 0; }
int cuCtxSynchronize(void) { INJECT("cuCtxSynchronize", 0); return context ? 0 : 201; }

/* --- virtual memory --- */
enum { GRAIN = 2 << 20 };
struct prop { int type, handles, where, device; };
int cuMemGetAllocationGranularity(size_t *g, const struct prop *p, int o) { (void)p; (void)o; *g = GRAIN; return 0; }
int cuMemAddressReserve(uint64_t *va, size_t n, size_t align, uint64_t hint, uint64_t flags) {
    (void)align; (void)hint; (void)flags; INJECT("cuMemAddressReserve", 0);
    if (!n || n % GRAIN) return 1;
    void *p = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return 2;
    *va = (uint64_t)p; return 0;
}
int cuMemAddressFree(uint64_t va, size_t n) { INJECT("cuMemAddressFree", 0); return munmap((void *)va, n) ? 1 : 0; }
int cuMemCreate(uint64_t *h, size_t n, const struct prop *p, uint64_t flags) {
    (void)flags; INJECT("cuMemCreate", 0);
    if (!n || n % GRAIN || p->device >= shared()->gpus) return 1;
    int fd = memfd_create("standin", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, n)) return 2;
    __atomic_add_fetch(&S->live, 1, __ATOMIC_SEQ_CST);
    *h = fd; return 0;
}
int cuMemRelease(uint64_t h) {
    INJECT("cuMemRelease", 0);
    __atomic_sub_fetch(&shared()->live, 1, __ATOMIC_SEQ_CST);
    return close((int)h) ? 1 : 0;
}
int cuMemMap(uint64_t va, size_t n, size_t off, uint64_t h, uint64_t flags) {
    (void)flags; INJECT("cuMemMap", 0);
    void *p = mmap((void *)va, n, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)h, off);
    return p == MAP_FAILED ? 1 : 0;
}
int cuMemSetAccess(uint64_t va, size_t n, const void *a, size_t c) {
    (void)a; (void)c; INJECT("cuMemSetAccess", 0);
    return mprotect((void *)va, n, PROT_READ | PROT_WRITE) ? 1 : 0;
}
int cuMemUnmap(uint64_t va, size_t n) {
    INJECT("cuMemUnmap", 0);
    void *p = mmap((void *)va, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? 1 : 0;
}
int cuMemAlloc_v2(uint64_t *p, size_t n) { INJECT("cuMemAlloc_v2", 0); *p = (uint64_t)calloc(1, n); return *p ? 0 : 2; }
int cuMemFree_v2(uint64_t p) { free((void *)p); return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = shared()->gpu[0].free_; *t = S->gpu[0].total; return 0; }

/* --- host memory, streams, copies --- */
int cuMemHostRegister_v2(void *p, size_t n, unsigned f) { (void)p; (void)n; (void)f; INJECT("cuMemHostRegister_v2", 0); return 0; }
int cuMemHostUnregister(void *p) { (void)p; INJECT("cuMemHostUnregister", 0); return 0; }
int cuStreamCreate(void **s, unsigned f) { (void)f; INJECT("cuStreamCreate", 0); *s = malloc(1); return 0; }
int cuStreamDestroy_v2(void *s) { free(s); return 0; }
int cuStreamSynchronize(void *s) { (void)s; INJECT("cuStreamSynchronize", 0); return 0; }
int cuEventCreate(void **e, unsigned f) { (void)f; INJECT("cuEventCreate", 0); *e = malloc(1); return 0; }
int cuEventDestroy_v2(void *e) { free(e); return 0; }
int cuEventRecord(void *e, void *s) { (void)e; (void)s; INJECT("cuEventRecord", 0); return 0; }
int cuEventQuery(void *e) { (void)e; INJECT("cuEventQuery", 0); return (rand() & 1) ? 600 : 0; }
int cuEventSynchronize(void *e) { (void)e; INJECT("cuEventSynchronize", 0); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t d, const void *h, size_t n, void *s) {
    (void)s; INJECT("cuMemcpyHtoDAsync_v2", 0); if (!context) return 201; memcpy((void *)d, h, n); return 0;
}
int cuMemcpyDtoHAsync_v2(void *h, uint64_t d, size_t n, void *s) {
    (void)s; INJECT("cuMemcpyDtoHAsync_v2", 0); if (!context) return 201; memcpy(h, (void *)d, n); return 0;
}
int cuMemcpyHtoD_v2(uint64_t d, const void *h, size_t n) { memcpy((void *)d, h, n); return 0; }
int cuMemcpyDtoH_v2(void *h, uint64_t d, size_t n) { memcpy(h, (void *)d, n); return 0; }
int cuMemsetD8Async(uint64_t d, unsigned char v, size_t n, void *s) {
    (void)s; INJECT("cuMemsetD8Async", 0); memset((void *)d, v, n); return 0;
}

/* --- the digest kernel, in C: grid of blocks, see src/chrek/workload/pool/digest.cu --- */
static uint64_t mix(uint64_t x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; return x ^ (x >> 33);
}
int cuModuleLoadData(void **m, const void *image) { (void)image; INJECT("cuModuleLoadData", 0); *m = malloc(1); return 0; }
int cuModuleUnload(void *m) { free(m); return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) {
    (void)m; *f = (void *)1; return strcmp(name, "chrek_digest") ? 500 : 0;
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shm, void *st, void **arg, void **extra) {
    (void)f; (void)gz; (void)bx; (void)by; (void)bz; (void)shm; (void)st; (void)extra;
    INJECT("cuLaunchKernel", 0);
    const uint64_t *table = *(const uint64_t **)arg[0];
    uint64_t *out = *(uint64_t **)arg[1];
    (void)gx;
    for (uint32_t b = 0; b < gy; b++) {
        const uint64_t *w = (const uint64_t *)table[2 * b];
        uint64_t n = table[2 * b + 1] / 8, x = 0, y = 0, any = 0;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t k = (i + 1) * 0x9e3779b97f4a7c15ull;
            x += mix(w[i] + k); y += mix(w[i] ^ ~k); any |= w[i];
        }
        out[3 * b] += x; out[3 * b + 1] += y; out[3 * b + 2] |= any;
    }
    return 0;
}

/* --- NVML --- */
struct nvml_memory { unsigned long long total, free_, used; };
struct nvml_process { unsigned pid; unsigned long long bytes; unsigned gi, ci; };
int nvmlInit_v2(void) { INJECT("nvmlInit_v2", 0); return 0; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { snprintf(v, n, "580.159.04"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = shared()->gpus; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = &shared()->gpu[i]; return 0; }
int nvmlDeviceGetUUID(struct gpu *g, char *t, unsigned n) {
    uint8_t *u = g->uuid;
    snprintf(t, n, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2], u[3],
             u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
    return 0;
}
int nvmlDeviceGetName(struct gpu *g, char *t, unsigned n) { snprintf(t, n, "%s", g->name); return 0; }
int nvmlDeviceGetMinorNumber(struct gpu *g, unsigned *n) { *n = g->minor; return 0; }
int nvmlDeviceGetMemoryInfo(struct gpu *g, struct nvml_memory *m) {
    m->total = g->total; m->free_ = g->free_; m->used = g->total - g->free_; return 0;
}
int nvmlDeviceGetMigMode(struct gpu *g, unsigned *now, unsigned *next) {
    *now = *next = g->mig > 0; return g->mig < 0 ? 3 : 0;
}
int nvmlDeviceGetP2PStatus(struct gpu *a, struct gpu *b, int index, int *status) {
    (void)index; *status = a == b || a->mig > 0 || b->mig > 0; return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(struct gpu *g, unsigned *n, struct nvml_process *out) {
    unsigned found = 0;
    if (g == &shared()->gpu[0])
        for (int i = 0; i < PROCS; i++)
            if (S->process[i].tracked && found < *n)
                out[found++] = (struct nvml_process){S->process[i].pid, (unsigned long long)S->process[i].bytes << 20, 0, 0};
    *n = found; return 0;
}
