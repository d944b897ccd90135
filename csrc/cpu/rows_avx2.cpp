#ifdef __x86_64__
#define EBDIFF_ISA rows_avx2
#define EBDIFF_ISA_NAME "avx2"
#include "rows.h"
#endif
