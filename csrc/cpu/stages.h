// All of the kernels, in the order in which they build on each other. Each isa_*.cpp includes this inside a
// namespace of its own (vec.h).

#include "vec.h"

#include "matrix.h"

#include "nets.h"

#include "block.h"

#include "backward.h"

#include "schedule.h"

#include "entry.h"
