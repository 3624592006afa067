/* A stand-in for libcuda.so.1 that records launches: Triton's whole host path (load, pack, launch)
   runs against it with no GPU. Built by test_host_path.py. */
#include "cuda.h"
#include <stdlib.h>
#include <string.h>

static int launches, parameters;
static CUlaunchConfig last;
static unsigned long long values[64];
static unsigned long long clock_now; /* advances by the threads of each launched block */
static _Thread_local CUcontext context;

/* What the tests read and set. */
int fake_launches(void) { return launches; }
unsigned long long fake_clock(void) { return clock_now; }
unsigned long long fake_parameter(int i) { return values[i]; }
void fake_expect_parameters(int n) { parameters = n; }
void fake_last_launch(unsigned long long *out) {
  out[0] = last.gridDimX, out[1] = last.gridDimY, out[2] = last.gridDimZ, out[3] = last.blockDimX;
  out[4] = last.sharedMemBytes, out[5] = (unsigned long long)(size_t)last.hStream;
}

static CUresult record(const CUlaunchConfig *config, void **arguments) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  last = *config;
  launches++;
  clock_now += config->blockDimX;
  for (int i = 0; i < parameters; i++) memcpy(&values[i], arguments[i], 8);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra) {
  return record(config, arguments);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  CUlaunchConfig config = {.gridDimX = gx, .gridDimY = gy, .gridDimZ = gz, .blockDimX = bx,
                           .blockDimY = by, .blockDimZ = bz, .sharedMemBytes = shared,
                           .hStream = stream};
  return record(&config, arguments);
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *out) { *out = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext in) { context = in; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
  *out = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_CONTEXT ? "invalid device context" : "fake error";
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *data) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  *module = (CUmodule)7;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)9;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 512 : 0; /* 16 warps at most */
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = 0;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
  *n = 1;
  return CUDA_SUCCESS;
}
