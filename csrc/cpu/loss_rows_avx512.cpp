#ifdef __x86_64__
#define EBDIFF_ISA loss_rows_avx512
#include "loss_rows_isa.h"
#endif
