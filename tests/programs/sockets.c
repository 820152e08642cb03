/* Brings sockets into being in every way that the preload library covers, and says what level each has. Descriptor 0 is a
 * socket that was made before this program was started. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int level(int fd)
{
    int value = -1;
    socklen_t length = sizeof value;
    getsockopt(fd, SOL_SOCKET, SO_PRIORITY, &value, &length);
    return value;
}

static void check(int holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static void set_tos(int fd, int tos)
{
    check(setsockopt(fd, IPPROTO_IP, IP_TOS, &tos, sizeof tos) == 0, "IP_TOS");
}

static int tos(int fd)
{
    int value = -1;
    socklen_t length = sizeof value;
    getsockopt(fd, IPPROTO_IP, IP_TOS, &value, &length);
    return value;
}

static struct sockaddr_in listening(int fd)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    check(bind(fd, (struct sockaddr *)&at, length) == 0 && listen(fd, 5) == 0, "listen");
    getsockname(fd, (struct sockaddr *)&at, &length);
    return at;
}

/* Socket after socket; returns how many had another level than it was told. */
static void *make_sockets(void *expected)
{
    long wrong = 0;
    for (int i = 0; i < 500; i++) {
        int fd = socket(i % 2 ? AF_INET : AF_INET6, SOCK_DGRAM, 0);
        wrong += level(fd) != *(int *)expected;
        close(fd);
    }
    return (void *)wrong;
}

static void *wait_in_accept(void *listener)
{
    accept(*(int *)listener, NULL, NULL);
    return NULL;
}

int main(void)
{
    /* Inherited sockets come first, before anything touches them. */
    printf("inherited %d", level(0));
    int inherited = dup(0);
    printf(", duplicated %d\n", level(inherited));

    int v4 = socket(AF_INET, SOCK_STREAM, 0);
    printf("tcp v4 %d\n", level(v4));
    printf("tcp v6 %d\n", level(socket(AF_INET6, SOCK_STREAM, 0)));
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    printf("udp v4 %d\n", level(udp));
    printf("udp v6 %d\n", level(socket(AF_INET6, SOCK_DGRAM, 0)));
    printf("unix %d\n", level(socket(AF_UNIX, SOCK_STREAM, 0)));

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = listening(listener);
    check(connect(v4, (struct sockaddr *)&at, sizeof at) == 0, "connect");
    printf("accept %d\n", level(accept(listener, NULL, NULL)));
    int other = socket(AF_INET, SOCK_STREAM, 0);
    check(connect(other, (struct sockaddr *)&at, sizeof at) == 0, "connect");
    printf("accept4 %d\n", level(accept4(listener, NULL, NULL, SOCK_CLOEXEC)));

    printf("dup2 %d\n", level(dup2(udp, 100)));
    printf("dup3 %d\n", level(dup3(udp, 101, O_CLOEXEC)));

    set_tos(udp, 0x10);
    printf("after IP_TOS 0x10: %d, tos 0x%x\n", level(udp), tos(udp));
    set_tos(udp, 0xe0);
    printf("after IP_TOS 0xe0: %d, tos 0x%x\n", level(udp), tos(udp));
    int own = 2;
    setsockopt(udp, SOL_SOCKET, SO_PRIORITY, &own, sizeof own);
    check(connect(udp, (struct sockaddr *)&at, sizeof at) == 0, "connect");
    set_tos(udp, 0x20);
    printf("own SO_PRIORITY 2, then connect and IP_TOS: %d\n", level(udp));

    /* errno is that of the function itself: as it was after success, and its own after failure. */
    errno = 42;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    dup2(STDOUT_FILENO, 102);
    printf("errno after success %d\n", errno);
    int result = dup(-1);
    printf("dup(-1): %d, %s\n", result, strerror(errno));
    result = accept(fd, NULL, NULL);
    printf("accept(udp): %d, %s\n", result, strerror(errno));
    int zero = 0;
    result = setsockopt(STDOUT_FILENO, IPPROTO_IP, IP_TOS, &zero, sizeof zero);
    printf("setsockopt(stdout): %d, %s\n", result, strerror(errno));
    close(listener);
    result = connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&at, sizeof at);
    printf("connect: %d, %s\n", result, strerror(errno));

    /* Threads, and a thread that is cancelled while it is in the library: glibc unwinds its stack. */
    int expected = level(v4);
    pthread_t threads[8];
    long wrong = 0;
    for (int i = 0; i < 8; i++)
        check(pthread_create(&threads[i], NULL, make_sockets, &expected) == 0, "pthread_create");
    for (int i = 0; i < 8; i++) {
        void *found;
        pthread_join(threads[i], &found);
        wrong += (long)found;
    }
    printf("threads: %ld wrong\n", wrong);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    listening(listener);
    pthread_create(&threads[0], NULL, wait_in_accept, &listener);
    usleep(100000);
    void *end;
    pthread_cancel(threads[0]);
    pthread_join(threads[0], &end);
    printf("cancelled in accept: %s\n", end == PTHREAD_CANCELED ? "yes" : "no");

    fflush(stdout);
    pid_t child = vfork();
    if (child == 0) {
        dup2(1, 103);
        _exit(level(socket(AF_INET, SOCK_DGRAM, 0)));
    }
    int status;
    waitpid(child, &status, 0);
    printf("after vfork %d\n", WEXITSTATUS(status));
    return 0;
}
