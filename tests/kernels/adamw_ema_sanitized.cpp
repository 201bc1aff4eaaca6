// Runs the CPU's operators on buffers of exactly the size they may touch, for the sanitizers; returns 1 where a number is wrong.

#include "adamw_ema.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

// On the heap and no number larger than asked for, so that one number too far is seen.
template <typename T> std::unique_ptr<T[]> buffer(int64_t count, T value) {
    std::unique_ptr<T[]> found(new T[count]);
    for (int64_t i = 0; i < count; ++i)
        found[i] = value;
    return found;
}

bool close(double found, double expected) { return std::fabs(found - expected) <= 1e-5 * std::fabs(expected) + 1e-12; }

} // namespace

int main(int arguments, char **values) {
    const int threads = arguments > 1 ? std::atoi(values[1]) : 2;
    const std::vector<int64_t> sizes = {0, 1, 15, 16, 17, 1023, 1025, 2049, (1 << 15) - 1, (1 << 15) + 1, 100003};
    const xkd_adamw options = {0.9f, 0.95f, 1e-8f, 0.01f / 0.1f, std::sqrt(0.05f)};
    const float keep = 0.997f, follow = 0.25f, scale = 0.5f;
    std::vector<std::unique_ptr<float[]>> floats;
    std::vector<std::unique_ptr<uint16_t[]>> halves;
    std::vector<xkd_segment> table;
    std::vector<float> scales(sizes.size(), scale), norms(sizes.size(), -1.0f);
    for (size_t k = 0; k < sizes.size(); ++k) {
        for (const float value : {1.0f, 0.2f, 0.0f, 0.0f, -1.0f})
            floats.push_back(buffer(sizes[k], value));
        halves.push_back(buffer<uint16_t>(sizes[k], 0));
        float *first = floats[floats.size() - 5].get();
        table.push_back({first, floats[floats.size() - 4].get(), floats[floats.size() - 3].get(), floats[floats.size() - 2].get(),
                         k % 3 ? floats.back().get() : nullptr, k % 3 == 2 ? halves.back().get() : nullptr, sizes[k], keep, follow});
    }
    const auto number = static_cast<int64_t>(table.size());
    xkd_squared_norms_cpu(table.data(), number, norms.data(), threads);
    xkd_adamw_ema_cpu(table.data(), number, scales.data(), &options, threads);
    // The first step moves every parameter by the step size: the moments' corrections cancel.
    const double moved = 1.0 * keep - 0.01, taught = -1.0 + follow * (moved + 1.0);
    int wrong = 0;
    for (size_t k = 0; k < sizes.size(); ++k) {
        wrong += !close(norms[k], 0.04 * static_cast<double>(sizes[k]));
        for (int64_t i = 0; i < sizes[k]; ++i) {
            wrong += !close(table[k].parameter[i], moved) || !close(table[k].first[i], 0.01) || !close(table[k].second[i], 0.0005);
            wrong += table[k].teacher && !close(table[k].teacher[i], taught);
            wrong += table[k].copy && table[k].copy[i] == 0;
        }
    }
    xkd_ema_cpu(table.data(), number, threads);
    for (size_t k = 0; k < sizes.size(); ++k)
        for (int64_t i = 0; i < sizes[k]; ++i)
            wrong += table[k].teacher && !close(table[k].teacher[i], taught + follow * (moved - taught));
    if (wrong || xkd_abi() != XKD_ABI)
        std::printf("%d numbers are wrong\n", wrong);
    return wrong != 0;
}
