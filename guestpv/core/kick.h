#ifndef GPV_KICK_H
#define GPV_KICK_H
#include <stdint.h>
#include "kick.cdef.h"
#endif
