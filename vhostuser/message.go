package vhostuser

import (
	"fmt"
	"structs"
)

// Request is the number of a front-end message (vhost-user specification, "Front-end message types").
type Request uint32

// Front-end messages.
const (
	VHOST_USER_GET_FEATURES              Request = 1
	VHOST_USER_SET_FEATURES              Request = 2
	VHOST_USER_SET_OWNER                 Request = 3
	VHOST_USER_RESET_OWNER               Request = 4
	VHOST_USER_SET_MEM_TABLE             Request = 5
	VHOST_USER_SET_LOG_BASE              Request = 6
	VHOST_USER_SET_LOG_FD                Request = 7
	VHOST_USER_SET_VRING_NUM             Request = 8
	VHOST_USER_SET_VRING_ADDR            Request = 9
	VHOST_USER_SET_VRING_BASE            Request = 10
	VHOST_USER_GET_VRING_BASE            Request = 11
	VHOST_USER_SET_VRING_KICK            Request = 12
	VHOST_USER_SET_VRING_CALL            Request = 13
	VHOST_USER_SET_VRING_ERR             Request = 14
	VHOST_USER_GET_PROTOCOL_FEATURES     Request = 15
	VHOST_USER_SET_PROTOCOL_FEATURES     Request = 16
	VHOST_USER_GET_QUEUE_NUM             Request = 17
	VHOST_USER_SET_VRING_ENABLE          Request = 18
	VHOST_USER_SEND_RARP                 Request = 19
	VHOST_USER_NET_SET_MTU               Request = 20
	VHOST_USER_SET_BACKEND_REQ_FD        Request = 21
	VHOST_USER_IOTLB_MSG                 Request = 22
	VHOST_USER_SET_VRING_ENDIAN          Request = 23
	VHOST_USER_GET_CONFIG                Request = 24
	VHOST_USER_SET_CONFIG                Request = 25
	VHOST_USER_CREATE_CRYPTO_SESSION     Request = 26
	VHOST_USER_CLOSE_CRYPTO_SESSION      Request = 27
	VHOST_USER_POSTCOPY_ADVISE           Request = 28
	VHOST_USER_POSTCOPY_LISTEN           Request = 29
	VHOST_USER_POSTCOPY_END              Request = 30
	VHOST_USER_GET_INFLIGHT_FD           Request = 31
	VHOST_USER_SET_INFLIGHT_FD           Request = 32
	VHOST_USER_GPU_SET_SOCKET            Request = 33
	VHOST_USER_RESET_DEVICE              Request = 34
	VHOST_USER_VRING_KICK                Request = 35
	VHOST_USER_GET_MAX_MEM_SLOTS         Request = 36
	VHOST_USER_ADD_MEM_REG               Request = 37
	VHOST_USER_REM_MEM_REG               Request = 38
	VHOST_USER_SET_STATUS                Request = 39
	VHOST_USER_GET_STATUS                Request = 40
	VHOST_USER_GET_SHARED_OBJECT         Request = 41
	VHOST_USER_SET_DEVICE_STATE_FD       Request = 42
	VHOST_USER_CHECK_DEVICE_STATE        Request = 43
	VHOST_USER_GET_SHMEM_CONFIG          Request = 44
	VHOST_USER_GET_VRING_BASE_SKIP_DRAIN Request = 45

	numRequests = 46
)

