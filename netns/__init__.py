"""Network namespaces that hold only `lo`, and the sockets opened inside them. Used by clrk.runtime alone."""
