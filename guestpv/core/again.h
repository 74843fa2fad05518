#ifndef GPV_AGAIN_H
#define GPV_AGAIN_H
#include "queue.h"

#include "again.cdef.h"
#endif
