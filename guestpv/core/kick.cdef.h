/* How an available buffer notification leaves the driver (2.9). The core and the pumps know no other form. */
enum gpv_kick_kind { GPV_KICK_NONE, GPV_KICK_MMIO16, GPV_KICK_MMIO32, GPV_KICK_EVENTFD, GPV_KICK_CALL };

struct gpv_kick {
    int32_t kind;
    int32_t fd;               /* GPV_KICK_EVENTFD */
    volatile void *doorbell;  /* GPV_KICK_MMIO16, GPV_KICK_MMIO32 */
    uint32_t value;           /* low 16 bits: virtqueue index or queue_notif_config_data */
    int32_t (*call)(void *user, uint32_t value); /* GPV_KICK_CALL: 0, or negative when it failed */
    void *user;
    uint64_t kicks;           /* notifications sent */
};

/* Sends one notification. Returns 0, a negative errno of the eventfd, or what `call` returned. */
int32_t gpv_kick_send(struct gpv_kick *kick, uint32_t value);
