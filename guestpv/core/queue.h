#ifndef GPV_QUEUE_H
#define GPV_QUEUE_H
#include <stdint.h>
#include "kick.h"
#include "queue.cdef.h"
#endif
