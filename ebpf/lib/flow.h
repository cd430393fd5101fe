/* SPDX-License-Identifier: Apache-2.0 */
/* From ESTABLISHED to the stamp: flow record, SOCKHASH, and out of it again. */
#ifndef CLRK_FLOW_H
#define CLRK_FLOW_H

#include "lib/address.h"
#include "lib/maps.h"

/*
 * Pick one form of an address out of the context. Both are read, and volatile: from two loads in two branches clang
 * would make one from a computed address, which the verifier refuses ("dereference of modified ctx ptr").
 */
#define CLRK_READ(field) (*(volatile __u32 *)&(field))
#define CLRK_READ_ADDRESS(to, v4, field_ip4, field_ip6)        \
	do {                                                   \
		const __u32 ip4 = CLRK_READ(field_ip4);        \
		const __u32 ip6_0 = CLRK_READ((field_ip6)[0]); \
		const __u32 ip6_1 = CLRK_READ((field_ip6)[1]); \
		const __u32 ip6_2 = CLRK_READ((field_ip6)[2]); \
		const __u32 ip6_3 = CLRK_READ((field_ip6)[3]); \
                                                               \
		(to)[0] = (v4) ? 0 : ip6_0;                    \
		(to)[1] = (v4) ? 0 : ip6_1;                    \
		(to)[2] = (v4) ? CLRK_MAPPED_WORD : ip6_2;     \
		(to)[3] = (v4) ? ip4 : ip6_3;                  \
	} while (0)

static __always_inline bool flow_peer_is_listener(struct bpf_sock_ops *ctx, const struct clrk_conn *conn,
						  const struct clrk_sandbox *sandbox)
{
	const bool v4 = conn->flow.family == CLRK_FAMILY_V4;
	struct clrk_target peer;

	CLRK_READ_ADDRESS(peer.ip, v4, ctx->remote_ip4, ctx->remote_ip6);
	peer.port = bpf_ntohl(ctx->remote_port);
	return target_is_egress_listener(&peer, sandbox);
}

static __always_inline void flow_save_source(struct bpf_sock_ops *ctx, struct clrk_conn *conn)
{
	const bool v4 = conn->flow.family == CLRK_FAMILY_V4;
	__u32 *src = (__u32 *)conn->src;

	CLRK_READ_ADDRESS(src, v4, ctx->local_ip4, ctx->local_ip6);
	conn->src_port = ctx->local_port;
}

/* HDR_OPT and RTT for the stamped socket, STATE for the one that is closed or disconnected before it sends. */
#define CLRK_CB_FLAGS (BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG)

static __always_inline int flow_record(struct bpf_sock_ops *ctx, struct clrk_conn *conn)
{
	struct clrk_sandbox *sandbox = sandbox_find(conn->netns_cookie);
	struct clrk_flow_key key = {};

	if (!sandbox || conn->state != CLRK_CONN_CONNECTING || !flow_peer_is_listener(ctx, conn, sandbox)) {
		counter_add(CLRK_COUNT_FLOW_UNEXPECTED);
		return -EPERM;
	}
	flow_save_source(ctx, conn);
	key.netns_cookie = conn->netns_cookie;
	__builtin_memcpy(key.src, conn->src, sizeof(key.src));
	key.src_port = conn->src_port;
	key.family = conn->flow.family;
	if (flow_put(&key, &conn->flow)) {
		counter_add(CLRK_COUNT_FAILED_FLOW_UPDATE);
		return -ENOSPC;
	}
	counter_add(CLRK_COUNT_FLOW_RECORDED);
	return 0;
}

static __always_inline int flow_flags(struct bpf_sock_ops *ctx, int flags)
{
	int error = bpf_sock_ops_cb_flags_set(ctx, flags);

	if (error)
		counter_add(CLRK_COUNT_FAILED_CB_FLAGS);
	return error;
}

/*
 * Runs while the SYN-ACK is handled, before the ACK that makes the gateway's accept() return: the gateway always finds
 * the record. Only active opens come here; an agent's own listener and a simultaneous open leave no record.
 */
static __always_inline int flow_established(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct clrk_conn *conn;
	int error;

	if (!sk)
		return 0;
	conn = conn_find(sk);
	if (!conn)
		return 0; /* loopback or a service of ours */
	error = flow_record(ctx, conn);
	if (error)
		return error;
	conn->state = CLRK_CONN_ESTABLISHED;
	error = sockmap_put(ctx, conn->flow.cookie);
	if (error) {
		/* Stays unstamped; the gateway refuses it by the record. */
		counter_add(CLRK_COUNT_FAILED_SOCKMAP_UPDATE);
		return error;
	}
	return flow_flags(ctx, CLRK_CB_FLAGS);
}

/*
 * Called for each segment being built (HDR_OPT_LEN) and for each ACK (RTT): the first of them after the stamp takes
 * the socket out of the SOCKHASH. A socket that stayed would answer FIONREAD with 0 and fail blocking reads with
 * EAGAIN (KERNEL.md section 1).
 */
static __always_inline int flow_leave_sockmap(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct clrk_conn *conn;
	int error;

	if (!sk)
		return 0;
	conn = conn_find(sk);
	if (conn && conn->state != CLRK_CONN_STAMPED && conn->state != CLRK_CONN_PLAIN)
		return 0;
	if (conn && conn->state == CLRK_CONN_STAMPED) {
		conn->state = CLRK_CONN_PLAIN;
		error = sockmap_delete(conn->flow.cookie);
		counter_add(error ? CLRK_COUNT_FAILED_SOCKMAP_DELETE : CLRK_COUNT_SOCKMAP_LEFT);
	}
	return flow_flags(ctx, 0);
}

/*
 * connect(AF_UNSPEC) of a socket that has sent nothing: it leaves the SOCKHASH here, because the kernel would keep it
 * in, and the next connect() may be one that must not be stamped. A socket being closed has left already.
 */
static __always_inline int flow_state(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct clrk_conn *conn;

	if (!sk || ctx->args[1] != BPF_TCP_CLOSE)
		return 0;
	conn = conn_find(sk);
	if (conn && conn->state != CLRK_CONN_PLAIN) {
		conn->state = CLRK_CONN_PLAIN;
		sockmap_delete(conn->flow.cookie);
	}
	return flow_flags(ctx, 0);
}

#endif
