// Package control is the daemon's control API: HTTP and JSON over a Unix socket, AF_VSOCK, or the Unix sockets that Cloud
// Hypervisor and Firecracker make of vsock. It speaks of a Daemon and knows nothing of how that serves.
package control
