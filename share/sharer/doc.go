// Package sharer shares a sandbox's files with its guest, behind the interface that Kata Containers' runtime has for it
// (FilesystemSharer), by grafts of a Sluice share instead of bind mounts of the host.
//
// A Sandbox is one pod's. Where its files go is its Backend: Grafts of a running daemon, in process or through the control API;
// BindMounts, in the layout of Kata's own, for a daemon that is not Sluice; Copy, through an agent in the guest, where nothing
// can be shared.
//
// What is shared is counted by its users: two containers that have the same source have one share of it, writable while one of
// them may write, and gone with the last.
//
// What a Sandbox is about to do is in a file of its directory first, and what it has done can be told from the daemon's grafts
// and the mounts of the host: after a kill in the middle of anything, Cleanup of a new process leaves nothing behind. A failure
// leaves things as they were. One process at a time may have a Sandbox of an ID.
package sharer
