// The optimiser's operators on a CPU. Memory bounds them: every number is read and written once.

#include "adamw_ema.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "vectorised.h"

namespace {

constexpr int64_t PIECE = 1 << 15; // numbers that a thread takes at a time

struct Piece {
    int64_t segment, begin, end;
};

std::vector<Piece> cut(const xkd_segment *segments, int64_t number) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < number; ++i)
        for (int64_t begin = 0; begin < segments[i].count; begin += PIECE)
            pieces.push_back({i, begin, begin + PIECE < segments[i].count ? begin + PIECE : segments[i].count});
    return pieces;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded);
}

// Sixteen sums of float32 side by side within a kilobyte-sized stretch, which are then added in float64.
XKD_VECTORISED double sum_of_squares(const float *x, int64_t count) {
    constexpr int LANES = 16, STRETCH = 1024;
    double total = 0;
    int64_t i = 0;
    for (; i + STRETCH <= count; i += STRETCH) {
        float lanes[LANES] = {};
        for (int j = 0; j < STRETCH; j += LANES)
            for (int k = 0; k < LANES; ++k)
                lanes[k] += x[i + j + k] * x[i + j + k];
        for (int k = 0; k < LANES; ++k)
            total += lanes[k];
    }
    for (; i < count; ++i)
        total += static_cast<double>(x[i]) * x[i];
    return total;
}

XKD_VECTORISED void adamw(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, int64_t count,
                          float scale, float keep, xkd_adamw a) {
    const float inverse_root = 1 / a.second_root;
    for (int64_t i = 0; i < count; ++i) {
        const float gradient = g[i] * scale;
        m[i] += (1 - a.beta1) * (gradient - m[i]);
        v[i] = a.beta2 * v[i] + (1 - a.beta2) * gradient * gradient;
        p[i] = p[i] * keep - a.step_size * m[i] / (std::sqrt(v[i]) * inverse_root + a.eps);
    }
}

XKD_VECTORISED void ema(float *__restrict teacher, const float *__restrict student, int64_t count, float follow) {
    for (int64_t i = 0; i < count; ++i)
        teacher[i] += follow * (student[i] - teacher[i]);
}

XKD_VECTORISED void convert(uint16_t *__restrict copy, const float *__restrict x, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        copy[i] = bfloat16(x[i]);
}

// After the update of a few thousand numbers, which are still in the cache.
void follow_student(const xkd_segment &s, int64_t begin, int64_t count) {
    if (!s.teacher)
        return;
    ema(s.teacher + begin, s.parameter + begin, count, s.follow);
    if (s.copy)
        convert(s.copy + begin, s.teacher + begin, count);
}

} // namespace

extern "C" {

int xkd_abi(void) { return XKD_ABI; }

void xkd_squared_norms_cpu(const xkd_segment *segments, int64_t number, float *norms, int threads) {
    const std::vector<Piece> pieces = cut(segments, number);
    std::vector<double> sums(pieces.size());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < static_cast<int64_t>(pieces.size()); ++i)
        sums[i] = sum_of_squares(segments[pieces[i].segment].gradient + pieces[i].begin, pieces[i].end - pieces[i].begin);
    std::vector<double> totals(number);
    for (size_t i = 0; i < pieces.size(); ++i)
        totals[pieces[i].segment] += sums[i];
    for (int64_t i = 0; i < number; ++i)
        norms[i] = static_cast<float>(totals[i]);
}

void xkd_adamw_ema_cpu(const xkd_segment *segments, int64_t number, const float *scales, const xkd_adamw *options, int threads) {
    constexpr int64_t STRETCH = 1 << 11; // its six arrays fit a core's first-level caches
    const std::vector<Piece> pieces = cut(segments, number);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < static_cast<int64_t>(pieces.size()); ++i) {
        const Piece piece = pieces[i];
        const xkd_segment &s = segments[piece.segment];
        for (int64_t begin = piece.begin; begin < piece.end; begin += STRETCH) {
            const int64_t count = begin + STRETCH < piece.end ? STRETCH : piece.end - begin;
            adamw(s.parameter + begin, s.gradient + begin, s.first + begin, s.second + begin, count, scales[piece.segment], s.keep,
                  *options);
            follow_student(s, begin, count);
        }
    }
}

void xkd_ema_cpu(const xkd_segment *segments, int64_t number, int threads) {
    constexpr int64_t STRETCH = 1 << 11;
    const std::vector<Piece> pieces = cut(segments, number);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < static_cast<int64_t>(pieces.size()); ++i) {
        const Piece piece = pieces[i];
        for (int64_t begin = piece.begin; begin < piece.end; begin += STRETCH)
            follow_student(segments[piece.segment], begin, begin + STRETCH < piece.end ? STRETCH : piece.end - begin);
    }
}
}
