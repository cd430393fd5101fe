/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writer of the header template (CONTRACT section 9): one PROXY v2 header of CLRK_HEADER_SIZE bytes whose addresses,
 * ports and 0xEB value are zero. The kernel program fills those holes for each connection.
 */
#ifndef CLRK_STAMP_H
#define CLRK_STAMP_H

#include <linux/types.h>
#include <stddef.h>

#include "wire.h"

/* Bytes of one text field; data == NULL means that the field is absent. Borrowed from the caller. */
struct clrk_text {
	const char *data;
	size_t size;
};

struct clrk_header_fields {
	__u8 kind; /* CLRK_KIND_* */
	struct clrk_text agent_namespace;
	struct clrk_text name;
	struct clrk_text uid;
	struct clrk_text revision;
	struct clrk_text invocation_id; /* may be absent: a daemon has none */
	struct clrk_text sandbox_id;
	struct clrk_text netns_name;
	struct clrk_text traceparent; /* may be absent */
};

/*
 * Append one header for a family (CLRK_FAMILY_V4 or CLRK_FAMILY_V6) at buf + *pos and advance *pos by
 * CLRK_HEADER_SIZE. The caller owns buf. On error nothing is written to *pos and the bytes at buf are undefined:
 *   -EINVAL    unknown kind or family; a required field is absent; a field is present but empty
 *   -EMSGSIZE  a value is longer than its field; *bad_tlv (if not NULL) is its TLV type
 *   -ENOSPC    cap - *pos is less than CLRK_HEADER_SIZE
 */
int clrk_header_write(__u8 *buf, size_t cap, size_t *pos, int family, const struct clrk_header_fields *fields,
		      int *bad_tlv);

#endif
