#ifndef GPV_REGS_H
#define GPV_REGS_H
#include <stdint.h>
#include "regs.cdef.h"
#endif
