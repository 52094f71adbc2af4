"""What computes: devices and their memory, copies to and from them, and the libraries that run there."""
