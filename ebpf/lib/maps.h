/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The maps, and one typed inline around each operation. bcc turns the method calls into helpers while it reads the
 * main file, which is why the loader pastes the files of lib/ into it instead of letting the preprocessor include them.
 */
#ifndef CLRK_MAPS_H
#define CLRK_MAPS_H

#include "lib/counters.h"

enum clrk_conn_state {
	CLRK_CONN_CONNECTING,  /* the connect hook ran */
	CLRK_CONN_ESTABLISHED, /* flow record written, socket in the SOCKHASH */
	CLRK_CONN_STAMPED,     /* the header stands in front of the first message */
	CLRK_CONN_PLAIN,       /* the socket left the SOCKHASH */
};

/*
 * What the current connect() of a socket dialled; filled anew by each one. All writers hold the socket's lock: the
 * connect hook runs in __inet_stream_connect() with the socket in TCP_CLOSE, so no second thread can get in between.
 */
struct clrk_conn {
	struct clrk_flow flow;
	__u64 netns_cookie;
	__u8 src[16];	/* known at ESTABLISHED; IPv4 as ::ffff:a.b.c.d */
	__u32 src_port; /* host order */
	__u32 state;	/* enum clrk_conn_state */
};

/* The nameserver that a UDP socket asked last. */
struct clrk_query {
	__u32 ip[4];	 /* network order, IPv4 as ::ffff:a.b.c.d */
	__u32 connected; /* connect() chose it, not sendto() */
	__u32 pad;
};

/* netns cookie -> sandbox; 1 KiB each, preallocated: 4 MiB. A namespace that is not here may do nothing. */
BPF_TABLE("hash", u64, struct clrk_sandbox, clrk_sandboxes, 4096);

/*
 * Flow records between ESTABLISHED and the gateway's accept(); 96 bytes each. LRU, because a record whose connection
 * the gateway never accepts has no other end than unregister: at most an accept queue per listener, and when that
 * adds up to more than the map holds, the oldest, which is the abandoned, goes first.
 */
BPF_TABLE("lru_hash", struct clrk_flow_key, struct clrk_flow, clrk_flows, 65536);

/* Socket cookie -> socket, from ESTABLISHED to the first send. Elements are allocated on demand; buckets are 4 MiB. */
BPF_SOCKHASH(clrk_socks, u64, 262144);

BPF_ARRAY(clrk_counters, u64, CLRK_COUNTERS_SIZE);

BPF_SK_STORAGE(clrk_conns, struct clrk_conn);
BPF_SK_STORAGE(clrk_queries, struct clrk_query);

static __always_inline void counter_add(int counter)
{
	__u64 *value = clrk_counters.lookup(&counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline struct clrk_sandbox *sandbox_find(__u64 netns_cookie)
{
	return clrk_sandboxes.lookup(&netns_cookie);
}

static __always_inline struct clrk_conn *conn_find(struct bpf_sock *sk)
{
	return clrk_conns.sk_storage_get(sk, 0, 0);
}

static __always_inline struct clrk_conn *conn_create(struct bpf_sock *sk)
{
	return clrk_conns.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

static __always_inline void conn_delete(struct bpf_sock *sk)
{
	clrk_conns.sk_storage_delete(sk);
}

static __always_inline struct clrk_query *query_find(struct bpf_sock *sk)
{
	return clrk_queries.sk_storage_get(sk, 0, 0);
}

static __always_inline struct clrk_query *query_create(struct bpf_sock *sk)
{
	return clrk_queries.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

static __always_inline void query_delete(struct bpf_sock *sk)
{
	clrk_queries.sk_storage_delete(sk);
}

static __always_inline int flow_put(struct clrk_flow_key *key, struct clrk_flow *flow)
{
	return clrk_flows.update(key, flow);
}

static __always_inline int sockmap_put(struct bpf_sock_ops *ctx, __u64 cookie)
{
	/* bcc expands the call with a semicolon: it can not stand in an expression. */
	int error = clrk_socks.sock_hash_update(ctx, &cookie, BPF_ANY);

	return error;
}

static __always_inline int sockmap_delete(__u64 cookie)
{
	return clrk_socks.delete(&cookie);
}

#endif
