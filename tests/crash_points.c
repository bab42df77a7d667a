/* Preloaded into a process: counts what it changes under $CRASH_ROOT, and ends or fails it at the n-th change.

   The state is shared by all processes of a run, in the file $CRASH_STATE. A write at which the process ends has
   been done by half. With `full` set, from the n-th change on whatever takes room on the disk fails with ENOSPC,
   and so does a sync at the n-th itself. Each change is a line of $CRASH_LOG, if that is given. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct state {
    atomic_long count; /* changes so far */
    atomic_long stop;  /* the one that is not reached; 0: none */
    atomic_long full;  /* 0: end the processes; 1: the disk is full from there on; 2: for that one; 3: pause there */
    atomic_long main;  /* the process that is ended with the one that got there; 0: that one alone */
    atomic_long armed;
};

static struct state *shared;
static const char *root;
static size_t root_length;
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CRASH_STATE"), *log = getenv("CRASH_LOG");
    root = getenv("CRASH_ROOT");
    if (!path || !root) return;
    root_length = strlen(root);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (at != MAP_FAILED) shared = at;
    if (log) log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
}

static int under_root(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int path_of(int fd, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, into, PATH_MAX - 1);
    if (n < 0) return 0;
    into[n] = 0;
    return 1;
}

static int full_path(int dir, const char *path, char *into) {
    if (!path) return 0;
    if (path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
        return 1;
    }
    char base[PATH_MAX];
    if (dir == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(dir, base)) return 0;
    snprintf(into, PATH_MAX, "%.2000s/%.2000s", base, path);
    return 1;
}

/* What is to be done about a change: 0 nothing, ENOSPC to fail, -1 to end the process. */
static int reached(const char *what, const char *path, int takes_room, int is_sync) {
    if (!shared || !atomic_load(&shared->armed) || !under_root(path)) return 0;
    long number = atomic_fetch_add(&shared->count, 1) + 1, stop = atomic_load(&shared->stop);
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, what, path + root_length);
        syscall(SYS_write, log_fd, line, n > (int)sizeof line ? sizeof line : (size_t)n);
    }
    if (!stop || number < stop) return 0;
    long full = atomic_load(&shared->full);
    if (full == 0) return -1;
    if (full == 3) {
        if (number == stop) kill(getpid(), SIGSTOP);
        return 0;
    }
    if (number > stop && full == 2) return 0;
    return takes_room || (is_sync && number == stop) ? ENOSPC : 0;
}

static void end(void) {
    long main = atomic_load(&shared->main);
    if (main > 0 && main != getpid()) kill((pid_t)main, SIGKILL);
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define AT_PATH(what, dir, path, room, call)                                   \
    char full_[PATH_MAX];                                                      \
    int todo_ = full_path(dir, path, full_) ? reached(what, full_, room, 0) : 0; \
    if (todo_ < 0) end();                                                      \
    if (todo_ > 0) { errno = todo_; return -1; }                               \
    return call

#define AT_FD(what, fd, room, sync, call)                                      \
    char full_[PATH_MAX];                                                      \
    int todo_ = path_of(fd, full_) ? reached(what, full_, room, sync) : 0;     \
    if (todo_ < 0) end();                                                      \
    if (todo_ > 0) { errno = todo_; return -1; }                               \
    return call

int rename(const char *a, const char *b) { AT_PATH("rename", AT_FDCWD, b, 0, REAL(rename)(a, b)); }
int renameat(int d, const char *a, int e, const char *b) { AT_PATH("rename", e, b, 0, REAL(renameat)(d, a, e, b)); }
int link(const char *a, const char *b) { AT_PATH("link", AT_FDCWD, b, 1, REAL(link)(a, b)); }
int linkat(int d, const char *a, int e, const char *b, int f) { AT_PATH("link", e, b, 1, REAL(linkat)(d, a, e, b, f)); }
int symlink(const char *a, const char *b) { AT_PATH("symlink", AT_FDCWD, b, 1, REAL(symlink)(a, b)); }
int unlink(const char *a) { AT_PATH("unlink", AT_FDCWD, a, 0, REAL(unlink)(a)); }
int unlinkat(int d, const char *a, int f) { AT_PATH("unlink", d, a, 0, REAL(unlinkat)(d, a, f)); }
int rmdir(const char *a) { AT_PATH("rmdir", AT_FDCWD, a, 0, REAL(rmdir)(a)); }
int mkdir(const char *a, mode_t m) { AT_PATH("mkdir", AT_FDCWD, a, 1, REAL(mkdir)(a, m)); }
int mkdirat(int d, const char *a, mode_t m) { AT_PATH("mkdir", d, a, 1, REAL(mkdirat)(d, a, m)); }
int fsync(int fd) { AT_FD("fsync", fd, 0, 1, REAL(fsync)(fd)); }
int fdatasync(int fd) { AT_FD("fsync", fd, 0, 1, REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t n) { AT_FD("truncate", fd, n > 0, 0, REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { AT_FD("truncate", fd, n > 0, 0, REAL(ftruncate64)(fd, n)); }

static ssize_t half_then_end(int fd, const void *data, size_t n) {
    syscall(SYS_write, fd, data, n / 2);
    end();
    return 0;
}

ssize_t write(int fd, const void *data, size_t n) {
    char full[PATH_MAX];
    int todo = shared && path_of(fd, full) ? reached("write", full, 1, 0) : 0;
    if (todo < 0) return half_then_end(fd, data, n);
    if (todo > 0) { errno = todo; return -1; }
    return syscall(SYS_write, fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) { AT_FD("write", fd, 1, 0, REAL(writev)(fd, parts, n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { AT_FD("write", fd, 1, 0, REAL(pwrite)(fd, data, n, at)); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { AT_FD("write", fd, 1, 0, REAL(pwrite64)(fd, data, n, at)); }
ssize_t sendfile(int out, int in, off_t *at, size_t n) {
    AT_FD("write", out, 1, 0, syscall(SYS_sendfile, out, in, at, n));
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t n) { AT_FD("write", out, 1, 0, syscall(SYS_sendfile, out, in, at, n)); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f) {
    AT_FD("write", out, 1, 0, syscall(SYS_copy_file_range, in, a, out, b, n, f));
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    if (shared && flags & (O_CREAT | O_TRUNC) && full_path(dir, path, full)) {
        struct stat found;
        int is_there = syscall(SYS_newfstatat, dir, path, &found, 0) == 0;
        if (!is_there || (flags & O_TRUNC && found.st_size > 0)) {
            int todo = reached(is_there ? "truncate" : "create", full, !is_there, 0);
            if (todo < 0) end();
            if (todo > 0) { errno = todo; return -1; }
        }
    }
    return (int)syscall(SYS_openat, dir, path, flags, mode);
}

#define MODE(flags)                                       \
    mode_t mode = 0;                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                  \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode = va_arg(rest, mode_t);                      \
        va_end(rest);                                     \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
