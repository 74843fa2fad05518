/* One access of exactly that width to a mapped register, ordered against memory like the kernel's readl and writel. */
uint32_t gpv_read8(uintptr_t address);
uint32_t gpv_read16(uintptr_t address);
uint32_t gpv_read32(uintptr_t address);
void gpv_write8(uintptr_t address, uint32_t value);
void gpv_write16(uintptr_t address, uint32_t value);
void gpv_write32(uintptr_t address, uint32_t value);
