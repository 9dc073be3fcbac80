/* Counts calls of CUDA in a process: with LD_PRELOAD=count.so and GANGLION_COUNT=FILE, FILE.PID is an object of
   call to number when the process ends. cuBLAS and cuDNN launch kernels of their own, which are not seen. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CALLS(each)           \
    each(cudaLaunchKernel)    \
    each(__cudaLaunchKernel)  \
    each(cudaLaunchKernelExC) \
    each(cudaGraphLaunch)     \
    each(cudaMemcpyAsync)     \
    each(cudaMemsetAsync)     \
    each(cudaStreamSynchronize) \
    each(cudaEventSynchronize) \
    each(cudaDeviceSynchronize)

/* All arguments of these calls are whole numbers or pointers, and structures that the ABI passes as such: six
   registers and four places on the stack hold them. */
#define COUNTED(call)                                                                                     \
    static atomic_long number_##call;                                                                     \
    int call(long a, long b, long c, long d, long e, long f, long g, long h, long i, long j) {            \
        static int (*next)(long, long, long, long, long, long, long, long, long, long);                   \
        if (!next) *(void **)&next = dlsym(RTLD_NEXT, #call);                                             \
        atomic_fetch_add(&number_##call, 1);                                                              \
        return next(a, b, c, d, e, f, g, h, i, j);                                                        \
    }
CALLS(COUNTED)

__attribute__((destructor)) static void tell(void) {
    const char *file = getenv("GANGLION_COUNT");
    char name[4096];
    if (!file || snprintf(name, sizeof name, "%s.%d", file, getpid()) >= (int)sizeof name) return;
    FILE *out = fopen(name, "w");
    if (!out) return;
    const char *comma = "{";
#define TOLD(call) fprintf(out, "%s\"" #call "\": %ld", comma, (long)number_##call), comma = ", ";
    CALLS(TOLD)
    fprintf(out, "}\n");
    fclose(out);
}
