// Everything that a kernel source sees instead of CUDA's headers when it is compiled for the host.
#pragma once
#ifndef CBAM_SIMT
#define CBAM_SIMT 1
#endif
#include "simt/core.h"
#include "simt/half.h"
#include "simt/host.h"
#include "simt/math.h"
#include "simt/memory.h"
#include "simt/types.h"
#include "simt/warp.h"
#include "simt_ptx.h"
