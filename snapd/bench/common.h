/* What small programs that are driven by lines share: random numbers, time, one-line failure and JSON replies.
 * Header only and plain libc; the tests' targets use it too. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define MIB ((size_t)1 << 20)
#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

static inline uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *rng)
{
    rng->state += 0x9e3779b97f4a7c15ull;
    return mix64(rng->state);
}

static inline uint64_t rng_below(struct rng *rng, uint64_t limit)
{
    return (uint64_t)(((unsigned __int128)rng_next(rng) * limit) >> 64);
}

static inline uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

static inline void sleep_ns(uint64_t ns)
{
    struct timespec ts = {.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
    while (nanosleep(&ts, &ts) == -1 && errno == EINTR) {
    }
}

/* Fit for a forked child of a threaded program: no stdio lock, no malloc, no exit handlers. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...)
{
    char line[2048];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (length < 0)
        length = 0;
    if ((size_t)length > sizeof line - 2)
        length = sizeof line - 2;
    line[length] = '\n';
    ssize_t written = write(STDERR_FILENO, line, (size_t)length + 1);
    (void)written;
    _exit(1);
}

__attribute__((noreturn)) static inline void fail_errno(const char *what)
{
    fail("FAILED %s: %s (errno %d)", what, strerror(errno), errno);
}

/* Anonymous memory that nobody pages out behind the program's back: expectations are kept here. */
static inline void *shared_alloc(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        fail_errno("mmap of shared memory");
    return at;
}

static inline char *heap_alloc(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        fail_errno("mmap of the heap");
    return at;
}

/* Prints {"ok":true,FIELDS} and flushes; pass "" for no fields. */
__attribute__((format(printf, 1, 2))) static inline void reply(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs(format[0] ? "{\"ok\":true," : "{\"ok\":true", stdout);
    vprintf(format, args);
    puts("}");
    va_end(args);
    fflush(stdout);
}

__attribute__((format(printf, 1, 2))) static inline void reply_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("{\"ok\":false,\"error\":\"", stdout);
    vprintf(format, args);
    puts("\"}");
    va_end(args);
    fflush(stdout);
}

struct command {
    char line[256];
    char name[32];
    uint64_t argument[3]; /* 0 where the command gave none */
};

/* One command of a command loop: "name [number]...". False at the end of input. */
static inline bool read_command(struct command *ret)
{
    memset(ret, 0, sizeof *ret);
    if (!fgets(ret->line, sizeof ret->line, stdin))
        return false;
    ret->line[strcspn(ret->line, "\n")] = '\0';
    char *word = ret->line;
    size_t length = strcspn(word, " ");
    memcpy(ret->name, word, length < sizeof ret->name - 1 ? length : sizeof ret->name - 1);
    word += length;
    for (size_t i = 0; i < COUNT_OF(ret->argument); i++)
        ret->argument[i] = strtoull(word, &word, 0);
    return true;
}

static inline uint64_t parse_number(const char *option, const char *text)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 0);
    if (errno || end == text || *end)
        fail("%s wants a number, not '%s'", option, text);
    return value;
}

#endif
