// Interface of the pass that makes a video view on a CPU: plain C, so that one build serves every version of PyTorch.
#pragma once

#include <stdint.h>

#include "abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// Operations on colours, in floating point on [0, 1], clamped after each: what PIL means by them.
enum { XKD_BRIGHTNESS, XKD_CONTRAST, XKD_SATURATION, XKD_HUE, XKD_GREY };
#define XKD_COLOUR_STEPS 5

// Everything about a view but its pixels. The caller answers for it that the crop lies within the resized frame, that all sizes
// are 1 or more, and that the blur reaches no further than the view.
typedef struct {
    int64_t frames;                                // of the view
    int64_t height, width;                         // of the stored frames
    int64_t resized_height, resized_width;         // they have before the crop; as stored: no resize
    int64_t top, left, crop_height, crop_width;    // in resized pixels
    int64_t size;                                  // height and width of the view
    int64_t frame_stride, row_stride;              // of the stored frames, bytes; pixels are 3 bytes each, red, green, blue
    int64_t out_channel, out_frame, out_row, out_pixel; // strides of the view, numbers
    int32_t flip;                                  // mirror left and right
    int32_t out_is_uint8;                          // 1 = grey levels in uint8, rounded; 0 = float32, normalised
    int32_t steps;                                 // how many of the following
    int32_t operation[XKD_COLOUR_STEPS];           // in this order
    float factor[XKD_COLOUR_STEPS];                // hue: turns; grey: not read
    int32_t blur_taps;                             // odd; 1 = no blur
    float blur_sigma;                              // pixels of the view
    float mean[3], std[3];                         // of red, green, blue in [0, 1]; not read for uint8
} xkd_video_view;

// `frames`: the first stored frame of the view. Returns 0; 1 = no memory. One thread; any number of calls at a time.
int xkd_video_view_cpu(const xkd_video_view *view, const uint8_t *frames, void *out);

#ifdef __cplusplus
}
#endif
