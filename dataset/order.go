package dataset

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
)

// An Order says in which order rows are visited, those that all peers share or
// the shard of one Peer: every epoch in a new shuffled order, one epoch after the other without a gap. The
// minibatches cut that endless list into pieces, so one may hold the end of
// an epoch and the start of the next, and none is smaller than the others.
//
// Where a peer stands is the number of its next minibatch and nothing else.
type Order struct {
	Seed uint64
	Peer int
	Len  int // rows, at least 1
}

// Minibatch returns the rows of minibatch k, counted from 0, when every
// minibatch has size rows. It takes time in
// proportion to Len, not to k.
func (o Order) Minibatch(k uint64, size int) []int {
	if o.Len < 1 || size < 0 {
		panic("dataset: order of an empty shard or negative size")
	}
	over, pos := bits.Mul64(k, uint64(size))
	if over != 0 {
		panic("dataset: minibatch number out of range")
	}
	rows := make([]int, 0, size)
	epoch, at := pos/uint64(o.Len), int(pos%uint64(o.Len))
	for len(rows) < size {
		n := min(size-len(rows), o.Len-at)
		rows = append(rows, o.shuffled(epoch, at+n)[at:]...)
		epoch, at = epoch+1, 0
	}
	return rows
}

// shuffled returns the first n rows of an epoch: Fisher-Yates from the front,
// which fixes row i at step i and so can stop early, driven by ChaCha8
// (math/rand/v2, whose output is specified) keyed by seed, peer and epoch.
func (o Order) shuffled(epoch uint64, n int) []int {
	var key [32]byte
	copy(key[:8], "order v1")
	binary.LittleEndian.PutUint64(key[8:], o.Seed)
	binary.LittleEndian.PutUint64(key[16:], uint64(o.Peer))
	binary.LittleEndian.PutUint64(key[24:], epoch)
	src := rand.NewChaCha8(key)

	rows := make([]int, o.Len)
	for i := range rows {
		rows[i] = i
	}
	for i := range n {
		j := i + int(below(src, uint64(o.Len-i)))
		rows[i], rows[j] = rows[j], rows[i]
	}
	return rows[:n]
}

// below returns an unbiased number below n (Lemire 2019, "Fast random integer
// generation in an interval"), written out so that no release of Go changes it.
func below(src *rand.ChaCha8, n uint64) uint64 {
	hi, lo := bits.Mul64(src.Uint64(), n)
	if lo < n {
		for threshold := -n % n; lo < threshold; {
			hi, lo = bits.Mul64(src.Uint64(), n)
		}
	}
	return hi
}
