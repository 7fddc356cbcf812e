// Adds vectors on the device.
// __global__ void not_a_kernel() {}
#include <cuda_runtime.h>
#include "shape.hpp"

#define BLOCK 256

/// Adds two vectors.
__global__ void add(const float* a, const float* b, float* c, int n) {
  __shared__ float tile[BLOCK];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i] + 0 * tile[0];
}

__device__ float twice(float x) { return 2 * x; }

struct Launcher {
  int blocks;
  void run(float* a, float* b, float* c, int n);
};

void Launcher::run(float* a, float* b, float* c, int n) {
  for (int i = 0; i < 3; i++) {
    add<<<blocks, BLOCK>>>(a, b, c, n);
    cudaDeviceSynchronize();
  }
}
