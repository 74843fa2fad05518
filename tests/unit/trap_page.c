/* Three pages without access rights: every single access to them faults, is noted, single-stepped and
 * protected again. x86-64 Linux only. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { PAGE = 4096, PAGES = 3, MOST = 64, TRAP_FLAG = 0x100, WRITE_FAULT = 2 };

struct access { int32_t offset; int32_t is_write; };

static uint8_t *pages;
static struct access seen[MOST];
static volatile int count;
static uint8_t *open_page;
static struct sigaction old_segv, old_trap;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    uint8_t *address = info->si_addr;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (address < pages || address >= pages + PAGES * PAGE) {
        sigaction(signal, &old_segv, NULL);
        return;
    }
    if (count < MOST)
        seen[count] = (struct access){ (int32_t)(address - pages), !!(registers[REG_ERR] & WRITE_FAULT) };
    count++;
    /* Only the page that faulted: an access that reaches into the next page is noted twice. */
    open_page = pages + (address - pages) / PAGE * PAGE;
    mprotect(open_page, PAGE, PROT_READ | PROT_WRITE);
    registers[REG_EFL] |= TRAP_FLAG;
}

static void on_step(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)info;
    mprotect(pages, PAGES * PAGE, PROT_NONE);
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
}

uint8_t *trap_new(void)
{
    pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}

void trap_free(void)
{
    munmap(pages, PAGES * PAGE);
}

void trap_arm(void)
{
    struct sigaction fault = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };
    struct sigaction step = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };
    count = 0;
    sigaction(SIGSEGV, &fault, &old_segv);
    sigaction(SIGTRAP, &step, &old_trap);
    mprotect(pages, PAGES * PAGE, PROT_NONE);
}

int trap_disarm(struct access *accesses)
{
    mprotect(pages, PAGES * PAGE, PROT_READ | PROT_WRITE);
    sigaction(SIGSEGV, &old_segv, NULL);
    sigaction(SIGTRAP, &old_trap, NULL);
    memcpy(accesses, seen, sizeof seen);
    return count;
}
