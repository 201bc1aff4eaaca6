// One view of a clip in one pass: crop, antialiased resize, flip, colours in their drawn order, blur, normalisation. A frame
// stays in a core's second-level cache from its first byte to its last number, a few rows of it in the first-level cache.

#include "video_view.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

#include "vectorised.h"

namespace {

constexpr int LANES = 8;  // output columns of a band
constexpr int STRIP = 4;  // output rows that are made together: the four of resize_columns
constexpr int CHANNELS = 3;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// What one output pixel reads along one side.
struct Taps {
    int64_t first;
    std::vector<double> weights;
};

// Bilinear with antialiasing: a triangle of half-width max(1, size / new_size) around the pixel's centre, cut at the edges.
Taps triangle(int64_t size, int64_t new_size, int64_t place) {
    const double scale = static_cast<double>(size) / static_cast<double>(new_size), half = std::max(scale, 1.0);
    const double centre = (static_cast<double>(place) + 0.5) * scale;
    const auto first = std::max<int64_t>(0, static_cast<int64_t>(std::floor(centre - half + 0.5)));
    const auto end = std::min(size, static_cast<int64_t>(std::ceil(centre + half - 0.5)));
    Taps taps{first, {}};
    double sum = 0;
    for (int64_t pixel = first; pixel < end; ++pixel) {
        const double weight = std::max(0.0, 1 - std::fabs(static_cast<double>(pixel) + 0.5 - centre) / half);
        taps.weights.push_back(weight);
        sum += weight;
    }
    for (double &weight : taps.weights)
        weight /= sum;
    return taps;
}

// Stored pixels, resized, of these [start, start + length), resized to `size`: what each output pixel reads of the stored ones.
std::vector<Taps> resize_taps(int64_t stored, int64_t resized, int64_t start, int64_t length, int64_t size) {
    std::vector<Taps> found;
    for (int64_t place = 0; place < size; ++place) {
        Taps outer = triangle(length, size, place);
        outer.first += start;
        if (resized == stored) {
            found.push_back(std::move(outer));
            continue;
        }
        const auto taps = static_cast<int64_t>(outer.weights.size());
        Taps both{triangle(stored, resized, outer.first).first, {}};
        for (int64_t i = 0; i < taps; ++i) {
            const Taps inner = triangle(stored, resized, outer.first + i);
            const size_t offset = inner.first - both.first;
            both.weights.resize(std::max(both.weights.size(), offset + inner.weights.size()), 0.0);
            for (size_t j = 0; j < inner.weights.size(); ++j)
                both.weights[offset + j] += outer.weights[i] * inner.weights[j];
        }
        found.push_back(std::move(both));
    }
    return found;
}

// Columns: some output columns read the same span of stored ones, each with its own weights, most of which are 0.
struct Band {
    int64_t first, count;
    const float *weights; // [count, LANES]
};

struct Plan {
    std::vector<int64_t> row_first, row_taps, row_weights; // of each output row: stored rows, and where their weights begin
    std::vector<float> down, across;
    std::vector<Band> bands;
    int64_t left, columns; // span of stored columns that the bands read
    std::vector<float> blur;
};

Plan plan_of(const xkd_video_view &v) {
    Plan plan;
    for (const Taps &taps : resize_taps(v.height, v.resized_height, v.top, v.crop_height, v.size)) {
        plan.row_first.push_back(taps.first);
        plan.row_taps.push_back(static_cast<int64_t>(taps.weights.size()));
        plan.row_weights.push_back(static_cast<int64_t>(plan.down.size()));
        plan.down.insert(plan.down.end(), taps.weights.begin(), taps.weights.end());
    }
    std::vector<Taps> columns = resize_taps(v.width, v.resized_width, v.left, v.crop_width, v.size);
    plan.left = columns.front().first;
    plan.columns = columns.back().first + static_cast<int64_t>(columns.back().weights.size()) - plan.left;
    if (v.flip)
        std::reverse(columns.begin(), columns.end());
    std::vector<size_t> begins;
    for (int64_t begin = 0; begin < v.size; begin += LANES) {
        const int64_t end = std::min(begin + LANES, v.size);
        int64_t first = v.width, last = 0;
        for (int64_t i = begin; i < end; ++i) {
            first = std::min(first, columns[i].first);
            last = std::max(last, columns[i].first + static_cast<int64_t>(columns[i].weights.size()));
        }
        begins.push_back(plan.across.size());
        plan.across.resize(plan.across.size() + (last - first) * LANES, 0.0f);
        for (int64_t i = begin; i < end; ++i)
            for (size_t j = 0; j < columns[i].weights.size(); ++j)
                plan.across[begins.back() + (columns[i].first - first + j) * LANES + (i - begin)] =
                    static_cast<float>(columns[i].weights[j] / 255);
        plan.bands.push_back({first - plan.left, last - first, nullptr});
    }
    for (size_t i = 0; i < begins.size(); ++i)
        plan.bands[i].weights = plan.across.data() + begins[i];
    if (v.blur_taps > 1) {
        std::vector<double> weights;
        double sum = 0;
        for (int i = 0; i < v.blur_taps; ++i) {
            const double distance = (i - v.blur_taps / 2) / static_cast<double>(v.blur_sigma);
            weights.push_back(std::exp(-0.5 * distance * distance));
            sum += weights.back();
        }
        for (const double weight : weights)
            plan.blur.push_back(static_cast<float>(weight / sum));
    }
    return plan;
}

// The sum of some rows, each times its weight; as many rows at a time as keep the sums out of memory for a while.
template <typename T>
XKD_INLINED void weighted_sum(float *__restrict out, const T *const *rows, const float *weights, int64_t taps, int64_t count) {
    int64_t tap = taps % 4;
    if (tap == 1) {
        for (int64_t i = 0; i < count; ++i)
            out[i] = weights[0] * static_cast<float>(rows[0][i]);
    } else if (tap == 2) {
        for (int64_t i = 0; i < count; ++i)
            out[i] = weights[0] * static_cast<float>(rows[0][i]) + weights[1] * static_cast<float>(rows[1][i]);
    } else if (tap == 3) {
        for (int64_t i = 0; i < count; ++i)
            out[i] = weights[0] * static_cast<float>(rows[0][i]) + weights[1] * static_cast<float>(rows[1][i]) +
                     weights[2] * static_cast<float>(rows[2][i]);
    } else {
        std::fill(out, out + count, 0.0f);
    }
    for (; tap < taps; tap += 4) {
        const T *const a = rows[tap], *const b = rows[tap + 1], *const c = rows[tap + 2], *const d = rows[tap + 3];
        const float w = weights[tap], x = weights[tap + 1], y = weights[tap + 2], z = weights[tap + 3];
        for (int64_t i = 0; i < count; ++i)
            out[i] += w * static_cast<float>(a[i]) + x * static_cast<float>(b[i]) + y * static_cast<float>(c[i]) +
                      z * static_cast<float>(d[i]);
    }
}

// Some columns of a row. Sums of four rows fit 16 registers: as an array, GCC 12 would keep them in memory.
struct Colours {
    Lanes red, green, blue;

