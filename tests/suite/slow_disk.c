/* A disk that takes its time: to flush a file whose path holds HELD takes as long as the file HOLD is there. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int file) {
    const char *held = getenv("HELD"), *hold = getenv("HOLD");
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (held && hold && readlink(link, path, sizeof path - 1) > 0 && strstr(path, held))
        while (access(hold, F_OK) == 0) usleep(1000);
    return (int)syscall(SYS_fsync, file);
}
