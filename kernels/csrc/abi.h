// What every library of this folder says of itself: the version of the interfaces that the headers here describe.
#pragma once

#define XKD_ABI 2

#ifdef __cplusplus
extern "C" {
#endif

int xkd_abi(void);

#ifdef __cplusplus
}
#endif
