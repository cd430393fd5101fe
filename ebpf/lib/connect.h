/* SPDX-License-Identifier: Apache-2.0 */
/* connect() of TCP sockets, and what getpeername() says afterwards. */
#ifndef CLRK_CONNECT_H
#define CLRK_CONNECT_H

#include "lib/address.h"
#include "lib/maps.h"
#include "lib/socket.h"
#include "lib/udp.h"

static __always_inline int conn_begin(struct bpf_sock_addr *ctx, struct bpf_sock *sk, const struct clrk_target *target,
				      __u64 netns_cookie)
{
	struct clrk_conn *conn = conn_create(sk);
	__u32 *dst;

	if (!conn) {
		counter_add(CLRK_COUNT_FAILED_CONN_STORAGE);
		return -ENOMEM;
	}
	dst = (__u32 *)conn->flow.dst;
	dst[0] = target->ip[0];
	dst[1] = target->ip[1];
	dst[2] = target->ip[2];
	dst[3] = target->ip[3];
	conn->flow.dst_port = target->port;
	conn->flow.family = ip_is_v4(target->ip) ? CLRK_FAMILY_V4 : CLRK_FAMILY_V6;
	conn->flow.cookie = bpf_get_socket_cookie(ctx);
	conn->flow.connect_ns = bpf_ktime_get_boot_ns();
	conn->flow.tgid = (__u32)(bpf_get_current_pid_tgid() >> 32);
	conn->flow.uid = (__u32)bpf_get_current_uid_gid();
	conn->netns_cookie = netns_cookie;
	conn->src_port = 0;
	conn->state = CLRK_CONN_CONNECTING;
	if (bpf_get_current_comm(conn->flow.comm, sizeof(conn->flow.comm))) {
		counter_add(CLRK_COUNT_FAILED_COMM);
		conn_delete(sk);
		return -EFAULT;
	}
	return 0;
}

static __always_inline void target_set_egress(struct clrk_target *target, const struct clrk_sandbox *sandbox)
{
	const __u32 *word = (const __u32 *)sandbox->egress_v6;

	if (ip_is_v4(target->ip)) {
		target->ip[3] = load_v4(sandbox->egress_v4);
	} else {
		target->ip[0] = word[0];
		target->ip[1] = word[1];
		target->ip[2] = word[2];
		target->ip[3] = word[3];
	}
	target->port = CLRK_PORT_EGRESS;
}

static __always_inline int tcp_connect(struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u64 netns_cookie,
				       const struct clrk_sandbox *sandbox, struct clrk_target *target)
{
	int error;

	if (ip_is_loopback(target->ip) || target_is_service(target, sandbox)) {
		/* What an earlier connect() of this socket left would stamp this connection. */
		conn_delete(sk);
		return 0;
	}
	if (target_is_egress_listener(target, sandbox)) {
		counter_add(CLRK_COUNT_REFUSED_CONNECT_LISTENER);
		return -EPERM;
	}
	error = conn_begin(ctx, sk, target, netns_cookie);
	if (error)
		return error;
	target_set_egress(target, sandbox);
	counter_add(CLRK_COUNT_CONNECT_REDIRECTED);
	return 0;
}

/* Decide on one connect(); on 0 the caller writes *target back to the context. */
static __always_inline int connect_redirect(struct bpf_sock_addr *ctx, struct clrk_target *target)
{
	__u64 netns_cookie = bpf_get_netns_cookie(ctx);
	struct clrk_sandbox *sandbox = sandbox_find(netns_cookie);
	struct bpf_sock *sk = ctx->sk;

	if (!sandbox) {
		counter_add(CLRK_COUNT_REFUSED_UNKNOWN_NETNS);
		return -EPERM;
	}
	if (!sk) {
		counter_add(CLRK_COUNT_FAILED_NO_SOCKET);
		return -EPERM;
	}
	target_pin_any(target);
	if (socket_is_tcp(ctx->type, ctx->protocol))
		return tcp_connect(ctx, sk, netns_cookie, sandbox, target);
	if (socket_is_udp(ctx->type, ctx->protocol))
		return udp_redirect(sk, sandbox, target, true);
	counter_add(CLRK_COUNT_REFUSED_CONNECT_PROTOCOL);
	return -EPERM;
}

/* The address that the agent dialled, if the socket's peer is another one. */
static __always_inline bool peer_find(struct bpf_sock_addr *ctx, struct clrk_target *peer)
{
	struct bpf_sock *sk = ctx->sk;
	struct clrk_query *query;
	struct clrk_conn *conn;
	const __u32 *dst;

	if (!sk)
		return false;
	conn = conn_find(sk);
	if (conn) {
		dst = (const __u32 *)conn->flow.dst;
		peer->ip[0] = dst[0];
		peer->ip[1] = dst[1];
		peer->ip[2] = dst[2];
		peer->ip[3] = dst[3];
		peer->port = (__u16)conn->flow.dst_port;
		return true;
	}
	query = query_find(sk);
	if (!query || !query->connected)
		return false;
	peer->ip[0] = query->ip[0];
	peer->ip[1] = query->ip[1];
	peer->ip[2] = query->ip[2];
	peer->ip[3] = query->ip[3];
	peer->port = CLRK_PORT_DNS;
	return true;
}

#endif
