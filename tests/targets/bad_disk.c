/* A disk that does what the tests want, preloaded into a daemon: positioned writes behind a store's header fail or are
 * cut short, as the first letter in the file that BAD_DISK names says.
 *
 *   e  EIO     q  EDQUOT     f  ENOSPC     s  at most 1,000 bytes a call     n  every write is as it would be
 *   S  as s, and every fifth one fails with EIO          r  every 61st one fails with EIO */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define HEADER_BYTES 4096
#define SHORT_BYTES 1000

typedef ssize_t (*pwrite_fn)(int, const void *, size_t, off_t);

static char mode(void)
{
    const char *path = getenv("BAD_DISK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    char letter = 'n';
    if (fd >= 0) {
        if (read(fd, &letter, 1) != 1)
            letter = 'n';
        close(fd);
    }
    return letter;
}

static ssize_t refuse(int error)
{
    errno = error;
    return -1;
}

static ssize_t write_badly(const char *name, int fd, const void *data, size_t bytes, off_t offset)
{
    static atomic_uint calls;
    pwrite_fn real = (pwrite_fn)dlsym(RTLD_NEXT, name);
    if (offset < HEADER_BYTES)
        return real(fd, data, bytes, offset);
    switch (mode()) {
    case 'e':
        return refuse(EIO);
    case 'q':
        return refuse(EDQUOT);
    case 'f':
        return refuse(ENOSPC);
    case 'r':
        if (atomic_fetch_add(&calls, 1) % 61 == 60)
            return refuse(EIO);
        return real(fd, data, bytes, offset);
    case 'S':
        if (atomic_fetch_add(&calls, 1) % 5 == 4)
            return refuse(EIO);
        /* fall through */
    case 's':
        return real(fd, data, bytes < SHORT_BYTES ? bytes : SHORT_BYTES, offset);
    default:
        return real(fd, data, bytes, offset);
    }
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset)
{
    return write_badly("pwrite", fd, data, bytes, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t offset)
{
    return write_badly("pwrite64", fd, data, bytes, offset);
}
