// All kernels in one unit.
#include "norm.cu"
