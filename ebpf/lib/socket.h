/* SPDX-License-Identifier: Apache-2.0 */
/* Which sockets exist and what they may be bound to. */
#ifndef CLRK_SOCKET_H
#define CLRK_SOCKET_H

#include "lib/address.h"
#include "lib/maps.h"

#define CLRK_IPPROTO_TCP 6
#define CLRK_IPPROTO_UDP 17
#define CLRK_SOCK_STREAM 1
#define CLRK_SOCK_DGRAM 2

static __always_inline bool socket_is_tcp(__u32 type, __u32 protocol)
{
	return type == CLRK_SOCK_STREAM && protocol == CLRK_IPPROTO_TCP;
}

static __always_inline bool socket_is_udp(__u32 type, __u32 protocol)
{
	return type == CLRK_SOCK_DGRAM && protocol == CLRK_IPPROTO_UDP;
}

/* Raw, ICMP, UDPLITE, MPTCP, SCTP and whatever comes: no hook of ours sees all they can do. */
static __always_inline int socket_check(struct bpf_sock *ctx)
{
	if (!sandbox_find(bpf_get_netns_cookie(ctx))) {
		counter_add(CLRK_COUNT_REFUSED_UNKNOWN_NETNS);
		return -EPERM;
	}
	if (!socket_is_tcp(ctx->type, ctx->protocol) && !socket_is_udp(ctx->type, ctx->protocol)) {
		counter_add(CLRK_COUNT_REFUSED_SOCKET);
		return -EPERM;
	}
	return 0;
}

/*
 * Ports of clrk's listeners stay free of agents even while the gateway is being restarted: who listened there would
 * receive stamped connections. On loopback addresses they are harmless, nothing is ever redirected there. Port 0 can
 * not become one of them: ip_local_reserved_ports.
 */
static __always_inline int bind_check(struct bpf_sock_addr *ctx, const struct clrk_target *target)
{
	if (!sandbox_find(bpf_get_netns_cookie(ctx))) {
		counter_add(CLRK_COUNT_REFUSED_UNKNOWN_NETNS);
		return -EPERM;
	}
	if (target->port != CLRK_PORT_EGRESS && target->port != CLRK_PORT_METADATA && target->port != CLRK_PORT_DNS &&
	    target->port != CLRK_PORT_OTLP)
		return 0;
	/* :: is a wildcard here, unlike in connect(). */
	if (ip_is_loopback(target->ip) && (target->ip[3] || ip_is_v4(target->ip)))
		return 0;
	counter_add(CLRK_COUNT_REFUSED_BIND);
	return -EPERM;
}

#endif
