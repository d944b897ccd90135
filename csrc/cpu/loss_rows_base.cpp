#define EBDIFF_ISA loss_rows_base
#include "loss_rows_isa.h"
