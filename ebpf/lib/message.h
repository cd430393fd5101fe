/* SPDX-License-Identifier: Apache-2.0 */
/* The stamp itself: make room in front of the first message, copy the sandbox's template, fill its holes. */
#ifndef CLRK_MESSAGE_H
#define CLRK_MESSAGE_H

#include "lib/maps.h"

#define CLRK_CONN_VALUE(tlv_offset) ((tlv_offset) + CLRK_PP2_TLV_HEADER_SIZE)

static __always_inline void header_copy(__u8 *to, const __u8 *from)
{
	/* Words, not bytes, and volatile: a memcpy of this size may become a call, and there is nothing to call. */
#pragma unroll
	for (int i = 0; i < CLRK_HEADER_SIZE / 8; i++)
		((volatile __u64 *)to)[i] = ((const __u64 *)from)[i];
}

static __always_inline void header_fill_value(__u8 *value, const struct clrk_conn *conn)
{
	*(__u64 *)(value + CLRK_CONN_COOKIE_OFFSET) = bpf_htonll(conn->flow.cookie);
	*(__u64 *)(value + CLRK_CONN_TIME_OFFSET) = bpf_htonll(conn->flow.connect_ns);
	*(__u32 *)(value + CLRK_CONN_TGID_OFFSET) = bpf_htonl(conn->flow.tgid);
	*(__u32 *)(value + CLRK_CONN_UID_OFFSET) = bpf_htonl(conn->flow.uid);
	*(__u64 *)(value + CLRK_CONN_COMM_OFFSET) = *(const __u64 *)conn->flow.comm;
	*(__u64 *)(value + CLRK_CONN_COMM_OFFSET + 8) = *(const __u64 *)(conn->flow.comm + 8);
}

static __always_inline void header_write_v4(__u8 *to, const struct clrk_sandbox *sandbox, const struct clrk_conn *conn)
{
	header_copy(to, sandbox->header_v4);
	*(__u32 *)(to + CLRK_V4_SRC_OFFSET) = ((const __u32 *)conn->src)[3];
	*(__u32 *)(to + CLRK_V4_DST_OFFSET) = ((const __u32 *)conn->flow.dst)[3];
	*(__u16 *)(to + CLRK_V4_SRC_PORT_OFFSET) = bpf_htons((__u16)conn->src_port);
	*(__u16 *)(to + CLRK_V4_DST_PORT_OFFSET) = bpf_htons((__u16)conn->flow.dst_port);
	header_fill_value(to + CLRK_CONN_VALUE(CLRK_V4_TLV_OFFSET), conn);
}

static __always_inline void header_write_v6(__u8 *to, const struct clrk_sandbox *sandbox, const struct clrk_conn *conn)
{
	header_copy(to, sandbox->header_v6);
	((__u64 *)(to + CLRK_V6_SRC_OFFSET))[0] = ((const __u64 *)conn->src)[0];
	((__u64 *)(to + CLRK_V6_SRC_OFFSET))[1] = ((const __u64 *)conn->src)[1];
	((__u64 *)(to + CLRK_V6_DST_OFFSET))[0] = ((const __u64 *)conn->flow.dst)[0];
	((__u64 *)(to + CLRK_V6_DST_OFFSET))[1] = ((const __u64 *)conn->flow.dst)[1];
	*(__u16 *)(to + CLRK_V6_SRC_PORT_OFFSET) = bpf_htons((__u16)conn->src_port);
	*(__u16 *)(to + CLRK_V6_DST_PORT_OFFSET) = bpf_htons((__u16)conn->flow.dst_port);
	header_fill_value(to + CLRK_CONN_VALUE(CLRK_V6_TLV_OFFSET), conn);
}

static __always_inline int message_push(struct sk_msg_md *msg, const struct clrk_sandbox *sandbox,
					const struct clrk_conn *conn)
{
	__u8 *data;

	if (bpf_msg_push_data(msg, 0, CLRK_HEADER_SIZE, 0)) {
		counter_add(CLRK_COUNT_DROPPED_PUSH);
		return -ENOMEM;
	}
	if (bpf_msg_pull_data(msg, 0, CLRK_HEADER_SIZE, 0)) {
		counter_add(CLRK_COUNT_DROPPED_PULL);
		return -ENOMEM;
	}
	data = msg->data;
	if (data + CLRK_HEADER_SIZE > (__u8 *)msg->data_end) {
		counter_add(CLRK_COUNT_DROPPED_BOUNDS);
		return -EFAULT;
	}
	if (conn->flow.family == CLRK_FAMILY_V4)
		header_write_v4(data, sandbox, conn);
	else
		header_write_v6(data, sandbox, conn);
	return 0;
}

/* Stamp the first message of a connection; later ones, sent before the socket left the SOCKHASH, pass as they are. */
static __always_inline int message_stamp(struct sk_msg_md *msg)
{
	struct clrk_sandbox *sandbox;
	struct bpf_sock *sk = msg->sk;
	struct clrk_conn *conn;
	int error;

	conn = sk ? conn_find(sk) : NULL;
	if (!conn) {
		counter_add(CLRK_COUNT_DROPPED_NO_CONN);
		return -EPERM;
	}
	if (conn->state == CLRK_CONN_STAMPED || conn->state == CLRK_CONN_PLAIN)
		return 0;
	if (conn->state != CLRK_CONN_ESTABLISHED) {
		counter_add(CLRK_COUNT_DROPPED_STATE);
		return -EPERM;
	}
	sandbox = sandbox_find(conn->netns_cookie);
	if (!sandbox) {
		counter_add(CLRK_COUNT_DROPPED_UNKNOWN_NETNS);
		return -EPERM;
	}
	error = message_push(msg, sandbox, conn);
	if (error)
		return error;
	conn->state = CLRK_CONN_STAMPED;
	counter_add(CLRK_COUNT_STAMPED);
	return 0;
}

#endif
