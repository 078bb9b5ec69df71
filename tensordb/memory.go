package tensordb

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
)

const (
	// overhead is what every tensor counts beyond its bytes: its name, shape
	// and bookkeeping. It bounds the number of tiny tensors.
	overhead = 512
	// pooledMin is the smallest buffer worth keeping for reuse.
	pooledMin = 4 << 10
	// freeMin is how many bytes of free buffers are kept in any case. Above
	// it, no more than the tensors in use have.
	freeMin = 64 << 20
)

// memory hands out buffers, counts them against a limit, and keeps released
// ones for reuse: the sizes of a training run recur every round, and a fresh
// 45 MB costs more in page faults than summing it.
type memory struct {
	limit int64 // bytes; 0: none

	mu         sync.Mutex
	live, free int64
	pool       map[int][][]byte // free buffers by capacity
}

// blob is a buffer with a count of its holders. Once it is shared its data
// does not change; the last holder to release it gives it back to the pool.
type blob struct {
	mem   *memory
	data  []byte // starts at a multiple of 8
	buf   []byte // data with its spare capacity
	count atomic.Int32

	hashOnce sync.Once
	hash     treehash.Hash
}

// alloc returns a blob of n bytes with arbitrary content and one holder.
func (m *memory) alloc(n int) (*blob, error) {
	class := sizeClass(n)
	cost := int64(class) + overhead
	m.mu.Lock()
	if m.limit > 0 && m.live+cost > m.limit {
		live := m.live
		m.mu.Unlock()
		return nil, fmt.Errorf("%w: %d bytes of %d are in use and %d more are needed; raise the database's memory limit or delete keys", ErrMemory, live, m.limit, cost)
	}
	m.live += cost
	var buf []byte
	if list := m.pool[class]; len(list) > 0 {
		buf = list[len(list)-1]
		m.pool[class] = list[:len(list)-1]
		m.free -= int64(class)
	}
	m.evict()
	m.mu.Unlock()
	if buf == nil {
		buf = make([]byte, class)
	}
	b := &blob{mem: m, data: buf[:n:n], buf: buf}
	b.count.Store(1)
	return b, nil
}

// evict drops free buffers until the limit holds. m.mu is held.
func (m *memory) evict() {
	for class, list := range m.pool {
		for m.limit > 0 && m.live+m.free > m.limit && len(list) > 0 {
			list[len(list)-1] = nil
			list = list[:len(list)-1]
			m.free -= int64(class)
		}
		m.pool[class] = list
	}
}

func (m *memory) usage() (live, free int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.live, m.free
}

func (b *blob) retain() *blob {
	b.count.Add(1)
	return b
}

func (b *blob) release() {
	switch n := b.count.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("tensordb: buffer released twice")
	}
	m, class := b.mem, len(b.buf)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live -= int64(class) + overhead
	keep := max(freeMin, m.live)
	if class >= pooledMin && m.free+int64(class) <= keep && (m.limit == 0 || m.live+m.free+int64(class) <= m.limit) {
		m.pool[class] = append(m.pool[class], b.buf)
		m.free += int64(class)
	}
	b.data, b.buf = nil, nil
}

func (b *blob) floats() []float32 { return tensor.Floats(b.data) }

// sum returns the tree hash of the bytes, computed at most once.
func (b *blob) sum() treehash.Hash {
	b.hashOnce.Do(func() { b.hash = treehash.Sum(b.data) })
	return b.hash
}

// sizeClass rounds n up so that buffers of nearly one size share a pool: to a
// multiple of 8 when small, else to an eighth of the power of two below.
func sizeClass(n int) int {
	if n < pooledMin {
		return max((n+7)&^7, 8)
	}
	step := 1 << (bits.Len(uint(n-1)) - 4)
	return (n + step - 1) &^ (step - 1)
}
