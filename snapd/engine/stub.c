/* The code that a borrowed thread runs: arch.h has it, here it becomes bytes that can be copied into a target.
 */
#define SNAPD_ARCH_REGS
#include "internal.h"

#include "../agent/arch.h"

__asm__(ARCH_STUB);
