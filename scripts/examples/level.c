/* A program that chooses its level. Compile: cc -o level level.c; run: ./level 5 10.0.0.2 7000 hello */

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Gives what the socket sends from now on a level, 0 to 7. Call it after setsockopt(IP_TOS), which overwrites the
 * level, and for each connection from accept(), which starts at level 0. */
static int set_level(int fd, int level)
{
    if (setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &level, sizeof level) == 0)
        return 0;
    if (errno == EPERM)
        fprintf(stderr, "level %d needs CAP_NET_ADMIN; run this by `qjump run --level %d -- ...`\n", level, level);
    else
        perror("setsockopt(SO_PRIORITY)");
    return -1;
}

int main(int argc, char **argv)
{
    if (argc != 5 || strlen(argv[1]) != 1 || argv[1][0] < '0' || argv[1][0] > '7') {
        fprintf(stderr, "usage: %s LEVEL HOST PORT MESSAGE, where LEVEL is 0 to 7\n", argv[0]);
        return 64;
    }
    struct addrinfo *to;
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM};
    int error = getaddrinfo(argv[2], argv[3], &hints, &to);
    if (error != 0) {
        fprintf(stderr, "%s port %s: %s\n", argv[2], argv[3], gai_strerror(error));
        return 1;
    }
    int fd = socket(to->ai_family, to->ai_socktype, to->ai_protocol);
    if (fd < 0) {
        perror("socket");
        return 1;
    }
    if (set_level(fd, argv[1][0] - '0') != 0)
        return 1;
    if (sendto(fd, argv[4], strlen(argv[4]), 0, to->ai_addr, to->ai_addrlen) < 0) {
        perror("sendto");
        return 1;
    }
    int level;
    socklen_t length = sizeof level;
    if (getsockopt(fd, SOL_SOCKET, SO_PRIORITY, &level, &length) == 0)
        printf("sent at level %d\n", level);
    freeaddrinfo(to);
    close(fd);
    return 0;
}
