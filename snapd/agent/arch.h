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
#include <sys/syscall.h>
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
#define ARCH_CALL_CODE {0x0f, 0x05}
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

static inline void arch_call_with(arch_regs *regs, unsigned long at, long number, const unsigned long args[6])
{
	arch_call(regs, at, number);
	regs->rdi = args[0];
	regs->rsi = args[1];
	regs->rdx = args[2];
	regs->r10 = args[3];
	regs->r8 = args[4];
	regs->r9 = args[5];
}

/* The thread goes on at an address, in no system call. */
static inline void arch_go(arch_regs *regs, unsigned long at)
{
	regs->rip = at;
	regs->orig_rax = (unsigned long)-1L;
}

static inline long arch_result(const arch_regs *regs)
{
	return (long)regs->rax;
}

static inline int arch_is_64(const arch_regs *regs)
{
	return regs->cs == 0x33;
}

/* The registers of a thread that goes on without the kernel's help: what the kernel would make of an interrupted call
 * before it let the thread go (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND, -ERESTART_RESTARTBLOCK). */
static inline void arch_as_resumed(arch_regs *regs)
{
	long number, result;

	if (!arch_in_syscall(regs, &number, &result) || result > -512 || result < -516 || result == -515)
		return;
	regs->rax = (unsigned long)(result == -516 ? SYS_restart_syscall : number);
	regs->rip -= ARCH_CALL_BYTES;
	regs->orig_rax = (unsigned long)-1L;
}

/* The code that a borrowed thread runs; the offsets are those of struct control, which lies one page behind it
 * (borrow.h). It uses no stack and no register but the general ones, so there is nothing else to be put back.
 *
 * Each batch: as long as the word names a tracer, call after call; then the word goes to done, and whoever waits there
 * is woken. Then the next batch, when the word has changed. A word without a tracer (the kernel makes it so when the
 * tracer dies, before it lets any thread go) ends all of that: it is scheduled as before, and flags, stack pointer,
 * signal mask and registers become the program's. Until the mask is, no signal comes in. */
