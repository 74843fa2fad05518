/* Available buffer notifications (2.9, 4.1.5.2). */
#include "kick.h"

#include <errno.h>
#include <unistd.h>

#include "barrier.h"

int32_t gpv_kick_send(struct gpv_kick *kick, uint32_t value)
{
    static const uint64_t one = 1;

    kick->kicks++;
    switch (kick->kind) {
    case GPV_KICK_MMIO16:
        GPV_DEVICE_WMB(); /* the ring before the doorbell: pairs with the device's reads after it saw the doorbell */
        *(volatile uint16_t *)kick->doorbell = (uint16_t)value;
        return 0;
    case GPV_KICK_MMIO32:
        GPV_DEVICE_WMB(); /* as above */
        *(volatile uint32_t *)kick->doorbell = value;
        return 0;
    case GPV_KICK_EVENTFD:
        /* EAGAIN: the counter is at its limit, so the device has been told already */
        while (write(kick->fd, &one, sizeof one) < 0) {
            if (errno == EAGAIN)
                return 0;
            if (errno != EINTR)
                return -errno;
        }
        return 0;
    case GPV_KICK_CALL:
        return kick->call(kick->user, value);
    default:
        return 0;
    }
}
