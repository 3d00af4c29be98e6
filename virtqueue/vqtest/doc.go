// Package vqtest is the driver side of a virtqueue: what a guest's kernel does, and what a hostile one does.
//
// Memory is the guest's memory in a memfd. A Driver has one ring in it, with legal use (Offer, Kick, Used) and raw access to
// every field. Hostile lists what a driver may do wrong, and what the device must make of it: it runs against the bare
// virtqueue.Queue and against whole devices. A wrong use of this package panics.
package vqtest
