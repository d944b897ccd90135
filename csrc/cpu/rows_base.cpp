#define EBDIFF_ISA rows_base
#define EBDIFF_ISA_NAME "base"
#include "rows.h"