#define ARCH_STUB                                                                                                      \
	".pushsection .rodata.snapd_stub,\"a\",@progbits\n"                                                            \
	".balign 16\n"                                                                                                 \
	".globl sn_stub_begin\n.hidden sn_stub_begin\n.globl sn_stub_end\n.hidden sn_stub_end\n"                       \
	"sn_stub_begin:\n"                                                                                             \
	".Lstub:\n"                                                                                                    \
	"	leaq .Lstub(%rip), %rbx\n"                                                                            \
	"	addq $4096, %rbx\n"                                                                                   \
	"1:	movl (%rbx), %r14d\n"                                                                                 \
	"	movl 8(%rbx), %r12d\n"                                                                                \
	"	xorl %r13d, %r13d\n"                                                                                  \
	"	leaq 256(%rbx), %rbp\n"                                                                               \
	"2:	cmpl %r12d, %r13d\n"                                                                                  \
	"	jae 5f\n"                                                                                             \
	"	testl $0x3fffffff, (%rbx)\n"                                                                          \
	"	jz 8f\n"                                                                                              \
	"	movl 64(%rbp), %eax\n"                                                                                \
	"	testl $8, %eax\n"                                                                                     \
	"	jz 11f\n"                                                                                             \
	"	cmpq $-16, -16(%rbp)\n"                                                                               \
	"	jne 13f\n"                                                                                            \
	"11:	testl $16, %eax\n"                                                                                    \
	"	jz 12f\n"                                                                                             \
	"	cmpq $-16, -88(%rbp)\n"                                                                               \
	"	jne 13f\n"                                                                                            \
	"12:	movq (%rbp), %rax\n"                                                                                  \
	"	movq 8(%rbp), %rdi\n"                                                                                 \
	"	movq 16(%rbp), %rsi\n"                                                                                \
	"	movq 24(%rbp), %rdx\n"                                                                                \
	"	movq 32(%rbp), %r10\n"                                                                                \
	"	movq 40(%rbp), %r8\n"                                                                                 \
	"	movq 48(%rbp), %r9\n"                                                                                 \
	"	syscall\n"                                                                                            \
	"	movq %rax, 56(%rbp)\n"                                                                                \
	"	incl %r13d\n"                                                                                         \
	"	cmpq $-4096, %rax\n"                                                                                  \
	"	ja 4f\n"                                                                                              \
	"	testl $1, 64(%rbp)\n"                                                                                 \
	"	jz 3f\n"                                                                                              \
	"	movq %rax, 80(%rbp)\n"                                                                                \
	"3:	addq $72, %rbp\n"                                                                                     \
	"	jmp 2b\n"                                                                                             \
	"13:	incl %r13d\n"                                                                                         \
	"	jmp 3b\n"                                                                                             \
	"4:	testl $4, 64(%rbp)\n"                                                                                 \
	"	jz 14f\n"                                                                                             \
	"	cmpq $-16, %rax\n"                                                                                    \
	"	je 3b\n"                                                                                              \
	"14:	testl $2, 64(%rbp)\n"                                                                                 \
	"	jnz 5f\n"                                                                                             \
	"	testl $1, 64(%rbp)\n"                                                                                 \
	"	jz 3b\n"                                                                                              \
	"	incl %r13d\n"                                                                                         \
	"	addq $72, %rbp\n"                                                                                     \
	"	jmp 3b\n"                                                                                             \
	"5:	movl %r13d, 12(%rbx)\n"                                                                               \
	"	movl %r14d, 4(%rbx)\n"                                                                                \
	"	leaq 4(%rbx), %rdi\n"                                                                                 \
	"	movl $1, %esi\n"                                                                                      \
	"	movl $1, %edx\n"                                                                                      \
	"	movl $202, %eax\n"                                                                                    \
	"	syscall\n"                                                                                            \
	"6:	movl (%rbx), %edx\n"                                                                                  \
	"	cmpl %r14d, %edx\n"                                                                                   \
	"	jne 7f\n"                                                                                             \
	"	movq %rbx, %rdi\n"                                                                                    \
	"	xorl %esi, %esi\n"                                                                                    \
	"	xorl %r10d, %r10d\n"                                                                                  \
	"	movl $202, %eax\n"                                                                                    \
	"	syscall\n"                                                                                            \
	"	jmp 6b\n"                                                                                             \
	"7:	testl $0x3fffffff, %edx\n"                                                                            \
	"	jnz 1b\n"                                                                                             \
	"8:	movl 24(%rbx), %r12d\n"                                                                               \
	"	leaq 4864(%rbx), %rbp\n"                                                                              \
	"9:	testl %r12d, %r12d\n"                                                                                 \
	"	jz 10f\n"                                                                                             \
	"	movq (%rbp), %rax\n"                                                                                  \
	"	movq 8(%rbp), %rdi\n"                                                                                 \
	"	movq 16(%rbp), %rsi\n"                                                                                \
	"	movq 24(%rbp), %rdx\n"                                                                                \
	"	syscall\n"                                                                                            \
	"	addq $72, %rbp\n"                                                                                     \
	"	decl %r12d\n"                                                                                         \
	"	jmp 9b\n"                                                                                             \
	"10:	leaq 176(%rbx), %rsp\n"                                                                               \
	"	popfq\n"                                                                                              \
	"	movq 184(%rbx), %rsp\n"                                                                               \
	"	movl $14, %eax\n"                                                                                     \
	"	movl $2, %edi\n"                                                                                      \
	"	leaq 16(%rbx), %rsi\n"                                                                                \
	"	movl $0, %edx\n"                                                                                      \
	"	movl $8, %r10d\n"                                                                                     \
	"	syscall\n"                                                                                            \
	"	movq 32(%rbx), %r15\n"                                                                                \
	"	movq 40(%rbx), %r14\n"                                                                                \
	"	movq 48(%rbx), %r13\n"                                                                                \
	"	movq 56(%rbx), %r12\n"                                                                                \
	"	movq 64(%rbx), %rbp\n"                                                                                \
	"	movq 80(%rbx), %r11\n"                                                                                \
	"	movq 88(%rbx), %r10\n"                                                                                \
	"	movq 96(%rbx), %r9\n"                                                                                 \
	"	movq 104(%rbx), %r8\n"                                                                                \
	"	movq 112(%rbx), %rax\n"                                                                               \
	"	movq 120(%rbx), %rcx\n"                                                                               \
	"	movq 128(%rbx), %rdx\n"                                                                               \
	"	movq 136(%rbx), %rsi\n"                                                                               \
	"	movq 144(%rbx), %rdi\n"                                                                               \
	"	movq .Lstub+4096+72(%rip), %rbx\n"                                                                    \
	"	jmpq *.Lstub+4096+160(%rip)\n"                                                                        \
	"sn_stub_end:\n"                                                                                               \
	".popsection\n"
#endif

#endif
