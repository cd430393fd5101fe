"""What both processes share: control messages, resource models, ids, errors and wire constants.

A leaf package: it imports nothing of clrk.runtime, clrk.gateway, clrk.ebpf or clrk.netns.
"""
