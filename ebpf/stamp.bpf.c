/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's part of attribution (DESIGN section 4): every program that clrk attaches to its parent cgroup.
 *
 * A connection, in order: sock_create lets TCP and UDP exist; connect4/6 remembers what was dialled and rewrites the
 * destination to the egress listener of the socket's network namespace; sockops writes the flow record and puts the
 * socket into the SOCKHASH; the stamp program writes the header in front of the first message; sockops takes the
 * socket out again. Entries only translate: the verdict is made here, from the -errno of lib/.
 *
 * Everything is keyed by the cookie of the socket's network namespace. A namespace that is not registered may do
 * nothing. Whatever fails, fails closed and has a counter.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/errno.h>

#include "wire.h"

#include "lib/counters.h"
#include "lib/maps.h"
#include "lib/address.h"
#include "lib/socket.h"
#include "lib/udp.h"
#include "lib/connect.h"
#include "lib/flow.h"
#include "lib/message.h"

#define CLRK_REFUSE 0 /* of cgroup programs: the system call fails with EPERM */
#define CLRK_ALLOW 1

int clrk_sock_create(struct bpf_sock *ctx)
{
	return socket_check(ctx) ? CLRK_REFUSE : CLRK_ALLOW;
}

int clrk_bind4(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	target_from_v4(&target, ctx->user_ip4, ctx->user_port);
	return bind_check(ctx, &target) ? CLRK_REFUSE : CLRK_ALLOW;
}

int clrk_bind6(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	target_from_v6(&target, ctx);
	return bind_check(ctx, &target) ? CLRK_REFUSE : CLRK_ALLOW;
}

int clrk_connect4(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	target_from_v4(&target, ctx->user_ip4, ctx->user_port);
	if (connect_redirect(ctx, &target))
		return CLRK_REFUSE;
	ctx->user_ip4 = target.ip[3];
	ctx->user_port = bpf_htons(target.port);
	return CLRK_ALLOW;
}

int clrk_connect6(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	target_from_v6(&target, ctx);
	if (connect_redirect(ctx, &target))
		return CLRK_REFUSE;
	target_to_v6(&target, ctx);
	ctx->user_port = bpf_htons(target.port);
	return CLRK_ALLOW;
}

int clrk_getpeername4(struct bpf_sock_addr *ctx)
{
	struct clrk_target peer;

	if (peer_find(ctx, &peer)) {
		ctx->user_ip4 = peer.ip[3];
		ctx->user_port = bpf_htons(peer.port);
	}
	return CLRK_ALLOW;
}

int clrk_getpeername6(struct bpf_sock_addr *ctx)
{
	struct clrk_target peer;

	if (peer_find(ctx, &peer)) {
		target_to_v6(&peer, ctx);
		ctx->user_port = bpf_htons(peer.port);
	}
	return CLRK_ALLOW;
}

int clrk_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	target_from_v4(&target, ctx->user_ip4, ctx->user_port);
	if (udp_send(ctx, &target))
		return CLRK_REFUSE;
	ctx->user_ip4 = target.ip[3];
	return CLRK_ALLOW;
}

int clrk_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct clrk_target target;

	/* Never rewritten: a v4-mapped destination goes through sendmsg4, and there is no IPv6 resolver. */
	target_from_v6(&target, ctx);
	return udp_send(ctx, &target) ? CLRK_REFUSE : CLRK_ALLOW;
}

int clrk_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct clrk_target source;

	target_from_v4(&source, ctx->user_ip4, ctx->user_port);
	if (udp_source(ctx, &source))
		ctx->user_ip4 = source.ip[3];
	return CLRK_ALLOW;
}

int clrk_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct clrk_target source;

	target_from_v6(&source, ctx);
	if (udp_source(ctx, &source))
		target_to_v6(&source, ctx);
	return CLRK_ALLOW;
}

int clrk_sockops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		flow_established(ctx);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
	case BPF_SOCK_OPS_RTT_CB:
		flow_leave_sockmap(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		flow_state(ctx);
		break;
	}
	return 1; /* sockops have no verdict */
}

int clrk_stamp(struct sk_msg_md *msg)
{
	return message_stamp(msg) ? SK_DROP : SK_PASS;
}
