/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Constants and layouts of the stamp (CONTRACT section 9) for C, BPF C and Python: the one place they are written.
 * core/wire.py reads the #defines at import, so a value must be a plain decimal or hexadecimal number.
 * Includers provide __u8, __u16, __u32 and __u64.
 */
#ifndef CLRK_WIRE_H
#define CLRK_WIRE_H

/* PROXY protocol v2: haproxy doc/proxy-protocol.txt, section 2.2. */
#define CLRK_PP2_SIGNATURE_SIZE 12
#define CLRK_PP2_PREFIX_SIZE 16 /* signature, version|command, family|transport, length */
#define CLRK_PP2_VERSION_PROXY 0x21
#define CLRK_PP2_FAMILY_TCP4 0x11
#define CLRK_PP2_FAMILY_TCP6 0x21
#define CLRK_PP2_TLV_HEADER_SIZE 3
#define CLRK_PP2_MAX_SIZE 4096 /* of a foreign header that the public parser accepts */

/* The whole header has one size; one NOOP TLV fills what is left. */
#define CLRK_HEADER_SIZE 512

/* TCP over IPv4: source, destination, source port, destination port, TLVs. */
#define CLRK_V4_SRC_OFFSET 16
#define CLRK_V4_DST_OFFSET 20
#define CLRK_V4_SRC_PORT_OFFSET 24
#define CLRK_V4_DST_PORT_OFFSET 26
#define CLRK_V4_TLV_OFFSET 28

/* TCP over IPv6. */
#define CLRK_V6_SRC_OFFSET 16
#define CLRK_V6_DST_OFFSET 32
#define CLRK_V6_SRC_PORT_OFFSET 48
#define CLRK_V6_DST_PORT_OFFSET 50
#define CLRK_V6_TLV_OFFSET 52

/* The per-connection TLV comes first, directly behind the addresses; its value is network byte order. */
#define CLRK_CONN_VALUE_SIZE 40
#define CLRK_CONN_COOKIE_OFFSET 0
#define CLRK_CONN_TIME_OFFSET 8
#define CLRK_CONN_TGID_OFFSET 16
#define CLRK_CONN_UID_OFFSET 20
#define CLRK_CONN_COMM_OFFSET 24
#define CLRK_COMM_SIZE 16

#define CLRK_TLV_NOOP 0x04
#define CLRK_TLV_NETNS 0x30
#define CLRK_TLV_AGENT_KIND 0xE0
#define CLRK_TLV_AGENT_NAMESPACE 0xE1
#define CLRK_TLV_AGENT_NAME 0xE2
#define CLRK_TLV_AGENT_UID 0xE3
#define CLRK_TLV_AGENT_REVISION 0xE4
#define CLRK_TLV_INVOCATION_ID 0xE5
#define CLRK_TLV_DST_NAME 0xE6
#define CLRK_TLV_SANDBOX_ID 0xE7
#define CLRK_TLV_TRACEPARENT 0xE9
#define CLRK_TLV_CONNECTION 0xEB

/* Longest value of each text field; all of them at once leave room for the NOOP TLV (csrc/stamp.c asserts it). */
#define CLRK_MAX_AGENT_NAMESPACE 63
#define CLRK_MAX_AGENT_NAME 63
#define CLRK_MAX_AGENT_UID 36
#define CLRK_MAX_AGENT_REVISION 40
#define CLRK_MAX_INVOCATION_ID 36
#define CLRK_MAX_SANDBOX_ID 16
#define CLRK_MAX_NETNS 32
#define CLRK_MAX_TRACEPARENT 55

#define CLRK_KIND_DAEMON_AGENT 0
#define CLRK_KIND_TASK_AGENT 1

/* Ports that belong to clrk inside every sandbox (DESIGN section 3). */
#define CLRK_PORT_EGRESS 15001
#define CLRK_PORT_METADATA 80
#define CLRK_PORT_DNS 53
#define CLRK_PORT_OTLP 4318

#define CLRK_FAMILY_V4 2 /* AF_INET: the listener's family, not the dialled address's */
#define CLRK_FAMILY_V6 10

/*
 * Flow record: who dialled what from this source address, written by the kernel at ACTIVE_ESTABLISHED.
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. The source address is part of the key: one
 * sandbox may use the same source port on two of its local addresses at once.
 */
struct clrk_flow_key {
	__u64 netns_cookie;
	__u8 src[16];
	__u32 src_port; /* host order */
	__u32 family;	/* CLRK_FAMILY_* of the egress listener that accepts the connection */
};

struct clrk_flow {
	__u8 dst[16];	  /* what the agent dialled */
	__u64 cookie;	  /* socket cookie */
	__u64 connect_ns; /* CLOCK_BOOTTIME at connect() */
	__u32 tgid;	  /* of the process that called connect(), initial pid namespace */
	__u32 uid;
	__u32 dst_port; /* host order */
	__u32 family;	/* CLRK_FAMILY_* of the stamp: a v4-mapped destination is stamped as IPv4 */
	char comm[CLRK_COMM_SIZE];
};

/* One per sandbox, by netns cookie: where its connections go, and the header templates with zeroed holes. */
struct clrk_sandbox {
	__u8 egress_v4[4]; /* network order */
	__u8 egress_v6[16];
	__u8 metadata_v4[4];
	__u8 metadata_v6[16];
	__u8 header_v4[CLRK_HEADER_SIZE];
	__u8 header_v6[CLRK_HEADER_SIZE];
};

#endif
