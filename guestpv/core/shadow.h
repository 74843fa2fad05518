#ifndef GPV_SHADOW_H
#define GPV_SHADOW_H
#include "queue.h"
#include "shadow.cdef.h"
#endif
