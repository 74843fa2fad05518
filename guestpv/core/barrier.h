/* Barriers towards a device that is hardware, per architecture. C11 fences order CPUs among each other only. */
#ifndef GPV_BARRIER_H
#define GPV_BARRIER_H

#if defined(__x86_64__) || defined(__i386__)
/* Write-back memory and uncached registers keep their program order except for a load that passes an earlier store. */
#define GPV_DEVICE_WMB() __asm__ volatile("" ::: "memory")
#define GPV_DEVICE_RMB() __asm__ volatile("" ::: "memory")
#define GPV_DEVICE_MB() __asm__ volatile("mfence" ::: "memory")
#define GPV_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
/* The outer shareable domain holds the devices; the inner one holds only the CPUs. */
#define GPV_DEVICE_WMB() __asm__ volatile("dmb oshst" ::: "memory")
#define GPV_DEVICE_RMB() __asm__ volatile("dmb oshld" ::: "memory")
#define GPV_DEVICE_MB() __asm__ volatile("dsb sy" ::: "memory")
#define GPV_RELAX() __asm__ volatile("yield" ::: "memory")
#else
#error "guestpv's rings are written for x86 and aarch64: add the device barriers of this architecture to barrier.h"
#endif

#endif
