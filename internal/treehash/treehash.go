// Package treehash names bytes by a two-level hash tree, so that a large body
// can be fetched in chunks from anyone and each chunk checked on arrival.
//
// The bytes are cut into chunks of ChunkSize; each leaf is BLAKE3 over a
// domain byte, the chunk's index and the chunk; the root is BLAKE3 over a
// domain byte, the total size and the leaves in order. Call Sum for the name
// of some bytes, Leaves and Root to offer or to check the chunks of a body.
package treehash

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
)

// ChunkSize is the number of bytes in every chunk but the last.
const ChunkSize = 256 << 10

const (
	leafDomain = 0x00
	rootDomain = 0x01
)

// Hash is a 32-byte BLAKE3 digest.
type Hash [32]byte

// String returns the hash as 64 hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// Short returns the first 12 hexadecimal digits, for people.
func (h Hash) Short() string { return hex.EncodeToString(h[:6]) }

// MarshalText writes the hash as hexadecimal digits.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads 64 hexadecimal digits.
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) {
		return fmt.Errorf("a hash has %d hexadecimal digits, not %d", 2*len(h), len(text))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// NumChunks returns how many chunks size bytes are cut into. Zero bytes have
// no chunk.
func NumChunks(size int64) int {
	return int((size + ChunkSize - 1) / ChunkSize)
}

// Leaf returns the hash of the chunk at the given index.
func Leaf(index int, chunk []byte) Hash {
	var head [9]byte
	head[0] = leafDomain
	binary.LittleEndian.PutUint64(head[1:], uint64(index))
	return sum(head[:], chunk)
}

// Leaves returns the hashes of all chunks of b, in order.
func Leaves(b []byte) []Hash {
	leaves := make([]Hash, 0, NumChunks(int64(len(b))))
	for i := 0; len(b) > 0; i++ {
		chunk := b[:min(ChunkSize, len(b))]
		leaves = append(leaves, Leaf(i, chunk))
		b = b[len(chunk):]
	}
	return leaves
}

// Root returns the name of a body of size bytes whose chunks have these
// leaves.
func Root(size int64, leaves []Hash) Hash {
	flat := make([]byte, 0, len(leaves)*len(Hash{}))
	for i := range leaves {
		flat = append(flat, leaves[i][:]...)
	}
	var head [9]byte
	head[0] = rootDomain
	binary.LittleEndian.PutUint64(head[1:], uint64(size))
	return sum(head[:], flat)
}

// Sum returns the name of b: Root(len(b), Leaves(b)).
func Sum(b []byte) Hash { return Root(int64(len(b)), Leaves(b)) }

func sum(head, body []byte) (h Hash) {
	d := blake3.New()
	d.Write(head) // a hash.Hash never returns an error
	d.Write(body)
	d.Sum(h[:0])
	return h
}
