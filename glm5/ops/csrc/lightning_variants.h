/* The kernels of every instruction set, and which of them this processor runs. */

#if defined(__x86_64__)

#include "transpose.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma,popcnt")))
#define LANES 16
#define ROWS 8
#define RELU(v) ((vector_avx512)_mm512_max_ps(_mm512_setzero_ps(), (__m512)(v)))
#define COMPRESS
#define KEYS 16
#define VECTORS 1
#define TRANSPOSE(v) transpose_16((__m512 *)(v))
#include "lightning_kernel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef RELU
#undef COMPRESS
#undef KEYS
#undef VECTORS
#undef TRANSPOSE

#include "lightning_sieve.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#define RELU(v) ((vector_avx2)_mm256_max_ps(_mm256_setzero_ps(), (__m256)(v)))
#define KEYS 6
#define VECTORS 2
#define TRANSPOSE(v) transpose_8((__m256 *)(v))
#include "lightning_kernel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef RELU
#undef KEYS
#undef VECTORS
#undef TRANSPOSE

#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 4
#define RELU(v) ((vector_plain)_mm_max_ps(_mm_setzero_ps(), (__m128)(v)))
#include "lightning_kernel.h"

#else

typedef int32_t bits4 __attribute__((vector_size(16)));
#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#define ROWS 8
#define RELU(v) ((vector_plain)((bits4)(v) & ~(bits4)((v) < 0)))
#include "lightning_kernel.h"

#endif

enum { VARIANTS = 4 };

/* The variants that this processor runs, the widest first. Returns how many. */
static int find_variants(const kernel *found[VARIANTS]) {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) found[count++] = &kernel_sifted;
    if (__builtin_cpu_supports("avx512f")) found[count++] = &kernel_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kernel_avx2;
#endif
    found[count++] = &kernel_plain;
    return count;
}
