// Package selfcheck makes file contents that say themselves whether they are whole.
package selfcheck

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
)

// maxBody is longer than a page, so that a torn read has a place to show.
const maxBody = 20 << 10

// Content returns the n-th content: a body of a length of its own after the body's SHA-256 sum.
func Content(n uint64) []byte {
	seed := [32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24), byte(n >> 32)}
	source := rand.NewChaCha8(seed)
	content := make([]byte, sha256.Size+1+source.Uint64()%maxBody)
	body := content[sha256.Size:]
	_, _ = source.Read(body) // never fails
	sum := sha256.Sum256(body)
	copy(content, sum[:])
	return content
}

// Verify returns an error if content is not one of those that Content makes.
func Verify(content []byte) error {
	if len(content) <= sha256.Size {
		return errors.New("torn content: too short")
	}
	if sum := sha256.Sum256(content[sha256.Size:]); !bytes.Equal(sum[:], content[:sha256.Size]) {
		return errors.New("torn content: wrong sum")
	}
	return nil
}
