/* SPDX-License-Identifier: Apache-2.0 */
/* What an address means inside a sandbox. Both families in one form: IPv4 is ::ffff:a.b.c.d. */
#ifndef CLRK_ADDRESS_H
#define CLRK_ADDRESS_H

#define CLRK_MAPPED_WORD bpf_htonl(0xffff)

struct clrk_target {
	__u32 ip[4]; /* network order */
	__u16 port;  /* host order */
};

static __always_inline void target_from_v4(struct clrk_target *target, __u32 ip, __u32 user_port)
{
	target->ip[0] = 0;
	target->ip[1] = 0;
	target->ip[2] = CLRK_MAPPED_WORD;
	target->ip[3] = ip;
	target->port = bpf_ntohs((__u16)user_port);
}

static __always_inline void target_from_v6(struct clrk_target *target, struct bpf_sock_addr *ctx)
{
	target->ip[0] = ctx->user_ip6[0];
	target->ip[1] = ctx->user_ip6[1];
	target->ip[2] = ctx->user_ip6[2];
	target->ip[3] = ctx->user_ip6[3];
	target->port = bpf_ntohs((__u16)ctx->user_port);
}

static __always_inline void target_to_v6(const struct clrk_target *target, struct bpf_sock_addr *ctx)
{
	ctx->user_ip6[0] = target->ip[0];
	ctx->user_ip6[1] = target->ip[1];
	ctx->user_ip6[2] = target->ip[2];
	ctx->user_ip6[3] = target->ip[3];
}

static __always_inline bool ip_is_v4(const __u32 ip[4])
{
	return !ip[0] && !ip[1] && ip[2] == CLRK_MAPPED_WORD;
}

static __always_inline __u32 load_v4(const __u8 raw[4])
{
	return *(const __u32 *)raw;
}

static __always_inline bool ip_is_v6(const __u32 ip[4], const __u8 raw[16])
{
	const __u32 *word = (const __u32 *)raw;

	return ip[0] == word[0] && ip[1] == word[1] && ip[2] == word[2] && ip[3] == word[3];
}

/* 127/8, ::1 and ::, which the kernel itself turns into a loopback address, whatever the socket is bound to. */
static __always_inline bool ip_is_loopback(const __u32 ip[4])
{
	if (ip_is_v4(ip))
		return (bpf_ntohl(ip[3]) >> 24) == 127;
	return !ip[0] && !ip[1] && !ip[2] && (!ip[3] || ip[3] == bpf_htonl(1));
}

/*
 * The kernel reads a connect to 0.0.0.0 as one to the address that the socket is bound to. A socket bound to the
 * listener's address would so reach the listener past the hook; 127.0.0.1 is what everybody else means by it.
 */
static __always_inline void target_pin_any(struct clrk_target *target)
{
	if (ip_is_v4(target->ip) && !target->ip[3])
		target->ip[3] = bpf_htonl(0x7f000001);
}

static __always_inline bool target_is_egress_listener(const struct clrk_target *target,
						      const struct clrk_sandbox *sandbox)
{
	if (target->port != CLRK_PORT_EGRESS)
		return false;
	if (ip_is_v4(target->ip))
		return target->ip[3] == load_v4(sandbox->egress_v4);
	return ip_is_v6(target->ip, sandbox->egress_v6);
}

/* TCP services of clrk that the agent dials by their own address: metadata, DNS, OTLP. */
static __always_inline bool target_is_service(const struct clrk_target *target, const struct clrk_sandbox *sandbox)
{
	if (!ip_is_v4(target->ip))
		return target->port == CLRK_PORT_METADATA && ip_is_v6(target->ip, sandbox->metadata_v6);
	if (target->port == CLRK_PORT_METADATA)
		return target->ip[3] == load_v4(sandbox->metadata_v4);
	return (target->port == CLRK_PORT_DNS || target->port == CLRK_PORT_OTLP) &&
	       target->ip[3] == load_v4(sandbox->egress_v4);
}

#endif
