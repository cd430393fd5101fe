/* SPDX-License-Identifier: Apache-2.0 */
#include "stamp.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#define TLV_SIZE(value_size) (CLRK_PP2_TLV_HEADER_SIZE + (value_size))

/* The longest header still has room for the NOOP TLV that ends it, so no set of valid fields can fail to fit. */
_Static_assert(CLRK_V6_TLV_OFFSET + TLV_SIZE(CLRK_CONN_VALUE_SIZE) + TLV_SIZE(1) + TLV_SIZE(CLRK_MAX_AGENT_NAMESPACE) +
			       TLV_SIZE(CLRK_MAX_AGENT_NAME) + TLV_SIZE(CLRK_MAX_AGENT_UID) +
			       TLV_SIZE(CLRK_MAX_AGENT_REVISION) + TLV_SIZE(CLRK_MAX_INVOCATION_ID) +
			       TLV_SIZE(CLRK_MAX_SANDBOX_ID) + TLV_SIZE(CLRK_MAX_TRACEPARENT) +
			       TLV_SIZE(CLRK_MAX_NETNS) + TLV_SIZE(0) <=
		       CLRK_HEADER_SIZE,
	       "the longest fields must fit into the header");

static const __u8 signature[CLRK_PP2_SIGNATURE_SIZE] = {0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d,
							0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a};

struct text_field {
	int tlv;
	const struct clrk_text *value;
	size_t max;
	bool required;
};

static void put_u16(__u8 *at, size_t value)
{
	at[0] = (__u8)(value >> 8);
	at[1] = (__u8)(value & 0xff);
}

static int put_tlv(__u8 *buf, size_t cap, size_t *pos, int type, const void *value, size_t size)
{
	if (cap - *pos < CLRK_PP2_TLV_HEADER_SIZE || cap - *pos - CLRK_PP2_TLV_HEADER_SIZE < size)
		return -ENOSPC;
	buf[*pos] = (__u8)type;
	put_u16(buf + *pos + 1, size);
	if (value)
		memcpy(buf + *pos + CLRK_PP2_TLV_HEADER_SIZE, value, size);
	else
		memset(buf + *pos + CLRK_PP2_TLV_HEADER_SIZE, 0, size);
	*pos += CLRK_PP2_TLV_HEADER_SIZE + size;
	return 0;
}

static int put_text(__u8 *buf, size_t cap, size_t *pos, const struct text_field *field, int *bad_tlv)
{
	int error = 0;

	if (!field->value->data) {
		if (field->required)
			error = -EINVAL;
	} else if (!field->value->size) {
		error = -EINVAL;
	} else if (field->value->size > field->max) {
		error = -EMSGSIZE;
	} else {
		return put_tlv(buf, cap, pos, field->tlv, field->value->data, field->value->size);
	}
	if (error && bad_tlv)
		*bad_tlv = field->tlv;
	return error;
}

static int put_identity(__u8 *buf, size_t cap, size_t *pos, const struct clrk_header_fields *fields, int *bad_tlv)
{
	const struct text_field texts[] = {
		{CLRK_TLV_AGENT_NAMESPACE, &fields->agent_namespace, CLRK_MAX_AGENT_NAMESPACE, true},
		{CLRK_TLV_AGENT_NAME, &fields->name, CLRK_MAX_AGENT_NAME, true},
		{CLRK_TLV_AGENT_UID, &fields->uid, CLRK_MAX_AGENT_UID, true},
		{CLRK_TLV_AGENT_REVISION, &fields->revision, CLRK_MAX_AGENT_REVISION, true},
		{CLRK_TLV_INVOCATION_ID, &fields->invocation_id, CLRK_MAX_INVOCATION_ID, false},
		{CLRK_TLV_SANDBOX_ID, &fields->sandbox_id, CLRK_MAX_SANDBOX_ID, true},
		{CLRK_TLV_TRACEPARENT, &fields->traceparent, CLRK_MAX_TRACEPARENT, false},
		{CLRK_TLV_NETNS, &fields->netns_name, CLRK_MAX_NETNS, true},
	};
	int error = put_tlv(buf, cap, pos, CLRK_TLV_AGENT_KIND, &fields->kind, 1);

	for (size_t i = 0; !error && i < sizeof(texts) / sizeof(texts[0]); i++)
		error = put_text(buf, cap, pos, &texts[i], bad_tlv);
	return error;
}

int clrk_header_write(__u8 *buf, size_t cap, size_t *pos, int family, const struct clrk_header_fields *fields,
		      int *bad_tlv)
{
	const bool v6 = family == CLRK_FAMILY_V6;
	size_t at = v6 ? CLRK_V6_TLV_OFFSET : CLRK_V4_TLV_OFFSET;
	__u8 *header;
	int error;

	if (family != CLRK_FAMILY_V4 && family != CLRK_FAMILY_V6)
		return -EINVAL;
	if (fields->kind != CLRK_KIND_DAEMON_AGENT && fields->kind != CLRK_KIND_TASK_AGENT)
		return -EINVAL;
	if (*pos > cap || cap - *pos < CLRK_HEADER_SIZE)
		return -ENOSPC;

	header = buf + *pos;
	memset(header, 0, CLRK_HEADER_SIZE);
	memcpy(header, signature, sizeof(signature));
	header[12] = CLRK_PP2_VERSION_PROXY;
	header[13] = v6 ? CLRK_PP2_FAMILY_TCP6 : CLRK_PP2_FAMILY_TCP4;
	put_u16(header + 14, CLRK_HEADER_SIZE - CLRK_PP2_PREFIX_SIZE);

	error = put_tlv(header, CLRK_HEADER_SIZE, &at, CLRK_TLV_CONNECTION, NULL, CLRK_CONN_VALUE_SIZE);
	if (!error)
		error = put_identity(header, CLRK_HEADER_SIZE, &at, fields, bad_tlv);
	if (!error)
		error = put_tlv(header, CLRK_HEADER_SIZE, &at, CLRK_TLV_NOOP, NULL,
				CLRK_HEADER_SIZE - at - CLRK_PP2_TLV_HEADER_SIZE);
	if (!error)
		*pos += CLRK_HEADER_SIZE;
	return error;
}