    XKD_INLINED void add(Lanes weights, const float *pixel) {
        red += weights * pixel[0];
        green += weights * pixel[1];
        blue += weights * pixel[2];
    }

    XKD_INLINED void store(float *const *planes, int64_t place, size_t columns) const {
        store_one(planes[0] + place, red, columns);
        store_one(planes[1] + place, green, columns);
        store_one(planes[2] + place, blue, columns);
    }

    static XKD_INLINED void store_one(float *place, Lanes numbers, size_t columns) {
        float all[LANES]; // a part of `numbers` itself would have an address, and so no register
        std::memcpy(columns == LANES ? place : all, &numbers, sizeof numbers);
        if (columns < LANES)
            std::memcpy(place, all, columns * sizeof(float));
    }
};

// Some rows of interleaved colours [STRIP][stride] to `rows` rows of each plane, all bands of columns.
XKD_INLINED void resize_columns(const Plan &plan, const float *strip, int64_t stride, float *const *planes, int64_t place, int64_t rows,
                                int64_t size) {
    for (int64_t column = 0; column < size; column += LANES, place += LANES) {
        const Band &band = plan.bands[column / LANES];
        Colours first{}, second{}, third{}, fourth{};
        const float *pixel = strip + CHANNELS * band.first;
        for (int64_t i = 0; i < band.count; ++i, pixel += CHANNELS) {
            Lanes weights;
            std::memcpy(&weights, band.weights + i * LANES, sizeof weights);
            first.add(weights, pixel);
            second.add(weights, pixel + stride);
            third.add(weights, pixel + 2 * stride);
            fourth.add(weights, pixel + 3 * stride);
        }
        const auto columns = static_cast<size_t>(std::min<int64_t>(LANES, size - column));
        first.store(planes, place, columns);
        if (rows > 1)
            second.store(planes, place + size, columns);
        if (rows > 2)
            third.store(planes, place + 2 * size, columns);
        if (rows > 3)
            fourth.store(planes, place + 3 * size, columns);
    }
}

XKD_INLINED float clamped(float x) {
    x = x < 0.0f ? 0.0f : x;
    return x > 1.0f ? 1.0f : x;
}

XKD_INLINED float luma(float red, float green, float blue) { return 0.299f * red + 0.587f * green + 0.114f * blue; }

// To the nearest whole number, for magnitudes far below 2²²; rounding instructions are not on every processor.
XKD_INLINED float rounded(float x) {
    const float shift = 12582912.0f; // 1.5 · 2²³
    return (x + shift) - shift;
}

// A channel is value - chroma · trapezoid(hue): lowest within 1/6 turn of the hue opposite to its own, highest from 1/3 on.
XKD_INLINED float turned(float hue, float opposite, float base, float sixfold) {
    float distance = hue - opposite;
    distance = std::fabs(distance - rounded(distance));
    distance = distance < 1.0f / 6 ? 1.0f / 6 : distance;
    distance = distance > 1.0f / 3 ? 1.0f / 3 : distance;
    return base + sixfold * distance;
}

XKD_INLINED void shift_hue(float *__restrict r, float *__restrict g, float *__restrict b, int64_t count, float shift) {
    for (int64_t i = 0; i < count; ++i) {
        const float red = r[i], green = g[i], blue = b[i];
        float value = red > green ? red : green, least = red < green ? red : green;
        value = value > blue ? value : blue;
        least = least < blue ? least : blue;
        const float chroma = value - least, sixfold = 6 * chroma;
        const float sixth = 1 / (sixfold > 1e-8f ? sixfold : 1e-8f); // hue in turns = difference · sixth + the leading one's own
        float difference = red - green, own = 2.0f / 3;
        difference = green == value ? blue - red : difference;
        own = green == value ? 1.0f / 3 : own;
        difference = red == value ? green - blue : difference;
        own = red == value ? 0.0f : own;
        const float hue = difference * sixth + own + shift, base = value - 2 * chroma;
        r[i] = turned(hue, 0.5f, base, sixfold);
        g[i] = turned(hue, 1.0f / 3 + 0.5f, base, sixfold);
        b[i] = turned(hue, 2.0f / 3 + 0.5f, base, sixfold);
    }
}

// One colour operation on `count` pixels; `mean_grey` is read by contrast alone.
XKD_INLINED void colour(int32_t operation, float factor, float mean_grey, float *__restrict r, float *__restrict g,
                        float *__restrict b, int64_t count) {
    if (operation == XKD_HUE) {
        shift_hue(r, g, b, count, factor);
    } else if (operation == XKD_SATURATION) {
        for (int64_t i = 0; i < count; ++i) {
            const float grey = (1 - factor) * luma(r[i], g[i], b[i]);
            r[i] = clamped(factor * r[i] + grey);
            g[i] = clamped(factor * g[i] + grey);
            b[i] = clamped(factor * b[i] + grey);
        }
    } else if (operation == XKD_GREY) {
        for (int64_t i = 0; i < count; ++i)
            r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
    } else {
        const float offset = operation == XKD_CONTRAST ? mean_grey * (1 - factor) : 0.0f;
        for (float *__restrict plane : {r, g, b})
            for (int64_t i = 0; i < count; ++i)
                plane[i] = clamped(factor * plane[i] + offset);
    }
}

XKD_INLINED double sum(const float *x, int64_t count) {
    constexpr int SUMS = 16;
    float lanes[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (int k = 0; k < SUMS; ++k)
            lanes[k] += x[i + k];
    double total = 0;
    for (int k = 0; k < SUMS; ++k)
        total += lanes[k];
    for (; i < count; ++i)
        total += x[i];
    return total;
}

struct Scratch {
    std::vector<float> strip, planes, blurred, padded;
    std::vector<const uint8_t *> bytes;
    std::vector<const float *> floats;
};

// Gaussian blur of a plane [size, size], mirrored about the centres of its edge pixels; in place.
XKD_INLINED void blur(float *plane, const std::vector<float> &weights, int64_t size, Scratch &scratch) {
    const auto taps = static_cast<int64_t>(weights.size()), reach = taps / 2;
    float *padded = scratch.padded.data();
    for (int64_t y = 0; y < size; ++y) {
        const float *row = plane + y * size;
        std::memcpy(padded + reach, row, size * sizeof(float));
        for (int64_t x = 1; x <= reach; ++x) {
            padded[reach - x] = row[x];
            padded[reach + size - 1 + x] = row[size - 1 - x];
        }
        for (int64_t tap = 0; tap < taps; ++tap)
            scratch.floats[tap] = padded + tap;
        weighted_sum(scratch.blurred.data() + y * size, scratch.floats.data(), weights.data(), taps, size);
    }
    for (int64_t y = 0; y < size; ++y) {
        for (int64_t tap = 0; tap < taps; ++tap) {
            int64_t from = std::abs(y + tap - reach);
            from = from < size ? from : 2 * (size - 1) - from;
            scratch.floats[tap] = scratch.blurred.data() + from * size;
        }
        weighted_sum(plane + y * size, scratch.floats.data(), weights.data(), taps, size);
    }
}

// What a view's float32 numbers are made of pixels in [0, 1]: x · scale + offset.
struct Range {
    float scale, offset;
};

Range range_of(const xkd_video_view &v, int channel) {
    if (v.out_is_uint8)
        return {255, 0};
    return {1 / v.std[channel], -v.mean[channel] / v.std[channel]};
}

XKD_INLINED void rescale(float *x, int64_t count, Range range) {
    for (int64_t i = 0; i < count; ++i)
        x[i] = x[i] * range.scale + range.offset;
}

// Stored rows to some rows of the planes.
XKD_INLINED void resize(const xkd_video_view &v, const Plan &plan, const uint8_t *stored, float *const *planes, int64_t first,
                        int64_t rows, Scratch &scratch) {
    const int64_t stride = CHANNELS * plan.columns;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t y = first + row, taps = plan.row_taps[y];
        for (int64_t tap = 0; tap < taps; ++tap)
            scratch.bytes[tap] = stored + (plan.row_first[y] + tap) * v.row_stride + CHANNELS * plan.left;
        const float *weights = plan.down.data() + plan.row_weights[y];
        weighted_sum(scratch.strip.data() + row * stride, scratch.bytes.data(), weights, taps, stride);
    }
    resize_columns(plan, scratch.strip.data(), stride, planes, first * v.size, rows, v.size);
}

// A frame of the view, in as many passes as its colours need: contrast wants the mean of what stands before it.
XKD_VECTORISED void make_frame(const xkd_video_view &v, const Plan &plan, const uint8_t *stored, float *const *planes,
                               Scratch &scratch) {
    const int64_t area = v.size * v.size;
    const bool blurred = v.blur_taps > 1;
    float mean_grey = 0;
    bool resized = false;
    int32_t next = 0;
    do {
        int32_t end = next + (resized ? 1 : 0);
        while (end < v.steps && v.operation[end] != XKD_CONTRAST)
            ++end;
        double sums[CHANNELS] = {};
        for (int64_t y = 0; y < v.size; y += STRIP) {
            const int64_t rows = std::min<int64_t>(STRIP, v.size - y), count = rows * v.size;
            float *const strip[] = {planes[0] + y * v.size, planes[1] + y * v.size, planes[2] + y * v.size};
            if (!resized)
                resize(v, plan, stored, planes, y, rows, scratch);
            for (int32_t step = next; step < end; ++step)
                colour(v.operation[step], v.factor[step], mean_grey, strip[0], strip[1], strip[2], count);
            for (int channel = 0; channel < CHANNELS; ++channel) {
                if (end < v.steps)
                    sums[channel] += sum(strip[channel], count);
                else if (!blurred)
                    rescale(strip[channel], count, range_of(v, channel));
            }
        }
        const double mean = 0.299 * sums[0] + 0.587 * sums[1] + 0.114 * sums[2]; // of the grey: the grey of the means
        mean_grey = static_cast<float>(mean / static_cast<double>(area));
        resized = true;
        next = end;
    } while (next < v.steps);
    for (int channel = 0; blurred && channel < CHANNELS; ++channel) {
        blur(planes[channel], plan.blur, v.size, scratch);
        rescale(planes[channel], area, range_of(v, channel));
    }
}

// A finished plane to where a view wants it that is not float32 of whole frames.
XKD_VECTORISED void store(const xkd_video_view &v, float *plane, int channel, int64_t frame, void *out) {
    for (int64_t y = 0; y < v.size; ++y) {
        float *row = plane + y * v.size;
        const int64_t place = channel * v.out_channel + frame * v.out_frame + y * v.out_row;
        if (!v.out_is_uint8) {
            float *numbers = static_cast<float *>(out) + place;
            for (int64_t x = 0; x < v.size; ++x)
                numbers[x * v.out_pixel] = row[x];
            continue;
        }
        for (int64_t x = 0; x < v.size; ++x)
            row[x] = rounded(row[x] < 0 ? 0.0f : row[x] > 255 ? 255.0f : row[x]);
        uint8_t *levels = static_cast<uint8_t *>(out) + place;
        for (int64_t x = 0; x < v.size; ++x)
            levels[x * v.out_pixel] = static_cast<uint8_t>(row[x]);
    }
}

void make_view(const xkd_video_view &v, const uint8_t *frames, void *out) {
    const Plan plan = plan_of(v);
    const int64_t area = v.size * v.size;
    const bool in_place = !v.out_is_uint8 && v.out_pixel == 1 && v.out_row == v.size;
    Scratch scratch;
    scratch.strip.resize(STRIP * CHANNELS * plan.columns);
    scratch.bytes.resize(*std::max_element(plan.row_taps.begin(), plan.row_taps.end()));
    if (!in_place)
        scratch.planes.resize(CHANNELS * area);
    if (v.blur_taps > 1) {
        scratch.blurred.resize(area);
        scratch.padded.resize(v.size + v.blur_taps - 1);
        scratch.floats.resize(v.blur_taps);
    }
    for (int64_t frame = 0; frame < v.frames; ++frame) {
        float *planes[CHANNELS];
        for (int channel = 0; channel < CHANNELS; ++channel) {
            planes[channel] = scratch.planes.data() + channel * area;
            if (in_place)
                planes[channel] = static_cast<float *>(out) + channel * v.out_channel + frame * v.out_frame;
        }
        make_frame(v, plan, frames + frame * v.frame_stride, planes, scratch);
        for (int channel = 0; !in_place && channel < CHANNELS; ++channel)
            store(v, planes[channel], channel, frame, out);
    }
}

} // namespace

extern "C" int xkd_video_view_cpu(const xkd_video_view *view, const uint8_t *frames, void *out) {
    try {
        make_view(*view, frames, out);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
