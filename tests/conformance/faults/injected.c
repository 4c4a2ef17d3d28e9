/* Counts the system calls that change files, and at one of them kills the process or lets the disk be full.
   Preloaded (LD_PRELOAD); fault_arm(at, full) starts the count, and nothing is counted before.
   A kill in a write comes after half of its bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1, seen = 0;
static int full = 0, counting = 0;

void fault_arm(long at, int is_full) { left = at; full = is_full; seen = 0; counting = 1; }
long fault_seen(void) { return seen; }

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* 1 where this call is the one; a full disk stays full. */
static int hit(void) {
  if (!counting) return 0;
  seen++;
  if (left <= 0 || seen < left) return 0;
  return full || seen == left;
}
static int of_a_file(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISREG(s.st_mode); }
static int no_room(void) { errno = ENOSPC; return -1; }

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = next(name)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  if (of_a_file(fd) && hit()) { if (full) return no_room(); real(fd, data, size / 2); die(); }
  return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  if (of_a_file(fd) && hit()) { if (full) return no_room(); die(); }
  return real(fd, parts, count);
}
static ssize_t at_offset(const char *name, int fd, const void *data, size_t size, off_t offset) {
  ssize_t (*real)(int, const void *, size_t, off_t) = next(name);
  if (of_a_file(fd) && hit()) { if (full) return no_room(); real(fd, data, size / 2, offset); die(); }
  return real(fd, data, size, offset);
}
ssize_t pwrite(int fd, const void *d, size_t n, off_t o) { return at_offset("pwrite", fd, d, n, o); }
ssize_t pwrite64(int fd, const void *d, size_t n, off_t o) { return at_offset("pwrite64", fd, d, n, o); }

static int opened(const char *name, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...) = next(name);
  if ((flags & O_CREAT) && hit()) { if (full) return no_room(); die(); }
  return real(path, flags, mode);
}
#define MODE mode_t mode = 0; if (flags & O_CREAT) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
int open(const char *path, int flags, ...) { MODE return opened("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened("open64", path, flags, mode); }
static int opened_at(const char *name, int dir, const char *path, int flags, mode_t mode) {
  int (*real)(int, const char *, int, ...) = next(name);
  if ((flags & O_CREAT) && hit()) { if (full) return no_room(); die(); }
  return real(dir, path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) { MODE return opened_at("openat", dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE return opened_at("openat64", dir, path, flags, mode); }

#define TAKES_ROOM if (hit()) { if (full) return no_room(); die(); }
#define TAKES_NONE if (!full && hit()) die();
int mkdir(const char *path, mode_t mode) { REAL(int, "mkdir", const char *, mode_t); TAKES_ROOM return real(path, mode); }
int link(const char *a, const char *b) { REAL(int, "link", const char *, const char *); TAKES_ROOM return real(a, b); }
int symlink(const char *a, const char *b) { REAL(int, "symlink", const char *, const char *); TAKES_ROOM return real(a, b); }
int fsync(int fd) { REAL(int, "fsync", int); TAKES_NONE return real(fd); }
int rename(const char *a, const char *b) { REAL(int, "rename", const char *, const char *); TAKES_NONE return real(a, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned flags) {
  REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
  TAKES_NONE return real(d, a, e, b, flags);
}
int unlink(const char *path) { REAL(int, "unlink", const char *); TAKES_NONE return real(path); }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); TAKES_NONE return real(path); }
int unlinkat(int d, const char *p, int f) { REAL(int, "unlinkat", int, const char *, int); TAKES_NONE return real(d, p, f); }
int ftruncate(int fd, off_t size) { REAL(int, "ftruncate", int, off_t); TAKES_NONE return real(fd, size); }
