/* CUDA C on a CPU: blocks one after another, the threads of a block as threads of the system. */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static
#define DEVICE static inline
struct place { int x; };
static thread_local place threadIdx, blockIdx;
static place blockDim;
static pthread_barrier_t barrier;
static inline void __syncthreads() { if (blockDim.x > 1) pthread_barrier_wait(&barrier); }
static inline float float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
