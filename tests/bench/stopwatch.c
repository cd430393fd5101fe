// The two measured programs of the benchmark, static and without any library.
//   stopwatch now                              prints CLOCK_MONOTONIC in ns: the first thing that an agent can do
//   stopwatch dial IP PORT COUNT               COUNT times: connect, send 64 bytes, read 1; prints ns per round
//   stopwatch serve SKIP                       fd 0 is a listening socket: reads SKIP + 64 bytes, answers with 1
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	MESSAGE = 64,
	MAX_SKIP = 4096
};

static long long now_ns(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (long long)time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int exchange(const struct sockaddr_in *to)
{
	char message[MESSAGE] = {0};
	char answer = 0;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	int failed = connect(fd, (const struct sockaddr *)to, sizeof(*to)) != 0 ||
		     send(fd, message, sizeof(message), 0) != MESSAGE || recv(fd, &answer, 1, 0) != 1;
	close(fd);
	return failed ? -1 : 0;
}

static int dial(const char *ip, const char *port, long count)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
	if (inet_pton(AF_INET, ip, &to.sin_addr) != 1 || count < 1)
		return 2;
	long long start = now_ns();
	for (long i = 0; i < count; i++) {
		if (exchange(&to) != 0) {
			perror("dial");
			return 1;
		}
	}
	printf("%lld\n", (now_ns() - start) / count);
	return 0;
}

static int serve(size_t skip)
{
	char buffer[MAX_SKIP + MESSAGE];
	if (skip > MAX_SKIP)
		return 2;
	for (;;) {
		int fd = accept(0, NULL, NULL);
		if (fd < 0)
			return 0;
		if (recv(fd, buffer, skip + MESSAGE, MSG_WAITALL) == (ssize_t)(skip + MESSAGE) &&
		    send(fd, "!", 1, 0) != 1)
			perror("serve");
		close(fd);
	}
}

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "now") == 0)
		return printf("%lld\n", now_ns()) < 0;
	if (argc == 5 && strcmp(argv[1], "dial") == 0)
		return dial(argv[2], argv[3], atol(argv[4]));
	if (argc == 3 && strcmp(argv[1], "serve") == 0)
		return serve((size_t)atol(argv[2]));
	return 2;
}
