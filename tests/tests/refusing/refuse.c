// Stands in for a file system that lacks something: locks of whole files (flock), locks of parts of files (fcntl), memory
// that processes share (mmap). REFUSED names what it lacks. Preloaded into a program.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int lacks(const char *what) {
  const char *refused = getenv("REFUSED");
  return refused && strstr(refused, what);
}

int flock(int file, int operation) {
  static int (*real)(int, int);
  if (!real) real = dlsym(RTLD_NEXT, "flock");
  if (lacks("flock")) {
    errno = ENOLCK;
    return -1;
  }
  return real(file, operation);
}

static int is_lock(int command) {
  return command == F_SETLK || command == F_SETLKW || command == F_GETLK || command == F_OFD_SETLK ||
         command == F_OFD_SETLKW || command == F_OFD_GETLK;
}

static int control(const char *name, int file, int command, void *argument) {
  int (*real)(int, int, ...) = dlsym(RTLD_NEXT, name);
  if (is_lock(command) && lacks("fcntl")) {
    errno = ENOLCK;
    return -1;
  }
  return real(file, command, argument);
}

int fcntl(int file, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void *argument = va_arg(arguments, void *);
  va_end(arguments);
  return control("fcntl", file, command, argument);
}

int fcntl64(int file, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void *argument = va_arg(arguments, void *);
  va_end(arguments);
  return control("fcntl64", file, command, argument);
}

// Only what SQLite shares: programs themselves are mapped too.
static int is_shared_index(int file, int flags) {
  char link[64], path[4096];
  if (file < 0 || !(flags & MAP_SHARED) || !lacks("mmap")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  return length > 4 && !memcmp(path + length - 4, "-shm", 4);
}

static void *map(const char *name, void *at, size_t length, int protection, int flags, int file, off64_t offset) {
  void *(*real)(void *, size_t, int, int, int, off64_t) = dlsym(RTLD_NEXT, name);
  if (is_shared_index(file, flags)) {
    errno = ENODEV;
    return MAP_FAILED;
  }
  return real(at, length, protection, flags, file, offset);
}

void *mmap(void *at, size_t length, int protection, int flags, int file, off_t offset) {
  return map("mmap", at, length, protection, flags, file, offset);
}

void *mmap64(void *at, size_t length, int protection, int flags, int file, off64_t offset) {
  return map("mmap64", at, length, protection, flags, file, offset);
}
