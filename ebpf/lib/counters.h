/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One counter per refusal, per drop and per helper that failed, and four of normal work. maps.py reads the names from
 * here (CLRK_COUNT_REFUSED_BIND is "refused_bind" in Stamp.counters()), so keep one name per line.
 */
#ifndef CLRK_COUNTERS_H
#define CLRK_COUNTERS_H

enum clrk_counter {
	/* Normal work. */
	CLRK_COUNT_CONNECT_REDIRECTED,
	CLRK_COUNT_FLOW_RECORDED,
	CLRK_COUNT_STAMPED,
	CLRK_COUNT_SOCKMAP_LEFT,

	/* The agent got EPERM. */
	CLRK_COUNT_REFUSED_UNKNOWN_NETNS,
	CLRK_COUNT_REFUSED_SOCKET,
	CLRK_COUNT_REFUSED_BIND,
	CLRK_COUNT_REFUSED_CONNECT_PROTOCOL,
	CLRK_COUNT_REFUSED_CONNECT_LISTENER,
	CLRK_COUNT_REFUSED_UDP,
	CLRK_COUNT_REFUSED_UDP_DNS6,

	/* A helper failed; what depends on it was refused. */
	CLRK_COUNT_FAILED_NO_SOCKET,
	CLRK_COUNT_FAILED_CONN_STORAGE,
	CLRK_COUNT_FAILED_QUERY_STORAGE,
	CLRK_COUNT_FAILED_COMM,
	CLRK_COUNT_FAILED_FLOW_UPDATE,
	CLRK_COUNT_FAILED_SOCKMAP_UPDATE,
	CLRK_COUNT_FAILED_SOCKMAP_DELETE,
	CLRK_COUNT_FAILED_CB_FLAGS,

	/* Established with something else than the listener: no flow record, so the gateway refuses it. */
	CLRK_COUNT_FLOW_UNEXPECTED,

	/* SK_DROP: send() fails with EACCES and nothing leaves. */
	CLRK_COUNT_DROPPED_NO_CONN,
	CLRK_COUNT_DROPPED_UNKNOWN_NETNS,
	CLRK_COUNT_DROPPED_STATE,
	CLRK_COUNT_DROPPED_PUSH,
	CLRK_COUNT_DROPPED_PULL,
	CLRK_COUNT_DROPPED_BOUNDS,

	CLRK_COUNTERS_SIZE
};

#endif
