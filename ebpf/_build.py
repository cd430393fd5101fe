"""cffi build of the header writer: setup.py makes the module clrk.ebpf._stamp from it.

Paths are relative to the repository's root and go through src/, where setuptools looks for the packages.
"""

from __future__ import annotations

from cffi import FFI

# What Python calls, and the layouts that tests/unit/test_wire.py holds against core/wire.py. `...;` lets the C compiler
# say sizes and offsets, so that a copy here can not drift from wire.h.
_DECLARATIONS = """
typedef unsigned char __u8;
typedef unsigned int __u32;
typedef unsigned long long __u64;

struct clrk_text {
    const char *data;
    size_t size;
};

struct clrk_header_fields {
    __u8 kind;
    struct clrk_text agent_namespace;
    struct clrk_text name;
    struct clrk_text uid;
    struct clrk_text revision;
    struct clrk_text invocation_id;
    struct clrk_text sandbox_id;
    struct clrk_text netns_name;
    struct clrk_text traceparent;
    ...;
};

int clrk_header_write(__u8 *buf, size_t cap, size_t *pos, int family, const struct clrk_header_fields *fields,
                      int *bad_tlv);

#define CLRK_HEADER_SIZE ...

struct clrk_flow_key {
    __u64 netns_cookie;
    __u8 src[16];
    __u32 src_port;
    __u32 family;
    ...;
};

struct clrk_flow {
    __u8 dst[16];
    __u64 cookie;
    __u64 connect_ns;
    __u32 tgid;
    __u32 uid;
    __u32 dst_port;
    __u32 family;
    char comm[...];
    ...;
};

struct clrk_sandbox {
    __u8 egress_v4[4];
    __u8 egress_v6[16];
    __u8 metadata_v4[4];
    __u8 metadata_v6[16];
    __u8 header_v4[...];
    __u8 header_v6[...];
    ...;
};
"""

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "clrk.ebpf._stamp",
    '#include "stamp.h"',
    sources=["src/clrk/ebpf/csrc/stamp.c"],
    include_dirs=["src/clrk/ebpf/csrc", "src/clrk/core"],
    depends=["src/clrk/ebpf/csrc/stamp.h", "src/clrk/core/wire.h"],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"],
)
