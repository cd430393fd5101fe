/* SPDX-License-Identifier: Apache-2.0 */
/* Prints CLOCK_MONOTONIC in ns as early as a C program can: linked statically, so main() is nearly the first code. */
#include <stdio.h>
#include <time.h>

int main(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	printf("%lld\n", (long long)now.tv_sec * 1000000000 + now.tv_nsec);
	return 0;
}
