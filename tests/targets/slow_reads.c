/* A kernel that takes its time between the messages of one read(), preloaded into a daemon: as when the thread that
 * reads a userfaultfd loses its CPU half way. Each event lets its caller go on as soon as it is copied out, so a read
 * with room for several may show one call of a thread and the next one, too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MESSAGE_BYTES 32
#define PAUSE_US 100

typedef ssize_t (*read_fn)(int, void *, size_t);

static int is_userfaultfd(int fd)
{
    static const char name[] = "anon_inode:[userfaultfd]";
    char path[32], target[sizeof name];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof target) == sizeof name - 1 && memcmp(target, name, sizeof name - 1) == 0;
}

ssize_t read(int fd, void *data, size_t bytes)
{
    read_fn next = (read_fn)dlsym(RTLD_NEXT, "read");
    if (bytes < MESSAGE_BYTES || !is_userfaultfd(fd))
        return next(fd, data, bytes);
    size_t done = 0;
    while (done + MESSAGE_BYTES <= bytes) {
        ssize_t got = next(fd, (char *)data + done, MESSAGE_BYTES);
        if (got <= 0)
            return done ? (ssize_t)done : got;
        done += (size_t)got;
        usleep(PAUSE_US);
    }
    return (ssize_t)done;
}
