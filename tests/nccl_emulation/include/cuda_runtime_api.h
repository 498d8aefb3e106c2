#pragma once

#include_next <cuda_runtime_api.h>

// There is a GPU for every rank.
#define cudaGetDeviceCount(count) (*(count) = 64, cudaSuccess)
#define cudaSetDevice(device) cudaSuccess
