"""The parts of `clrk`, the client of the admin socket. Each module is imported only by the command that needs it."""
