// A C agent without any library: connects to IP:PORT, sends a plain HTTP/1.1 request, prints what getpeername() says
// and the answer. Usage: raw_dial IP PORT HOST PATH (IPv4 or IPv6).
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int dial(const char *ip, const char *port)
{
	struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
	struct addrinfo *found = NULL;
	if (getaddrinfo(ip, port, &hints, &found) != 0)
		return -1;
	int fd = socket(found->ai_family, SOCK_STREAM, 0);
	if (fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
		close(fd);
		fd = -1;
	}
	freeaddrinfo(found);
	return fd;
}

static int print_peer(int fd)
{
	struct sockaddr_storage peer;
	socklen_t length = sizeof(peer);
	char host[64];
	char port[16];
	if (getpeername(fd, (struct sockaddr *)&peer, &length) != 0)
		return -1;
	if (getnameinfo((struct sockaddr *)&peer, length, host, sizeof(host), port, sizeof(port),
			NI_NUMERICHOST | NI_NUMERICSERV) != 0)
		return -1;
	return printf("peer %s %s\n", host, port) < 0 ? -1 : 0;
}

static int send_all(int fd, const char *bytes, size_t size)
{
	while (size > 0) {
		ssize_t sent = send(fd, bytes, size, 0);
		if (sent <= 0)
			return -1;
		bytes += sent;
		size -= (size_t)sent;
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: raw_dial IP PORT HOST PATH\n");
		return 2;
	}
	int fd = dial(argv[1], argv[2]);
	if (fd < 0 || print_peer(fd) != 0) {
		perror("raw_dial");
		return 1;
	}
	char request[1024];
	int size = snprintf(request, sizeof(request), "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n",
			    argv[4], argv[3]);
	if (size < 0 || (size_t)size >= sizeof(request) || send_all(fd, request, (size_t)size) != 0) {
		perror("raw_dial");
		return 1;
	}
	char buffer[4096];
	ssize_t got;
	while ((got = recv(fd, buffer, sizeof(buffer), 0)) > 0)
		fwrite(buffer, 1, (size_t)got, stdout);
	close(fd);
	return got < 0 ? 1 : 0;
}
