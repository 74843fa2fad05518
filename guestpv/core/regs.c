/* Register accessors: volatile, one access of exactly the named width. */
#include "regs.h"
#include "barrier.h"

#define ACCESSORS(bits)                                              \
    uint32_t gpv_read##bits(uintptr_t address)                       \
    {                                                                \
        uint32_t value = *(volatile const uint##bits##_t *)address;  \
        GPV_DEVICE_RMB(); /* before loads of memory that the register speaks about */ \
        return value;                                                \
    }                                                                \
    void gpv_write##bits(uintptr_t address, uint32_t value)          \
    {                                                                \
        GPV_DEVICE_WMB(); /* after stores to memory that the register makes the device read */ \
        *(volatile uint##bits##_t *)address = (uint##bits##_t)value; \
    }

ACCESSORS(8)
ACCESSORS(16)
ACCESSORS(32)
