#ifdef __x86_64__
#define EBDIFF_ISA norm_rows_avx512
#include "group_norm_rows.h"
#endif
