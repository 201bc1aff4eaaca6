// Makes views of buffers of exactly the size they may touch, for the sanitizers; returns 1 where a number is wrong.

#include "video_view.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>

int main(int arguments, char **values) {
    const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 31, 40};
    const int blurred = arguments > 1 ? std::atoi(values[1]) : 1;
    int wrong = 0, made = 0;
    for (const int64_t size : sizes)
        for (const int64_t height : sizes)
            for (const int64_t width : {height, height + 5})
                for (int kind = 0; kind < 8; ++kind) {
                    xkd_video_view v = {};
                    v.frames = 2;
                    v.height = height, v.width = width;
                    const bool smaller = kind & 1 && height > 2;
                    v.resized_height = smaller ? height / 2 : height, v.resized_width = smaller ? width / 2 : width;
                    // crops at the lower right corner: one pixel more would be outside
                    v.crop_height = (v.resized_height + 1) / 2, v.crop_width = (v.resized_width + 1) / 2;
                    v.top = v.resized_height - v.crop_height, v.left = v.resized_width - v.crop_width;
                    v.size = size;
                    v.row_stride = 3 * width, v.frame_stride = height * v.row_stride;
                    v.out_is_uint8 = (kind & 2) != 0;
                    const bool last = (kind & 4) != 0; // channels last
                    v.out_pixel = last ? 3 : 1, v.out_row = v.out_pixel * size, v.out_frame = v.out_row * size;
                    v.out_channel = last ? 1 : v.frames * v.out_frame;
                    v.flip = kind & 1;
                    v.steps = kind % XKD_COLOUR_STEPS + 1;
                    const int32_t order[] = {XKD_CONTRAST, XKD_HUE, XKD_BRIGHTNESS, XKD_SATURATION, XKD_GREY};
                    for (int step = 0; step < v.steps; ++step)
                        v.operation[step] = order[step], v.factor[step] = step == 1 ? 0.25f : 1.0f;
                    v.blur_taps = blurred ? static_cast<int32_t>(size / 20 * 2 + 1) : 1;
                    v.blur_sigma = 1;
                    for (int channel = 0; channel < 3; ++channel)
                        v.mean[channel] = 0, v.std[channel] = 1;
                    const int64_t bytes = v.frames * v.frame_stride, numbers = 3 * v.frames * size * size;
                    std::unique_ptr<uint8_t[]> frames(new uint8_t[bytes]);
                    for (int64_t i = 0; i < bytes; ++i)
                        frames[i] = 51; // grey stays grey, whatever is done to it
                    std::unique_ptr<uint8_t[]> levels(new uint8_t[v.out_is_uint8 ? numbers : 0]);
                    std::unique_ptr<float[]> floats(new float[v.out_is_uint8 ? 0 : numbers]);
                    for (int64_t i = 0; i < numbers; ++i)
                        v.out_is_uint8 ? levels[i] = 0 : floats[i] = NAN;
                    void *out = v.out_is_uint8 ? static_cast<void *>(levels.get()) : floats.get();
                    wrong += xkd_video_view_cpu(&v, frames.get(), out) != 0;
                    for (int64_t i = 0; i < numbers; ++i)
                        wrong += v.out_is_uint8 ? levels[i] != 51 : !(std::fabs(floats[i] - 0.2f) < 1e-5f);
                    ++made;
                }
    if (wrong)
        std::printf("%d numbers of %d views are wrong\n", wrong, made);
    return wrong != 0;
}
