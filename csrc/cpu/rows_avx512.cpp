#ifdef __x86_64__
#define EBDIFF_ISA rows_avx512
#define EBDIFF_ISA_NAME "avx512"
#include "rows.h"
#endif
