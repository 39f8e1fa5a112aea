/* The least a kernel launch costs: cuLaunchKernel in a loop, with no framework in between.
 *
 * peers.py compiles this file and calls it through ctypes. The driver is opened at run time and
 * its few functions are declared here, so that neither a CUDA toolkit nor its headers are needed.
 * The context is the one that is current (torch's).
 */
#include <dlfcn.h>
#include <stddef.h>
#include <time.h>

typedef int CUresult; /* 0 is success */
typedef void *CUmodule, *CUfunction, *CUstream;

static CUresult (*module_load)(CUmodule *, const void *);
static CUresult (*module_unload)(CUmodule);
static CUresult (*get_function)(CUfunction *, CUmodule, const char *);
static CUresult (*synchronize)(CUstream);
static CUresult (*launch_kernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned,
                                 unsigned, unsigned, CUstream, void **, void **);

static const char EMPTY_KERNEL[] =
    ".version 7.0\n.target sm_75\n.address_size 64\n"
    ".visible .entry empty()\n{\n ret;\n}\n";

static int open_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW); /* torch has it open: never closed */
    if (!driver) return 0;
    *(void **)&module_load = dlsym(driver, "cuModuleLoadData");
    *(void **)&module_unload = dlsym(driver, "cuModuleUnload");
    *(void **)&get_function = dlsym(driver, "cuModuleGetFunction");
    *(void **)&synchronize = dlsym(driver, "cuStreamSynchronize");
    *(void **)&launch_kernel = dlsym(driver, "cuLaunchKernel");
    return module_load && module_unload && get_function && synchronize && launch_kernel;
}

static CUresult repeat(CUfunction kernel, CUstream stream, int launches, double *seconds) {
    struct timespec began, ended;
    CUresult result = 0;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (int i = 0; i < launches && !result; i++)
        result = launch_kernel(kernel, 1, 1, 1, 32, 1, 1, 0, stream, NULL, NULL);
    if (!result) result = synchronize(stream);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    *seconds = ((double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec))
               / launches;
    return result;
}

/* Seconds per launch, of `repeats` loops of `launches` with one synchronisation at the end of each.
 * Returns 0, an error of the driver, or -1 where there is none. */
int bare_launch(CUstream stream, int launches, int repeats, double *seconds) {
    CUmodule module;
    CUfunction kernel;
    double warm_up;
    if (!open_driver()) return -1;
    CUresult result = module_load(&module, EMPTY_KERNEL);
    if (result) return result;
    result = get_function(&kernel, module, "empty");
    if (!result) result = repeat(kernel, stream, launches, &warm_up);
    for (int i = 0; i < repeats && !result; i++)
        result = repeat(kernel, stream, launches, &seconds[i]);
    CUresult unloaded = module_unload(module);
    return result ? result : unloaded;
}
