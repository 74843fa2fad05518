/* Turns a received frame marked DATA_VALID, or coalesced by the device (RSC_INFO), into one marked NEEDS_CSUM, where it is
 * TCP or UDP over IP. `header` is the 12-byte virtio_net_hdr, `frame` the first `size` bytes of the Ethernet frame.
 * Returns 1 if it was changed, 0 if not, -1 if it is coalesced and no such frame. */
int32_t gpv_leave_checksum_open(uint8_t *header, uint8_t *frame, uint32_t size);

/* Clears hdr_len where it cannot be that of a frame of `length` bytes; a TAP takes 0 for unknown. */
void gpv_forget_wrong_length(uint8_t *header, uint32_t length);
