#define EBDIFF_ISA norm_rows_base
#include "group_norm_rows.h"
