"""The fixed text of kernels: what stands before all of them, and what stands around the statements of one."""

from ..c.source import HALVES

THREADS = 256
"""Threads of a block. A block takes one piece of an array, or adds up the partial sums of one array."""

BY_VALUE = 64
"""Numbers that fit among the arguments of a kernel. More of them are read from rows in the device's memory."""

# Neither header nor toolkit is needed: NVRTC and HIPRTC know these functions by themselves. The tests put a shim of a few lines
# in their place, so that a C++ compiler takes the same kernels.
PRELUDE = r"""
#if defined(__CUDACC_RTC__) || defined(__HIPCC_RTC__)
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define FLT_MAX 3.402823466e+38f
#define DBL_MAX 1.7976931348623157e+308
#define DEVICE static __device__ __forceinline__
DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
#endif
#ifdef __CUDACC_RTC__
#define ARGUMENT const __grid_constant__
#define IS_GLOBAL(p) __builtin_assume(__isGlobal(p))
#else
#define ARGUMENT const
#define IS_GLOBAL(p)
#endif

/* What a kernel is given, by value. */
struct work {
  const int64_t *pieces;    /* of each block: (array, first element, how many) */
  const int64_t *first;     /* of each array of the work the first piece, and the end */
  void *const *pointers;    /* of each array a row of addresses */
  const double *numbers;    /* of each array a row of numbers; null if they are the same for all */
  double *partial;          /* of each piece a row of partial sums */
  double *values;           /* of each array a row: its sums, then its measures */
  const double *combined;   /* the measures of all arrays together */
  double row[BY_VALUE];     /* numbers that are the same for all arrays */
};

/* Elements that one thread reads and writes at a time. */
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) lanes { T at[N]; };

HALVES

enum { SUM, LARGEST, SMALLEST };

DEVICE double joined(int how, double a, double b) {
  if (how == SUM) return a + b;
  return b != b || (how == LARGEST ? b > a : b < a) ? b : a;
}

/* The values of all threads as one, in an order that is always the same. */
DEVICE double over_block(int how, double mine, double *shared) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) shared[threadIdx.x] = joined(how, shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();
  return total;
}
""".replace("BY_VALUE", str(BY_VALUE)).replace("HALVES", HALVES.strip())

# A pass over the elements of arrays.
OVER_ELEMENTS = """
extern "C" __global__ void __launch_bounds__({threads}) {name}(ARGUMENT work given) {{
  const int64_t piece = blockIdx.x;
  const int64_t array = given.pieces[3 * piece], start = given.pieces[3 * piece + 1];
  const int n = (int)given.pieces[3 * piece + 2];
  void *const *const p = given.pointers + {pointers} * array;
  const double *const row = given.numbers ? given.numbers + {columns} * array : 0;
  const double *const values = given.values + {values} * array;
  (void)row; (void)values;
{begins}
{late}
{head}
  const int whole = {aligned} ? n - n % {width} : 0;
  for (int i = (int)threadIdx.x * {width}; i < whole; i += (int)blockDim.x * {width}) {{
{loads}
#pragma unroll
    for (int k = 0; k < {width}; ++k) {{
{lane}
    }}
{writes}
  }}
  for (int i = whole + (int)threadIdx.x; i < n; i += (int)blockDim.x) {{
{single}
  }}
{tail}
}}
"""

# What is computed for an array as a whole.
OVER_ARRAYS = """
extern "C" __global__ void __launch_bounds__({threads}) {name}(ARGUMENT work given) {{
  const int64_t begin = given.first[blockIdx.x], end = given.first[blockIdx.x + 1];
  const int64_t array = given.pieces[3 * begin];
  void *const *const p = given.pointers + {pointers} * array;
  const double *const row = given.numbers ? given.numbers + {columns} * array : 0;
  double *const values = given.values + {values} * array;
  (void)p; (void)row; (void)values;
{start}
  {shared}
  for (int64_t piece = begin + (int)threadIdx.x; piece < end; piece += (int)blockDim.x) {{
{adding}
  }}
{total}
  if (threadIdx.x != 0) return;
{body}
}}
"""

LATE = """\
  /* Numbers that no host knows: one thread computes them for its block. */
  __shared__ double late[{count}];
  if (threadIdx.x == 0) {{
{body}
  }}
  __syncthreads();
"""