var requestNames = [numRequests]string{
	VHOST_USER_GET_FEATURES:              "GET_FEATURES",
	VHOST_USER_SET_FEATURES:              "SET_FEATURES",
	VHOST_USER_SET_OWNER:                 "SET_OWNER",
	VHOST_USER_RESET_OWNER:               "RESET_OWNER",
	VHOST_USER_SET_MEM_TABLE:             "SET_MEM_TABLE",
	VHOST_USER_SET_LOG_BASE:              "SET_LOG_BASE",
	VHOST_USER_SET_LOG_FD:                "SET_LOG_FD",
	VHOST_USER_SET_VRING_NUM:             "SET_VRING_NUM",
	VHOST_USER_SET_VRING_ADDR:            "SET_VRING_ADDR",
	VHOST_USER_SET_VRING_BASE:            "SET_VRING_BASE",
	VHOST_USER_GET_VRING_BASE:            "GET_VRING_BASE",
	VHOST_USER_SET_VRING_KICK:            "SET_VRING_KICK",
	VHOST_USER_SET_VRING_CALL:            "SET_VRING_CALL",
	VHOST_USER_SET_VRING_ERR:             "SET_VRING_ERR",
	VHOST_USER_GET_PROTOCOL_FEATURES:     "GET_PROTOCOL_FEATURES",
	VHOST_USER_SET_PROTOCOL_FEATURES:     "SET_PROTOCOL_FEATURES",
	VHOST_USER_GET_QUEUE_NUM:             "GET_QUEUE_NUM",
	VHOST_USER_SET_VRING_ENABLE:          "SET_VRING_ENABLE",
	VHOST_USER_SEND_RARP:                 "SEND_RARP",
	VHOST_USER_NET_SET_MTU:               "NET_SET_MTU",
	VHOST_USER_SET_BACKEND_REQ_FD:        "SET_BACKEND_REQ_FD",
	VHOST_USER_IOTLB_MSG:                 "IOTLB_MSG",
	VHOST_USER_SET_VRING_ENDIAN:          "SET_VRING_ENDIAN",
	VHOST_USER_GET_CONFIG:                "GET_CONFIG",
	VHOST_USER_SET_CONFIG:                "SET_CONFIG",
	VHOST_USER_CREATE_CRYPTO_SESSION:     "CREATE_CRYPTO_SESSION",
	VHOST_USER_CLOSE_CRYPTO_SESSION:      "CLOSE_CRYPTO_SESSION",
	VHOST_USER_POSTCOPY_ADVISE:           "POSTCOPY_ADVISE",
	VHOST_USER_POSTCOPY_LISTEN:           "POSTCOPY_LISTEN",
	VHOST_USER_POSTCOPY_END:              "POSTCOPY_END",
	VHOST_USER_GET_INFLIGHT_FD:           "GET_INFLIGHT_FD",
	VHOST_USER_SET_INFLIGHT_FD:           "SET_INFLIGHT_FD",
	VHOST_USER_GPU_SET_SOCKET:            "GPU_SET_SOCKET",
	VHOST_USER_RESET_DEVICE:              "RESET_DEVICE",
	VHOST_USER_VRING_KICK:                "VRING_KICK",
	VHOST_USER_GET_MAX_MEM_SLOTS:         "GET_MAX_MEM_SLOTS",
	VHOST_USER_ADD_MEM_REG:               "ADD_MEM_REG",
	VHOST_USER_REM_MEM_REG:               "REM_MEM_REG",
	VHOST_USER_SET_STATUS:                "SET_STATUS",
	VHOST_USER_GET_STATUS:                "GET_STATUS",
	VHOST_USER_GET_SHARED_OBJECT:         "GET_SHARED_OBJECT",
	VHOST_USER_SET_DEVICE_STATE_FD:       "SET_DEVICE_STATE_FD",
	VHOST_USER_CHECK_DEVICE_STATE:        "CHECK_DEVICE_STATE",
	VHOST_USER_GET_SHMEM_CONFIG:          "GET_SHMEM_CONFIG",
	VHOST_USER_GET_VRING_BASE_SKIP_DRAIN: "GET_VRING_BASE_SKIP_DRAIN",
}

// String returns the request's name without VHOST_USER_, or its number if it has none.
func (r Request) String() string {
	if r < numRequests && requestNames[r] != "" {
		return requestNames[r]
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Header starts every message in both directions; Size bytes of payload follow it. File descriptors ride on its first
// byte. All fields of the protocol are in the host's byte order.
type Header struct {
	_       structs.HostLayout
	Request Request
	Flags   uint32
	Size    uint32
}

// Header.Flags.
const (
	VersionMask   uint32 = 0x3
	Version       uint32 = 0x1
	FlagReply     uint32 = 0x4
	FlagNeedReply uint32 = 0x8
)

// ReplyFlags is the flags word of every reply: QEMU and User-Mode Linux take no other.
const ReplyFlags = Version | FlagReply

// MaxPayload is the largest payload, in bytes, that is accepted. The largest legal one is a memory table; rust-vmm has this limit too.
const MaxPayload = 4096

// VringState is the payload of SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE (and its reply) and SET_VRING_ENABLE.
type VringState struct {
	_     structs.HostLayout
	Index uint32
	Num   uint32
}

// VringAddr is the payload of SET_VRING_ADDR. The three addresses are the front-end's own (region.UserAddr).
type VringAddr struct {
	_     structs.HostLayout
	Index uint32
	Flags uint32 // bit 0: writes to the used ring are logged at Log
	Desc  uint64
	Used  uint64
	Avail uint64
	Log   uint64
}

// SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR have a u64: the ring's index, and VringNoFD if no descriptor comes along.
const (
	VringIndexMask uint64 = 0xff
	VringNoFD      uint64 = 0x100
)

// MemTable starts the payload of SET_MEM_TABLE; NumRegions MemRegions follow.
type MemTable struct {
	_          structs.HostLayout
	NumRegions uint32
	Padding    uint32
}

// MemRegion describes one region of guest memory, in bytes.
type MemRegion struct {
	_             structs.HostLayout
	GuestPhysAddr uint64
	Size          uint64
	UserAddr      uint64
	MmapOffset    uint64
}

// MemReg is the payload of ADD_MEM_REG and REM_MEM_REG.
type MemReg struct {
	_       structs.HostLayout
	Padding uint64
	Region  MemRegion
}

// ConfigWindow starts the payload of GET_CONFIG (and its reply) and SET_CONFIG; Size bytes of the config space follow.
type ConfigWindow struct {
	_      structs.HostLayout
	Offset uint32
	Size   uint32
	Flags  uint32 // of SET_CONFIG: ConfigMigration or 0
}

const (
	// MaxConfigSpace is the size, in bytes, of the window that a config message can reach (VHOST_USER_MAX_CONFIG_SIZE).
	MaxConfigSpace = 256
	// ConfigMigration marks a SET_CONFIG that restores the space after a migration (VHOST_SET_CONFIG_TYPE_MIGRATION).
	ConfigMigration = 1
)
