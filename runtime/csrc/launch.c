// SPDX-License-Identifier: Apache-2.0
/*
 * The last step before an agent: launch UID COMMAND [ARGUMENT]...
 *
 * bwrap starts it inside the finished sandbox, as root with three capabilities and no environment. It gives up every
 * privilege first, says so with one byte on ORDER_FD, and waits there for the agent's environment: secrets and the
 * invocation's own values come this way, so they are on no command line and in nobody's /proc/PID/environ. A sandbox
 * prepared ahead of demand waits in this read; one that is not finds its order already there.
 *
 * Order: u32 length, little-endian, then that many bytes of NAME=VALUE, each ended by NUL. The end of the socket
 * before all of it has come means that the runtime is gone: nothing is executed then. Exec closes the socket, which
 * tells the runtime when the agent began.
 *
 * Static: it runs as root before it drops, so nothing of the sandbox's root (loader, libraries) may have a part in it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	ORDER_FD = 7,		       /* clrk.runtime.isolation.ORDER_FD */
	MAX_ENVIRONMENT = 1024 * 1024, /* clrk.runtime.isolation.MAX_ENVIRONMENT_BYTES */
	MAX_VARIABLES = MAX_ENVIRONMENT / 2,
	EXIT_LAUNCH = 125, /* as env(1) and setpriv(1): the step itself failed, the command did not run */
	EXIT_NOT_EXECUTABLE = 126,
	EXIT_NOT_FOUND = 127,
};

static char environment[MAX_ENVIRONMENT];
static char *variables[MAX_VARIABLES + 1];

static _Noreturn void fail(int status, const char *what)
{
	dprintf(STDERR_FILENO, "clrk: %s: %s\n", what, strerror(errno));
	_exit(status);
}

static void must(long result, const char *what)
{
	if (result < 0)
		fail(EXIT_LAUNCH, what);
}

static void drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};

	must(syscall(SYS_capset, &header, none), "drop capabilities");
}

/* Changing every uid away from 0 clears the permitted, effective and ambient sets; the inheritable one stays. */
static void drop_privileges(unsigned int uid)
{
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
	must(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient capabilities");
	for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		must(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0), "bounding set");
	must(setgroups(0, NULL), "setgroups");
	must(setresgid(uid, uid, uid), "setresgid");
	must(setresuid(uid, uid, uid), "setresuid");
	drop_capabilities();
}

/* Exec keeps what is ignored and what is blocked; neither may be whatever the runtime was started with. */
static void reset_signals(void)
{
	/* The kernel's own call: glibc keeps 32 and 33 to itself, and whoever started the runtime may ignore them. */
	struct {
		void (*handler)(int);
		unsigned long flags;
		void (*restorer)(void);
		unsigned long mask;
	} by_default = {.handler = SIG_DFL};
	sigset_t none;

	for (int signum = 1; signum <= 64; signum++) /* refused for SIGKILL and SIGSTOP, which have no other */
		syscall(SYS_rt_sigaction, signum, &by_default, NULL, sizeof(by_default.mask));
	must(sigemptyset(&none), "signals");
	must(sigprocmask(SIG_SETMASK, &none, NULL), "signals");
}

/* Returns only when all of it has come. */
static void read_all(void *target, size_t size)
{
	char *at = target;

	while (size > 0) {
		ssize_t count = read(ORDER_FD, at, size);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			_exit(EXIT_LAUNCH);
		at += count;
		size -= (size_t)count;
	}
}

static void receive_environment(void)
{
	unsigned char raw[4];
	size_t size, count = 0;

	read_all(raw, sizeof(raw));
	size = raw[0] | (size_t)raw[1] << 8 | (size_t)raw[2] << 16 | (size_t)raw[3] << 24;
	errno = E2BIG;
	if (size > sizeof(environment))
		fail(EXIT_LAUNCH, "environment");
	read_all(environment, size);
	errno = EINVAL;
	if (size > 0 && environment[size - 1] != '\0')
		fail(EXIT_LAUNCH, "environment");
	for (size_t at = 0; at < size; at += strlen(environment + at) + 1) {
		errno = E2BIG;
		if (count == MAX_VARIABLES)
			fail(EXIT_LAUNCH, "environment");
		variables[count++] = environment + at;
	}
	variables[count] = NULL;
}

static unsigned int parse_uid(const char *text)
{
	char *end = NULL;
	unsigned long uid;

	errno = 0;
	uid = strtoul(text, &end, 10);
	if (errno || end == text || *end != '\0' || uid == 0 || uid >= 0xffffffffUL) {
		errno = EINVAL;
		fail(EXIT_LAUNCH, "uid");
	}
	return (unsigned int)uid;
}

int main(int argc, char **argv)
{
	unsigned int uid;

	errno = EINVAL;
	if (argc < 3)
		fail(EXIT_LAUNCH, "usage: launch UID COMMAND [ARGUMENT]...");
	uid = parse_uid(argv[1]);
	must(close_range(STDERR_FILENO + 1, ~0U, CLOSE_RANGE_CLOEXEC), "close_range");
	drop_privileges(uid);
	reset_signals();
	if (send(ORDER_FD, "R", 1, MSG_NOSIGNAL) != 1)
		_exit(EXIT_LAUNCH); /* the runtime is gone */
	receive_environment();
	environ = variables; /* execvp looks for the command in the agent's PATH */
	execvp(argv[2], argv + 2);
	fail(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE, argv[2]);
}
