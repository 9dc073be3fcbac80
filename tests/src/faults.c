/* Makes calls of a program fail, when it is loaded before all else (LD_PRELOAD).
 *
 * The variable GANGLION_FAULTS names a file of lines "OPERATION ERRNO PART": each call of the operation on a path with that
 * part fails. Operations: sync, rename, link, write. A file that is not there means no faults.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *operation, const char *path) {
    int before = errno, number, used;
    char text[1024], name[16], part[512];
    const char *file = getenv("GANGLION_FAULTS");
    /* Calls of the system, not of the library: those come here again. */
    int fd = file ? (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC) : -1;
    long length = fd < 0 ? 0 : syscall(SYS_read, fd, text, sizeof text - 1);
    if (fd >= 0)
        syscall(SYS_close, fd);
    text[length < 0 ? 0 : length] = 0;
    for (char *line = text; sscanf(line, "%15s %d %511s%n", name, &number, part, &used) == 3; line += used) {
        if (strcmp(name, operation) == 0 && strstr(path, part)) {
            errno = number;
            return 1;
        }
    }
    errno = before;
    return 0;
}

static int fails_at(const char *operation, int fd) {
    char link[64], path[4096];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0)
        return 0;
    path[length] = 0;
    return fails(operation, path);
}

int fsync(int fd) { return fails_at("sync", fd) ? -1 : (int)syscall(SYS_fsync, fd); }

int fdatasync(int fd) { return fails_at("sync", fd) ? -1 : (int)syscall(SYS_fdatasync, fd); }

int rename(const char *from, const char *to) {
    return fails("rename", to) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    return fails("link", to) ? -1 : (int)syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

ssize_t write(int fd, const void *bytes, size_t length) {
    return fails_at("write", fd) ? -1 : syscall(SYS_write, fd, bytes, length);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    return fails_at("write", fd) ? -1 : syscall(SYS_pwrite64, fd, bytes, length, at);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return pwrite64(fd, bytes, length, at); }
