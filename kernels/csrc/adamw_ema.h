// Interface of the optimiser's operators: plain C, so that one build serves every version of PyTorch.
//
// Tensors come as a table of segments, whatever their memory: whole parameters, or pieces of a flat buffer that ZeRO shares out
// between the ranks. No pointer needs an alignment beyond that of its type.
#pragma once

#include <stdint.h>

#include "abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float *parameter;
    float *gradient; // read only
    float *first;    // AdamW's first moment
    float *second;   // and second
    float *teacher;  // follows the parameter after the update; NULL = nothing does
    uint16_t *copy;  // the teacher in bfloat16; NULL = none is kept
    int64_t count;   // numbers in each of them
    float keep;      // 1 - lr · weight decay
    float follow;    // 1 - EMA momentum
} xkd_segment;

typedef struct {
    float beta1, beta2, eps;
    float step_size;   // lr / (1 - beta1^t)
    float second_root; // sqrt(1 - beta2^t)
} xkd_adamw;

// On a CPU: `threads` workers; pointers in host memory.
void xkd_squared_norms_cpu(const xkd_segment *segments, int64_t number, float *norms, int threads);
void xkd_adamw_ema_cpu(const xkd_segment *segments, int64_t number, const float *scales, const xkd_adamw *adamw, int threads);
void xkd_ema_cpu(const xkd_segment *segments, int64_t number, int threads);

// On a GPU: `segments`, `scales`, `partial` and `norms` in device memory, work enqueued on `stream`; what they return is a
// cudaError_t. `largest` is the largest count of the table; `partial` holds `number` rows of xkd_pieces(largest) floats.
int64_t xkd_pieces(int64_t largest);
int xkd_squared_norms_cuda(const xkd_segment *segments, int64_t number, int64_t largest, float *partial, float *norms, void *stream);
int xkd_adamw_ema_cuda(const xkd_segment *segments, int64_t number, int64_t largest, const float *scales, const xkd_adamw *adamw,
                       void *stream);
int xkd_ema_cuda(const xkd_segment *segments, int64_t number, int64_t largest, void *stream);

#ifdef __cplusplus
}
#endif
