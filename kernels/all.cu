// All kernels in one unit.
#include "decode.cu"
#include "draw.cu"
#include "linear_rows.cu"
#include "norm.cu"
