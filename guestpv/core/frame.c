/* What the pump has to know of frames. */
#include "frame.h"

enum {
    HDR_F_NEEDS_CSUM = 1,
    HDR_F_DATA_VALID = 2,
    HDR_F_RSC_INFO = 4,
    GSO_TYPE = 1,
    HDR_LEN = 2,
    GSO_SIZE = 4,
    CSUM_START = 6,
    CSUM_OFFSET = 8,
    ETHERNET_HEADER = 14,
    VLAN_TAG = 4,
    LONGEST_FIXED_IP = 40,
    TCP = 6,
    UDP = 17,
};

/* A frame lies in memory that the device can write at any time: each byte is read once, and what was checked is used. */
static uint32_t be16(const volatile uint8_t *at)
{
    uint32_t high = at[0];
    return high << 8 | at[1];
}

static uint32_t folded(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

static void put_le16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

/* A frame put together of TCP segments tells their number where others have csum_start (5.1.9.4); whoever cuts it again
 * has to know their size. */
static void resize_segments(uint8_t *header, const volatile uint8_t *tcp, uint32_t length)
{
    uint32_t segments = header[CSUM_START] | (uint32_t)header[CSUM_START + 1] << 8, head = (tcp[12] >> 4) * 4u;
    if (header[GSO_SIZE] || header[GSO_SIZE + 1])
        return;
    if (segments < 2 || length <= head)
        header[GSO_TYPE] = 0;
    else
        put_le16(header + GSO_SIZE, (length - head + segments - 1) / segments);
}

/* DATA_VALID promises a frame without errors, not one with a checksum in it (5.1.9.4.1), and a TAP drops a frame whose
 * checksum is wrong. So the checksum is declared to be still open, with the pseudo header's sum in its place: this
 * kernel's own sockets take that for good, and whoever it is forwarded to gets a whole one. */
static int32_t open_checksum(uint8_t *header, uint8_t *frame, uint32_t size)
{
    uint32_t at = ETHERNET_HEADER, type, protocol, length, addresses, words, sum, place;
    const volatile uint8_t *ip;

    int coalesced = (header[0] & HDR_F_RSC_INFO) != 0;

    if (!coalesced && (header[0] & (HDR_F_DATA_VALID | HDR_F_NEEDS_CSUM)) != HDR_F_DATA_VALID)
        return 0;
    if (size < at)
        return 0;
    type = be16(frame + 12);
    if (type == 0x8100 && size >= at + VLAN_TAG) {
        type = be16(frame + 16);
        at += VLAN_TAG;
    }
    if (size < at + LONGEST_FIXED_IP)
        return 0;
    ip = frame + at;
    if (type == 0x0800) {
        uint32_t head = ip[0];
        /* A fragment has no transport header of its own, or a checksum over more than itself. */
        if (head >> 4 != 4 || be16(ip + 6) & 0x3fff)
            return 0;
        head = (head & 15) * 4;
        protocol = ip[9];
        length = be16(ip + 2) - head;
        addresses = 12, words = 4;
        at += head;
    } else if (type == 0x86dd && ip[0] >> 4 == 6) {
        protocol = ip[6];
        length = be16(ip + 4);
        addresses = 8, words = 16;
        at += LONGEST_FIXED_IP;
    } else {
        return 0;
    }
    if (protocol != TCP && protocol != UDP)
        return 0;
    place = protocol == TCP ? 16 : 6;
    if (size < at + place + 2)
        return 0;
    if (coalesced && protocol == TCP)
        resize_segments(header, frame + at, length & 0xffff);
    sum = protocol + (length & 0xffff);
    for (uint32_t i = 0; i < words; i++)
        sum += be16(ip + addresses + 2 * i);
    sum = folded(sum);
    frame[at + place] = (uint8_t)(sum >> 8);
    frame[at + place + 1] = (uint8_t)sum;
    header[0] = HDR_F_NEEDS_CSUM;
    put_le16(header + CSUM_START, at);
    put_le16(header + CSUM_OFFSET, place);
    return 1;
}

int32_t gpv_leave_checksum_open(uint8_t *header, uint8_t *frame, uint32_t size)
{
    uint8_t told = header[0];
    int32_t changed = open_checksum(header, frame, size);
    /* Without a place for its checksum, what the coalescing device says of segments means nothing to anybody else. */
    return told & HDR_F_RSC_INFO && !changed ? -1 : changed;
}

/* hdr_len is a hint that nobody may rely on (5.1.9.4.2), and a TAP refuses frames for it. */
void gpv_forget_wrong_length(uint8_t *header, uint32_t length)
{
    uint32_t told = header[HDR_LEN] | (uint32_t)header[HDR_LEN + 1] << 8;
    if (told > length || told < ETHERNET_HEADER)
        put_le16(header + HDR_LEN, 0);
}
