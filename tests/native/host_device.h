// The device that stands in for a GPU: what it has, what CUDA checks of a launch, and the calls of
// the runtime library that ask for either. It is compiled with the headers of cuda_on_host, or with
// those of CUDA for ptx_runtime.cpp.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace host_device {

// An environment variable that holds a number.
int setting(const char* name, int otherwise);

// Compute capability as one number, 90 for 9.0.
int architecture();

// Keeps what was wrong, in words, for cudaGetErrorString; CUDA would leave it at the code.
cudaError_t refuse(cudaError_t error, const std::string& why);

// What CUDA checks of a launch; blocks becomes the number of blocks in a cluster.
cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config, unsigned* blocks);

}  // namespace host_device
