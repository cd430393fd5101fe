/* SPDX-License-Identifier: Apache-2.0 */
/*
 * UDP: loopback passes, DNS goes to the sandbox's resolver, everything else is EPERM. The resolver speaks IPv4 only.
 * DNS to an IPv6 nameserver is refused, not translated: the kernel does not let a hook turn an IPv6 destination into a
 * v4-mapped one (udpv6_sendmsg: ENOTSUPP).
 */
#ifndef CLRK_UDP_H
#define CLRK_UDP_H

#include "lib/address.h"
#include "lib/maps.h"

static __always_inline int query_save(struct bpf_sock *sk, const struct clrk_target *target, bool connecting)
{
	struct clrk_query *query = query_create(sk);

	if (!query) {
		counter_add(CLRK_COUNT_FAILED_QUERY_STORAGE);
		return -ENOMEM;
	}
	query->ip[0] = target->ip[0];
	query->ip[1] = target->ip[1];
	query->ip[2] = target->ip[2];
	query->ip[3] = target->ip[3];
	if (connecting)
		query->connected = 1;
	return 0;
}

/* Decide on one destination; on 0 the caller writes *target back to the context. */
static __always_inline int udp_redirect(struct bpf_sock *sk, const struct clrk_sandbox *sandbox,
					struct clrk_target *target, bool connecting)
{
	__u32 resolver = load_v4(sandbox->egress_v4);
	struct clrk_query *query;
	int error;

	if (ip_is_loopback(target->ip)) {
		if (connecting)
			query_delete(sk);
		return 0;
	}
	if (target->port != CLRK_PORT_DNS) {
		counter_add(CLRK_COUNT_REFUSED_UDP);
		return -EPERM;
	}
	if (!ip_is_v4(target->ip)) {
		counter_add(CLRK_COUNT_REFUSED_UDP_DNS6);
		return -EPERM;
	}
	if (target->ip[3] == resolver) {
		/* send() on a connected v4-mapped socket comes here with the address that connect() was given by us. */
		query = query_find(sk);
		if (connecting || (query && !query->connected))
			query_delete(sk);
		return 0;
	}
	error = query_save(sk, target, connecting);
	if (error)
		return error;
	target->ip[3] = resolver;
	return 0;
}

static __always_inline int udp_send(struct bpf_sock_addr *ctx, struct clrk_target *target)
{
	struct clrk_sandbox *sandbox = sandbox_find(bpf_get_netns_cookie(ctx));
	struct bpf_sock *sk = ctx->sk;

	if (!sandbox) {
		counter_add(CLRK_COUNT_REFUSED_UNKNOWN_NETNS);
		return -EPERM;
	}
	if (!sk) {
		counter_add(CLRK_COUNT_FAILED_NO_SOCKET);
		return -EPERM;
	}
	if (ctx->protocol != CLRK_IPPROTO_UDP) {
		counter_add(CLRK_COUNT_REFUSED_CONNECT_PROTOCOL);
		return -EPERM;
	}
	target_pin_any(target);
	return udp_redirect(sk, sandbox, target, false);
}

/* Show an answer of the resolver as coming from the nameserver that was asked. */
static __always_inline bool udp_source(struct bpf_sock_addr *ctx, struct clrk_target *source)
{
	struct clrk_sandbox *sandbox = sandbox_find(bpf_get_netns_cookie(ctx));
	struct bpf_sock *sk = ctx->sk;
	struct clrk_query *query;

	if (!sandbox || !sk || source->port != CLRK_PORT_DNS || !ip_is_v4(source->ip) ||
	    source->ip[3] != load_v4(sandbox->egress_v4))
		return false;
	query = query_find(sk);
	if (!query)
		return false;
	source->ip[3] = query->ip[3];
	return true;
}

#endif
