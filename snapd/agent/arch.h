/* All that is specific to x86-64: raw system calls, a thread without libc, registers of a stopped thread.
 *
 * A port to another architecture is a port of this file. Knows nothing of snapd.
 */
#ifndef SNAPD_ARCH_H
#define SNAPD_ARCH_H

#ifndef __x86_64__
#error "snapd runs on x86-64 only: arch.h is the file to port"
#endif

#include <asm/unistd.h>

static inline long raw6(long n, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}
#define raw5(n, a, b, c, d, e) raw6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define raw4(n, a, b, c, d) raw5(n, a, b, c, d, 0)
#define raw3(n, a, b, c) raw4(n, a, b, c, 0)
#define raw2(n, a, b) raw3(n, a, b, 0)
#define raw1(n, a) raw2(n, a, 0)
#define raw0(n) raw1(n, 0)

/* Starts a thread that shares what flags say and calls entry(arg) on the stack; entry never returns.
 * The thread keeps the caller's TLS register and must not use TLS. Returns its tid or a negative errno. */
static inline long raw_thread(unsigned long flags, void *stack_top, int *parent_tid, void (*entry)(void *), void *arg)
{
	void **top = (void **)stack_top;
	long ret;
	register long r10 __asm__("r10") = 0;
	register long r8 __asm__("r8") = 0;

	*--top = arg;
	*--top = (void *)entry;
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "pop %%rax\n\t"
			 "pop %%rdi\n\t"
			 "call *%%rax\n\t"
			 "hlt\n"
			 "1:"
			 : "=a"(ret)
			 : "a"(__NR_clone), "D"(flags), "S"(top), "d"(parent_tid), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return ret;
}

static inline void cpu_relax(void)
{
	__asm__ volatile("pause" ::: "memory");
}

#ifdef SNAPD_ARCH_REGS
#include <errno.h>
#include <sys/user.h>

typedef struct user_regs_struct arch_regs;

static inline unsigned long arch_sp(const arch_regs *regs)
{
	return regs->rsp;
}

static inline unsigned long arch_tls(const arch_regs *regs)
{
	return regs->fs_base;
}

/* The system call that the thread is in and its result so far; false when it is in none. */
static inline int arch_in_syscall(const arch_regs *regs, long *number, long *result)
{
	*number = (long)regs->orig_rax;
	*result = (long)regs->rax;
	return *number >= 0;
}

/* The timeout argument of an interrupted call is in this register (index 0 to 5). */
static inline unsigned long arch_arg(const arch_regs *regs, int index)
{
	switch (index) {
	case 0: return regs->rdi;
	case 1: return regs->rsi;
	case 2: return regs->rdx;
	case 3: return regs->r10;
	case 4: return regs->r8;
	default: return regs->r9;
	}
}

/* -ERESTARTNOHAND: the kernel itself repeats the call unless a handler is about to run, in which case the program
 * gets the EINTR that it would have had without us. */
static inline void arch_restart(arch_regs *regs)
{
	regs->rax = (unsigned long)-514L;
}

#define ARCH_CALL_BYTES 2UL
static inline unsigned long arch_ip(const arch_regs *regs)
{
	return regs->rip;
}

static inline int arch_is_call(long word)
{
	return (word & 0xffff) == 0x050f;
}

static inline long arch_with_call(long word)
{
	return (word & ~0xffffL) | 0x050f;
}

/* The thread makes this call next, with 0 as its argument, at an address that has the instruction for it. */
static inline void arch_call(arch_regs *regs, unsigned long at, long number)
{
	regs->rip = at;
	regs->rax = (unsigned long)number;
	regs->orig_rax = (unsigned long)-1L;
	regs->rdi = 0;
}
#endif

#endif
