package vhostuser

// Protocol feature bits (vhost-user specification, "Protocol features"), as masks. Bits 21 and 22 changed places during
// the standardisation: older rust-vmm and crosvm have SHMEM at 21.
const (
	VHOST_USER_PROTOCOL_F_MQ                        uint64 = 1 << 0
	VHOST_USER_PROTOCOL_F_LOG_SHMFD                 uint64 = 1 << 1
	VHOST_USER_PROTOCOL_F_RARP                      uint64 = 1 << 2
	VHOST_USER_PROTOCOL_F_REPLY_ACK                 uint64 = 1 << 3
	VHOST_USER_PROTOCOL_F_NET_MTU                   uint64 = 1 << 4
	VHOST_USER_PROTOCOL_F_BACKEND_REQ               uint64 = 1 << 5
	VHOST_USER_PROTOCOL_F_CROSS_ENDIAN              uint64 = 1 << 6
	VHOST_USER_PROTOCOL_F_CRYPTO_SESSION            uint64 = 1 << 7
	VHOST_USER_PROTOCOL_F_PAGEFAULT                 uint64 = 1 << 8
	VHOST_USER_PROTOCOL_F_CONFIG                    uint64 = 1 << 9
	VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD           uint64 = 1 << 10
	VHOST_USER_PROTOCOL_F_HOST_NOTIFIER             uint64 = 1 << 11
	VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD            uint64 = 1 << 12
	VHOST_USER_PROTOCOL_F_RESET_DEVICE              uint64 = 1 << 13
	VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS      uint64 = 1 << 14
	VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS       uint64 = 1 << 15
	VHOST_USER_PROTOCOL_F_STATUS                    uint64 = 1 << 16
	VHOST_USER_PROTOCOL_F_XEN_MMAP                  uint64 = 1 << 17
	VHOST_USER_PROTOCOL_F_SHARED_OBJECT             uint64 = 1 << 18
	VHOST_USER_PROTOCOL_F_DEVICE_STATE              uint64 = 1 << 19
	VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT   uint64 = 1 << 20
	VHOST_USER_PROTOCOL_F_GPA_ADDRESSES             uint64 = 1 << 21
	VHOST_USER_PROTOCOL_F_SHMEM                     uint64 = 1 << 22
	VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN uint64 = 1 << 23
)

// Virtio feature bits (virtio 1.3, section 6 and 5.11.3) that a vhost-user file system device meets, as masks.
const (
	VIRTIO_FS_F_NOTIFICATION       uint64 = 1 << 0
	VIRTIO_F_NOTIFY_ON_EMPTY       uint64 = 1 << 24
	VHOST_F_LOG_ALL                uint64 = 1 << 26 // never seen by the guest: dirty logging is on
	VIRTIO_F_INDIRECT_DESC         uint64 = 1 << 28
	VIRTIO_F_EVENT_IDX             uint64 = 1 << 29
	VHOST_USER_F_PROTOCOL_FEATURES uint64 = 1 << 30 // never seen by the guest: the session's own
	VIRTIO_F_VERSION_1             uint64 = 1 << 32
	VIRTIO_F_ACCESS_PLATFORM       uint64 = 1 << 33
	VIRTIO_F_RING_PACKED           uint64 = 1 << 34
	VIRTIO_F_IN_ORDER              uint64 = 1 << 35
	VIRTIO_F_ORDER_PLATFORM        uint64 = 1 << 36
	VIRTIO_F_NOTIFICATION_DATA     uint64 = 1 << 38
	VIRTIO_F_RING_RESET            uint64 = 1 << 40
)

// protocolFeatures is what every session offers; CONFIG comes with a config space. Only what is meant may be offered:
// QEMU acknowledges every bit up to the last it knows of, also those that it has no code for. STATUS brings two round
// trips and never a reset, XEN_MMAP changes the size of a region under QEMU, which does not know, and INBAND makes User-Mode
// Linux send each kick as a message.
const protocolFeatures = VHOST_USER_PROTOCOL_F_MQ |
	VHOST_USER_PROTOCOL_F_REPLY_ACK |
	VHOST_USER_PROTOCOL_F_BACKEND_REQ |
	VHOST_USER_PROTOCOL_F_RESET_DEVICE |
	VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
