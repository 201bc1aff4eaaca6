// The optimiser's operators on a GPU. Memory bounds them: a thread block takes one piece of one segment, four numbers a thread at
// a time where all of the segment's pointers allow it.

#include "adamw_ema.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

constexpr int THREADS = 256;
constexpr int64_t PIECE = 1 << 14; // numbers per thread block

struct Four {
    float v[4];
};

__device__ bool aligned(const void *pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

__device__ Four load(const float *x) {
    const float4 f = *reinterpret_cast<const float4 *>(x);
    return {{f.x, f.y, f.z, f.w}};
}

__device__ void store(float *x, const Four &f) { *reinterpret_cast<float4 *>(x) = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]); }

__device__ uint16_t bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

__device__ float update(float p, float g, float &m, float &v, float scale, float keep, const xkd_adamw &a) {
    const float gradient = g * scale;
    m += (1 - a.beta1) * (gradient - m);
    v = a.beta2 * v + (1 - a.beta2) * gradient * gradient;
    return p * keep - a.step_size * m / (sqrtf(v) / a.second_root + a.eps);
}

// Sums over the thread block; the result is in its first thread.
__device__ float block_sum(float value) {
    __shared__ float warps[THREADS / 32];
    for (int offset = 16; offset; offset /= 2)
        value += __shfl_down_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < THREADS / 32 ? warps[threadIdx.x] : 0.0f;
    if (threadIdx.x < 32)
        for (int offset = 16; offset; offset /= 2)
            value += __shfl_down_sync(0xffffffffu, value, offset);
    return value;
}

// Grid: (pieces of the largest segment, segments). Every block writes its sum, those beyond the end of their segment a zero.
__global__ void __launch_bounds__(THREADS) squared_norms(const xkd_segment *segments, float *partial) {
    const xkd_segment &s = segments[blockIdx.y];
    const int64_t begin = blockIdx.x * PIECE, end = min(begin + PIECE, s.count);
    const float *g = s.gradient;
    float sum = 0;
    if (aligned(g, 16)) {
        for (int64_t i = begin + threadIdx.x * 4; i < end; i += THREADS * 4) {
            if (i + 4 <= end) {
                const Four f = load(g + i);
                sum += f.v[0] * f.v[0] + f.v[1] * f.v[1] + f.v[2] * f.v[2] + f.v[3] * f.v[3];
            } else {
                for (int64_t j = i; j < end; ++j)
                    sum += g[j] * g[j];
            }
        }
    } else {
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS)
            sum += g[i] * g[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        partial[blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
}

// Grid: segments. Adds a segment's sums, always in the same order.
__global__ void __launch_bounds__(THREADS) add_partial(const float *partial, int64_t pieces, float *norms) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < pieces; i += THREADS)
        sum += partial[blockIdx.x * pieces + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        norms[blockIdx.x] = sum;
}

// Grid as above. ADAMW: the parameter moves before its teacher follows.
template <bool ADAMW>
__global__ void __launch_bounds__(THREADS) move(const xkd_segment *segments, const float *scales, xkd_adamw a) {
    const xkd_segment s = segments[blockIdx.y];
    const int64_t begin = blockIdx.x * PIECE, end = min(begin + PIECE, s.count);
    if (begin >= end || (!ADAMW && !s.teacher))
        return;
    const float scale = ADAMW ? scales[blockIdx.y] : 0.0f;
    const bool by_four = aligned(s.parameter, 16) && aligned(s.teacher, 16) && aligned(s.copy, 8) &&
                         (!ADAMW || (aligned(s.gradient, 16) && aligned(s.first, 16) && aligned(s.second, 16)));
    const int64_t whole = by_four ? begin + (end - begin) / 4 * 4 : begin;
    for (int64_t i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
        Four p = load(s.parameter + i);
        if (ADAMW) {
            const Four g = load(s.gradient + i);
            Four m = load(s.first + i), v = load(s.second + i);
            for (int k = 0; k < 4; ++k)
                p.v[k] = update(p.v[k], g.v[k], m.v[k], v.v[k], scale, s.keep, a);
            store(s.parameter + i, p);
            store(s.first + i, m);
            store(s.second + i, v);
        }
        if (s.teacher) {
            Four t = load(s.teacher + i);
            for (int k = 0; k < 4; ++k)
                t.v[k] += s.follow * (p.v[k] - t.v[k]);
            store(s.teacher + i, t);
            if (s.copy)
                *reinterpret_cast<ushort4 *>(s.copy + i) =
                    make_ushort4(bfloat16(t.v[0]), bfloat16(t.v[1]), bfloat16(t.v[2]), bfloat16(t.v[3]));
        }
    }
    for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
        float p = s.parameter[i];
        if (ADAMW) {
            float m = s.first[i], v = s.second[i];
            p = update(p, s.gradient[i], m, v, scale, s.keep, a);
            s.parameter[i] = p, s.first[i] = m, s.second[i] = v;
        }
        if (s.teacher) {
            const float t = s.teacher[i] + s.follow * (p - s.teacher[i]);
            s.teacher[i] = t;
            if (s.copy)
                s.copy[i] = bfloat16(t);
        }
    }
}

dim3 grid(int64_t number, int64_t largest) {
    return dim3(static_cast<unsigned>(xkd_pieces(largest)), static_cast<unsigned>(number));
}

} // namespace

extern "C" {

int xkd_abi(void) { return XKD_ABI; }

int64_t xkd_pieces(int64_t largest) { return largest > PIECE ? (largest + PIECE - 1) / PIECE : 1; }

int xkd_squared_norms_cuda(const xkd_segment *segments, int64_t number, int64_t largest, float *partial, float *norms, void *stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    squared_norms<<<grid(number, largest), THREADS, 0, queue>>>(segments, partial);
    add_partial<<<static_cast<unsigned>(number), THREADS, 0, queue>>>(partial, xkd_pieces(largest), norms);
    return cudaGetLastError();
}

int xkd_adamw_ema_cuda(const xkd_segment *segments, int64_t number, int64_t largest, const float *scales, const xkd_adamw *adamw,
                       void *stream) {
    move<true><<<grid(number, largest), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(segments, scales, *adamw);
    return cudaGetLastError();
}

int xkd_ema_cuda(const xkd_segment *segments, int64_t number, int64_t largest, void *stream) {
    move<false><<<grid(number, largest), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(segments, nullptr, xkd_adamw{});
    return cudaGetLastError();
}
}
